"""A `Model` to a Hugging Face directory; `ffjax.checkpoint` reads it again."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from ffjax import packing, params, quantized_saving, safetensors_file
from ffjax.checkpoint import checked_path, common_dtype
from ffjax.errors import CheckpointError
from ffjax.params import Leaf, Model, check_model
from ffjax.quantized import QuantizedMatrix


def save(
  model: Model,
  directory: str | os.PathLike[str],
  max_shard_bytes: int = 2 * 10**9,
) -> None:
  """Saves a model as a Hugging Face directory; `load` gives the same bits.

  Quantised matrices are saved as compressed-tensors has them.

  Args:
    model: what to save: parameters, config and, if there is one, tokenizer.
    directory: is made if needed; must not hold a checkpoint yet.
    max_shard_bytes: a shard is closed before it grows beyond this, unless it
      is one larger tensor. The host holds one shard at a time.

  Raises:
    CheckpointError: if the directory holds a checkpoint or cannot be written,
      or a quantised model is none that compressed-tensors has.
  """
  check_model(model)
  directory = check_unused(directory)
  config = _saved_config(model)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    _save_tensors(model, directory, max_shard_bytes)
    if model.tokenizer is not None:
      model.tokenizer.save(directory)
    # Last, so that a directory with a config is a whole checkpoint.
    _write_json(directory / "config.json", config)
  except (OSError, safetensors.SafetensorError) as e:
    raise CheckpointError(f"{directory}: cannot be written: {e}") from e


def check_unused(given: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a directory's path, to save to.

  Raises:
    CheckpointError: if it holds a checkpoint, or there is no such name.
  """
  directory = checked_path(given)
  if not os.fspath(given):
    raise CheckpointError("the directory to save to has no name")
  try:
    is_name = b"\0" not in os.fsencode(directory)
  except UnicodeEncodeError:  # Half of a pair of surrogates.
    is_name = False
  if not is_name:
    raise CheckpointError(f"{str(directory)!r} is no name of a directory")
  for name in ("config.json", safetensors_file.SINGLE_NAME):
    if (directory / name).exists():
      raise CheckpointError(
        f"{directory / name} is there already; save to another directory"
      )
  return directory


def _saved_config(model: Model) -> dict[str, Any]:
  dtype = common_dtype(
    model.leaf_dtype(leaf.path) for leaf in params.leaves(model.config)
  )
  made = {**model.config.to_dict(), "torch_dtype": dtype.name}
  quantised = quantized_saving.quantization_config(model)
  if quantised is not None:
    made["quantization_config"] = quantised
  return made


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _save_tensors(
  model: Model, directory: pathlib.Path, max_shard_bytes: int
) -> None:
  tensors = [
    (name, leaf, layer)
    for leaf in params.leaves(model.config)
    for layer, name in enumerate(leaf.names)
  ]
  # Hugging Face's order: by layer, so that a shard holds whole layers.
  tensors.sort(key=lambda item: (item[1].stacked, item[2]))

  def num_bytes(leaf: Leaf) -> int:
    return model.leaf_bytes(leaf) // len(leaf.names)

  shards: list[list[tuple[str, Leaf, int]]] = [[]]
  shard_bytes = 0
  for item in tensors:
    size = num_bytes(item[1])
    if shards[-1] and shard_bytes + size > max_shard_bytes:
      shards.append([])
      shard_bytes = 0
    shards[-1].append(item)
    shard_bytes += size

  weight_map: dict[str, str] = {}
  total_bytes = 0
  for number, shard in enumerate(shards, start=1):
    file_name = safetensors_file.SINGLE_NAME
    if len(shards) > 1:
      file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
    host: dict[str, np.ndarray] = {}
    for name, leaf, layer in shard:
      tensor = packing.tensor(model, leaf.path, layer)
      if isinstance(tensor, QuantizedMatrix):
        host.update(quantized_saving.tensors(name, tensor))
      else:
        host[name] = np.asarray(tensor)
    total_bytes += sum(array.nbytes for array in host.values())
    unfinished = directory / (file_name + ".unfinished")
    # transformers refuses files that do not say which framework they are for.
    safetensors.numpy.save_file(host, unfinished, metadata={"format": "pt"})
    # The library makes files that only their owner can read.
    unfinished.chmod(0o666 & ~_umask())
    unfinished.rename(directory / file_name)
    weight_map.update(dict.fromkeys(host, file_name))
  if len(shards) > 1:
    metadata = {"total_size": total_bytes}
    index = {"metadata": metadata, "weight_map": weight_map}
    _write_json(directory / safetensors_file.INDEX_NAME, index)


def _umask() -> int:
  current = os.umask(0)
  os.umask(current)
  return current
