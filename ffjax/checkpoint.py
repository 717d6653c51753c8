"""Checkpoint files to a `Model`; `ffjax.saving` is the way back.

Everything that can be wrong with names, shapes and sizes is found before the
first weight is read. Tensors are then copied in blocks of rows straight into
the stacked parameters on the device, so that the host never holds more than
the model (if it is the device) and a block.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ffjax import (
  device_memory,
  gguf_file,
  gguf_tokenizer,
  json_file,
  params,
  quantization_config,
  quantized_file,
  quantized_leaf,
  safetensors_file,
  text,
)
from ffjax.config import LlamaConfig
from ffjax.errors import CheckpointError, ConfigError, TokenizerError
from ffjax.params import Leaf, Model
from ffjax.quantized import QuantizedMatrix
from ffjax.tensor_entry import TensorEntry

# Rows are read, checked and sent to the device in blocks of about this size.
_BLOCK_BYTES = 16 * 2**20

Progress = Callable[[int, int], None]


def load(
  path: str | os.PathLike[str],
  dtype: Any = None,
  progress: Progress | None = None,
  keep_quantized: bool | None = None,
) -> Model:
  """Loads a Llama checkpoint onto the default device.

  Args:
    path: a Hugging Face directory (`config.json`, safetensors in one file or
      sharded, perhaps `tokenizer.json`), or a `.gguf` file.
    dtype: dtype of all parameters that are not kept quantised: float32,
      bfloat16 or float16. None keeps each tensor's own; what is dequantised is
      then float32, or bfloat16 beside matrices that are kept.
    progress: called as `progress(done_bytes, total_bytes)` while loading,
      first with 0, last with `done_bytes == total_bytes`.
    keep_quantized: whether quantised matrices of layers keep their own bits, or
      are dequantised. None keeps those of a directory, and dequantises a
      `.gguf` file; True also keeps its Q4_0, Q4_1 and Q8_0.

  Returns:
    The model, with its tokenizer if the checkpoint has one.

  Raises:
    CheckpointError, ConfigError, TokenizerError: naming the file or tensor
      that is missing, damaged, unknown or not supported.
    RequestError: if the dtype is not supported or the model does not fit.
  """
  if dtype is not None:
    dtype = params.checked_dtype(dtype)  # Before anything is read.
  return open_checkpoint(path).load(dtype, progress, keep_quantized)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint of which everything but the weights has been read.

  Attributes:
    path: the directory or file.
    config: the model's sizes and constants.
    tokenizer: its tokenizer, or None.
    entries: its tensors, not yet read.
  """

  path: pathlib.Path
  config: LlamaConfig
  tokenizer: text.Tokenizer | None
  entries: list[TensorEntry]

  def shapes(
    self, dtype: Any = None, keep_quantized: bool | None = None
  ) -> Model:
    """Returns what `load` would give as shapes and dtypes."""
    tree = {
      leaf.path: jax.ShapeDtypeStruct(leaf.shape, kind)
      if isinstance(kind, np.dtype)
      else kind
      for leaf, _, kind in self._plan(dtype, keep_quantized)
    }
    return self._model(tree)

  def _model(self, tree: dict[tuple[str, ...], Any]) -> Model:
    return Model(
      params=flax.traverse_util.unflatten_dict(tree),
      config=self.config,
      tokenizer=self.tokenizer,
    )

  def load(
    self,
    dtype: Any = None,
    progress: Progress | None = None,
    keep_quantized: bool | None = None,
  ) -> Model:
    """Reads the weights; arguments, result and errors are those of `load`."""
    plan = self._plan(dtype, keep_quantized)
    total_bytes = sum(_leaf_bytes(leaf, kind) for leaf, _, kind in plan)
    device_memory.require(total_bytes, f"{self.path}: the model")

    done_bytes = 0

    def advance(num_bytes: int) -> None:
      nonlocal done_bytes
      done_bytes += num_bytes
      if progress is not None:
        progress(done_bytes, total_bytes)

    advance(0)
    tree = {
      leaf.path: quantized_leaf.load(parts, kind, advance)
      if isinstance(kind, QuantizedMatrix)
      else _load_leaf(leaf, parts, kind, advance)
      for leaf, parts, kind in plan
    }
    return self._model(tree)

  def _plan(
    self, dtype: Any, keep_quantized: bool | None
  ) -> list[tuple[Leaf, list[TensorEntry], np.dtype | QuantizedMatrix]]:
    """Returns for every leaf its tensors, and its dtype or what is kept."""
    if dtype is not None:
      dtype = params.checked_dtype(dtype)
    if keep_quantized is None:
      keep_quantized = self.path.suffix != ".gguf"
    plan = _match(self.path, self.config, self.entries)
    kept = [
      quantized_leaf.stacked_shapes(leaf, parts) if keep_quantized else None
      for leaf, parts in plan
    ]
    # What a bfloat16 model has beside its quantised matrices.
    dequantized = np.dtype(
      ml_dtypes.bfloat16 if any(x is not None for x in kept) else np.float32
    )
    found = []
    for (leaf, parts), shapes in zip(plan, kept, strict=True):
      own = _own_dtype(parts, dequantized) if dtype is None else dtype
      found.append((leaf, parts, own if shapes is None else shapes))
    return found


def checked_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path that a user has given.

  Raises:
    CheckpointError: if it is something else.
  """
  if not isinstance(path, str | os.PathLike):
    raise CheckpointError(f"path must be text, not {type(path).__name__}")
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:  # There is no such user; then it is a plain name.
    return pathlib.Path(path)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
  """Reads a checkpoint's config, tokenizer and list of tensors, no weights.

  Args:
    path: as for `load`.

  Raises:
    CheckpointError, ConfigError, TokenizerError: as `load`.
  """
  path = checked_path(path)
  # Not pathlib's tests, which raise for names that cannot exist.
  if os.path.isdir(path):
    raw = json_file.read_object(path / "config.json", ConfigError)
    scheme = quantization_config.take_scheme(raw, path)
    config = LlamaConfig.from_dict(raw, str(path / "config.json"))
    config = _with_generation_eos(config, path / "generation_config.json")
    entries = safetensors_file.open_directory(path, scheme is not None)
    if scheme is not None:
      entries = quantized_file.join(scheme, entries)
    return Checkpoint(path, config, text.load_tokenizer(path), entries)
  if not os.path.exists(path):
    raise CheckpointError(
      f"{path}: no such file or directory (ffjax reads local checkpoints)"
    )
  if path.suffix != ".gguf":
    raise CheckpointError(
      f"{path}: expected a Hugging Face directory or a .gguf file"
    )
  opened = gguf_file.open_gguf(path)
  config = LlamaConfig.from_dict(opened.config, str(path))
  tokenizer = _gguf_tokenizer(path, opened)
  return Checkpoint(path, config, tokenizer, opened.entries)


def _gguf_tokenizer(
  path: pathlib.Path, opened: gguf_file.GgufFile
) -> text.Tokenizer | None:
  if not opened.tokenizer_metadata:
    return None
  try:
    return gguf_tokenizer.tokenizer_from_gguf(opened.tokenizer_metadata)
  except TokenizerError as e:
    raise TokenizerError(f"{path}: {e}") from e


def _with_generation_eos(
  config: LlamaConfig, path: pathlib.Path
) -> LlamaConfig:
  """Adds the ends of text that chat models list only for generation."""
  # A broken link, as in a pruned hub cache, must not pass for no file.
  if not os.path.lexists(path):
    return config
  raw = config.to_dict()
  more = json_file.read_object(path, ConfigError).get("eos_token_id")
  more = more if isinstance(more, list) else [] if more is None else [more]
  raw["eos_token_id"] = [*config.eos_token_ids, *more]
  return LlamaConfig.from_dict(raw, str(path))


def _match(
  path: pathlib.Path, config: LlamaConfig, entries: list[TensorEntry]
) -> list[tuple[Leaf, list[TensorEntry]]]:
  """Pairs every leaf with its tensors, one per layer; nothing may be left."""
  held = sum(math.prod(entry.shape) for entry in entries)
  if config.num_params > 2 * held:
    # Far apart, a list of what is missing helps less, and could be endless.
    raise CheckpointError(
      f"{path}: the config makes a model of {config.num_params:,} parameters,"
      f" but the tensors hold {held:,}"
    )
  by_name = {entry.name: entry for entry in entries}
  plan = []
  for leaf in params.leaves(config):
    missing = [name for name in leaf.names if name not in by_name]
    if missing:
      raise CheckpointError(
        f"{path}: {missing[0]} is missing"
        + (f", and {len(missing) - 1} more like it" if missing[1:] else "")
      )
    parts = [by_name.pop(name) for name in leaf.names]
    for part in parts:
      if part.shape != leaf.tensor_shape:
        raise CheckpointError(
          f"{part.path}: {part.name} has shape {list(part.shape)}, but the"
          f" config makes it {list(leaf.tensor_shape)}"
        )
    plan.append((leaf, parts))
  head = by_name.pop("lm_head.weight", None)
  if head is not None:
    (embedding,) = (
      parts[0] for leaf, parts in plan if leaf.path[0] == "embed_tokens"
    )
    _check_tied(head, embedding)
  for name, entry in by_name.items():
    # Older checkpoints carry the rope table, which the config determines, and
    # those of GPTQ biases that add nothing.
    if not name.endswith("rotary_emb.inv_freq") and not _is_zero_bias(entry):
      raise CheckpointError(
        f"{entry.path}: {name} is not a tensor of this config"
      )
  return plan


def _is_zero_bias(entry: TensorEntry) -> bool:
  if not entry.name.endswith(".bias") or len(entry.shape) != 1:
    return False
  return not entry.read(0, entry.shape[0]).any()


def _check_tied(head: TensorEntry, embedding: TensorEntry) -> None:
  """Accepts a redundant LM head only if it is the embedding, bit for bit."""
  same = head.shape == embedding.shape and head.dtype == embedding.dtype
  if same:
    same = all(
      head.read(*rows).tobytes() == embedding.read(*rows).tobytes()
      for rows in _row_blocks(head)
    )
  if not same:
    raise CheckpointError(
      f"{head.path}: lm_head.weight differs from the embedding, but the config"
      " says tie_word_embeddings"
    )


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
  """Returns the float dtype that holds all of several."""
  found = set(map(np.dtype, dtypes))
  # Any two of the three float dtypes fit together in float32 only.
  return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _own_dtype(parts: list[TensorEntry], dequantized: np.dtype) -> np.dtype:
  """Returns a leaf's own dtype.

  Args:
    parts: its tensors.
    dequantized: dtype of matrices that are dequantised.
  """
  return common_dtype(
    dequantized if part.is_quantized and len(part.shape) == 2 else part.dtype
    for part in parts
  )


def _leaf_bytes(leaf: Leaf, kind: np.dtype | QuantizedMatrix) -> int:
  if isinstance(kind, QuantizedMatrix):
    return kind.num_bytes
  return math.prod(leaf.shape) * kind.itemsize


def _row_blocks(part: TensorEntry) -> Iterator[tuple[int, int]]:
  """Cuts a tensor into blocks of rows: `(start, stop)` pairs."""
  rows = part.shape[0]
  row_bytes = int(np.prod(part.shape[1:])) * part.dtype.itemsize
  step = max(1, _BLOCK_BYTES // row_bytes)
  for start in range(0, rows, step):
    yield start, min(start + step, rows)


def _load_leaf(
  leaf: Leaf,
  parts: list[TensorEntry],
  dtype: np.dtype,
  advance: Callable[[int], None],
) -> jax.Array:
  """Returns the leaf on the device; calls `advance` with bytes as they land."""
  if _leaf_bytes(leaf, dtype) <= _BLOCK_BYTES:
    # Small enough to gather on the host: no compilation, one transfer.
    tensors = [_converted(p, 0, p.shape[0], dtype) for p in parts]
    host = np.stack(tensors) if leaf.stacked else tensors[0]
    advance(host.nbytes)
    return jax.device_put(host)
  array = jnp.zeros(leaf.shape, dtype)
  for layer, part in enumerate(parts):
    for start, stop in _row_blocks(part):
      block = _converted(part, start, stop, dtype)
      at = (start, *(0 for _ in part.shape[1:]))
      if leaf.stacked:
        block, at = block[None], (layer, *at)
      array = _write(array, block, np.asarray(at, np.int32))
      # Blocks still in flight would add up to a second copy of the model.
      array.block_until_ready()
      advance(block.nbytes)
  return array


# The exponent bits; all of them are set in infinities and NaNs only.
_EXPONENT_MASKS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def _converted(
  part: TensorEntry, start: int, stop: int, dtype: np.dtype
) -> np.ndarray:
  """Reads rows in `dtype`; refuses values that are not finite in it."""
  # What overflows or is a NaN is reported just below.
  with np.errstate(over="ignore", invalid="ignore"):
    block = part.read(start, stop).astype(dtype, copy=False)
  mask = _EXPONENT_MASKS[dtype.name]
  bits = block.view(f"u{dtype.itemsize}")
  if (np.bitwise_and(bits, mask) == mask).any():
    raise CheckpointError(
      f"{part.path}: {part.name} holds values that are not finite as"
      f" {dtype.name}"
    )
  return block


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(array, block, tuple(at))
