"""The tensors of a Hugging Face directory, one file or many, not yet read.

The safetensors library checks a file's header (sizes, offsets, no holes);
what it does not offer is reading a tensor without leaving the file's pages in
this process, so the bytes are taken from our own memory map, whose pages are
given back as soon as they have been copied.

Source: the safetensors format description in its repository's README.
"""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ffjax import json_file
from ffjax.errors import CheckpointError
from ffjax.tensor_entry import TensorEntry

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What the parts of a quantised matrix may have beside those.
_QUANTIZED_DTYPES = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "I8": np.dtype(np.int8),
  "I32": np.dtype(np.int32),
  "I64": np.dtype(np.int64),
}


def open_directory(
  directory: pathlib.Path, quantized: bool = False
) -> list[TensorEntry]:
  """Lists the tensors of a Hugging Face checkpoint directory.

  Args:
    directory: holds `model.safetensors`, or an index and its shards.
    quantized: whether there may be tensors that are parts of quantised
      matrices.

  Returns:
    One entry for each tensor; names are unique.

  Raises:
    CheckpointError: naming the file or tensor that is missing, damaged, or not
      what the index says.
  """
  single = directory / SINGLE_NAME
  index = directory / INDEX_NAME
  # A broken link, as in a pruned hub cache, is named when it is opened.
  if os.path.lexists(single):
    return open_file(single, quantized)
  if os.path.lexists(index):
    return _open_index(index, quantized)
  others = sorted(
    path.name
    for pattern in ("*.bin", "*.pth", "*.pt", "*.safetensors", "*.gguf")
    for path in directory.glob(pattern)
  )
  found = f" (found {', '.join(others)})" if others else ""
  raise CheckpointError(
    f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME} is there{found};"
    " ffjax reads safetensors directories and single .gguf files"
  )


def open_file(path: pathlib.Path, quantized: bool = False) -> list[TensorEntry]:
  """Lists the tensors of one safetensors file; see `open_directory`.

  Raises:
    CheckpointError: naming the file, and the tensor if it is one tensor's
      fault, if it cannot be read, is truncated, or has a dtype that is not
      supported.
  """
  dtypes = {**_DTYPES, **(_QUANTIZED_DTYPES if quantized else {})}
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file")
  try:
    with safetensors.safe_open(path, framework="numpy") as checked:
      stated = {
        name: (view.get_dtype(), tuple(view.get_shape()))
        for name in checked.keys()
        for view in (checked.get_slice(name),)
      }
    header, data_start = _read_header(path)
  except (OSError, ValueError, safetensors.SafetensorError) as e:
    raise CheckpointError(
      f"{path}: not a complete safetensors file: {e}"
    ) from e
  entries = []
  for name, (dtype_name, shape) in stated.items():
    if dtype_name not in dtypes:
      raise CheckpointError(
        f"{path}: {name} has dtype {dtype_name} (supported:"
        f" {', '.join(dtypes)})"
      )
    dtype = dtypes[dtype_name]
    start, stop = header[name]["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
      raise CheckpointError(f"{path}: {name} has a size its shape does not")
    entries.append(
      TensorEntry(
        name=name,
        shape=shape,
        dtype=dtype,
        path=path,
        read=_reader(path, name, dtype, shape, data_start + start),
        stored_as=dtype_name,
      )
    )
  return entries


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """Returns the JSON header and the file offset of the first data byte."""
  with path.open("rb") as file:
    header_bytes = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_bytes))
  return header, 8 + header_bytes


def _reader(
  path: pathlib.Path,
  name: str,
  dtype: np.dtype,
  shape: tuple[int, ...],
  offset_bytes: int,
) -> Callable[[int, int], np.ndarray]:
  row_bytes = math.prod(shape[1:]) * dtype.itemsize

  def read(start: int, stop: int) -> np.ndarray:
    first = offset_bytes + start * row_bytes
    size_bytes = (stop - start) * row_bytes
    # Maps begin on pages.
    slack = first % mmap.ALLOCATIONGRANULARITY
    try:
      with (
        path.open("rb") as file,
        mmap.mmap(
          file.fileno(),
          slack + size_bytes,
          access=mmap.ACCESS_READ,
          offset=first - slack,
        ) as mapped,
      ):
        rows = np.frombuffer(mapped, np.uint8, size_bytes, slack).copy()
    except (OSError, ValueError) as e:
      raise CheckpointError(f"{path}: {name} cannot be read: {e}") from e
    return rows.view(dtype).reshape(stop - start, *shape[1:])

  return read


def _open_index(index: pathlib.Path, quantized: bool) -> list[TensorEntry]:
  weight_map = json_file.read_object(index, CheckpointError).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise CheckpointError(f"{index}: weight_map must be a non-empty object")
  names_by_shard: dict[str, set[str]] = {}
  for name, shard in weight_map.items():
    # Judged by its spelling, not by where links lead: hub caches keep their
    # files elsewhere and link to them.
    parts = pathlib.PurePath(shard).parts if isinstance(shard, str) else ()
    if len(parts) != 1 or parts[0] in ("..", "/", "\\") or "\\" in shard:
      raise CheckpointError(
        f"{index}: {name} is in {shard!r}, which is not a file name in the"
        " index's own directory"
      )
    names_by_shard.setdefault(shard, set()).add(name)
  # Not `Path.is_file`, which raises for names that cannot exist.
  missing = [s for s in names_by_shard if not os.path.isfile(index.parent / s)]
  if missing:
    raise CheckpointError(
      f"{index}: missing shards: {', '.join(sorted(missing))}"
    )
  entries: list[TensorEntry] = []
  for shard, names in sorted(names_by_shard.items()):
    in_shard = open_file(index.parent / shard, quantized)
    found = {entry.name for entry in in_shard}
    for name in sorted(names ^ found):
      where = (
        "the index but not the file"
        if name in names
        else ("the file but not listed for it in the index")
      )
      raise CheckpointError(f"{index.parent / shard}: {name} is in {where}")
    entries.extend(in_shard)
  return entries
