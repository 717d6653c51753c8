"""The header of a GGUF file: metadata and where each tensor lies.

Down the flow: `ffjax.gguf_file` turns the header into a config and tensor
entries. The `gguf` package has a reader too, but it trusts the counts in the
file: a damaged one makes it loop or allocate without bound. So every count is
compared here with what is left of the file before it is used.

Source: the GGUF specification, `docs/gguf.md` of the ggml project, and the
checks of its loader (offsets without gaps, alignment a power of two).
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from ffjax.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_RANK = 4
# A list of Python objects takes many times its bytes in the file; a damaged
# length must not fill the memory. Real headers hold under a million elements.
_MAX_ELEMENTS = 1 << 24
# Chat templates, the longest strings in real files, are under a megabyte.
_MAX_STRING_BYTES = 1 << 24

_STRING = 8
_ARRAY = 9
_BOOL = 7
_NUMBERS = {
  0: "<u1",
  1: "<i1",
  2: "<u2",
  3: "<i2",
  4: "<u4",
  5: "<i4",
  6: "<f4",
  _BOOL: "<u1",
  10: "<u8",
  11: "<i8",
  12: "<f8",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor as the file holds it.

  Attributes:
    name: name in the file, for example `blk.0.attn_q.weight`.
    shape: shape in elements, slowest axis first (the file has it reversed).
    type_id: number of the ggml type.
    offset: first byte of the data, counted from the start of the file.
    size_bytes: bytes of data.
  """

  name: str
  shape: tuple[int, ...]
  type_id: int
  offset: int
  size_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
  """Everything in a GGUF file but the tensor data.

  Attributes:
    metadata: value of every key, as Python numbers, strings and lists.
    tensors: in file order; their data lies inside the file.
  """

  metadata: dict[str, Any]
  tensors: list[StoredTensor]


def read_header(
  path: pathlib.Path, block_sizes: Mapping[int, tuple[int, int]]
) -> GgufHeader:
  """Reads and checks the header of the GGUF file at `path`.

  Args:
    path: the file.
    block_sizes: ggml type number to (elements, bytes) of one block.

  Raises:
    CheckpointError: the file is missing, damaged, cut short, big-endian or of
      a version other than 2 and 3.
  """
  try:
    with path.open("rb") as file:
      size_bytes = path.stat().st_size
      return _Parser(file, path, size_bytes).parse(block_sizes)
  except OSError as error:
    raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Parser:
  """Walks the header once; `_left` never passes the end of the file."""

  def __init__(self, file: BinaryIO, path: pathlib.Path, size_bytes: int):
    self._file = file
    self._path = path
    self._size_bytes = size_bytes
    self._offset = 0
    self._elements_left = _MAX_ELEMENTS

  def parse(self, block_sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    num_tensors, num_keys = self._preamble()
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
      key = self._string("a key")
      if key in metadata:
        raise self._error(f"key {key!r} occurs twice")
      metadata[key] = self._value(key)
    infos = {}
    for _ in range(num_tensors):
      name, info = self._tensor_info()
      if name in infos:
        raise self._error(f"tensor {name!r} occurs twice")
      infos[name] = info
    return GgufHeader(metadata, self._place(infos, metadata, block_sizes))

  def _preamble(self) -> tuple[int, int]:
    if self._take(4, "the magic") != _MAGIC:
      raise self._error("not a GGUF file (wrong magic)")
    version = self._uint32("the version")
    if version & 0xFFFF == 0:
      raise self._error("big-endian GGUF files are not supported")
    if version not in _VERSIONS:
      raise self._error(
        f"GGUF version {version} is not supported (2 and 3 are)"
      )
    num_tensors = self._uint64("the tensor count")
    num_keys = self._uint64("the key count")
    # Smallest possible entries: an empty name and one dimension; an empty key
    # and a one-byte value.
    if num_tensors * 32 + num_keys * 13 > self._left():
      raise self._error(
        f"{num_tensors} tensors and {num_keys} keys do not fit into the file"
      )
    return num_tensors, num_keys

  def _value(self, key: str) -> Any:
    what = f"the value of {key!r}"
    type_id = self._uint32(what)
    if type_id == _STRING:
      return self._string(what)
    if type_id in _NUMBERS:
      return self._numbers(type_id, 1, what)[0]
    if type_id != _ARRAY:
      raise self._error(f"{what} has the unknown type {type_id}")
    item_type = self._uint32(what)
    count = self._uint64(what)
    if count > self._elements_left:
      raise self._error(f"{what} has {count} elements, which is absurd")
    self._elements_left -= count
    if item_type == _STRING:
      return [self._string(what) for _ in range(count)]
    if item_type not in _NUMBERS:
      raise self._error(f"{what} is an array of the unknown type {item_type}")
    return self._numbers(item_type, count, what)

  def _tensor_info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    name = self._string("a tensor name")
    what = f"tensor {name!r}"
    rank = self._uint32(what)
    if not 1 <= rank <= _MAX_RANK:
      raise self._error(f"{what} has {rank} dimensions")
    dims = [self._uint64(what) for _ in range(rank)]
    if 0 in dims:
      raise self._error(f"{what} has a dimension of size 0")
    type_id = self._uint32(what)
    offset = self._uint64(what)
    return name, (tuple(reversed(dims)), type_id, offset)

  def _place(
    self,
    infos: dict[str, tuple[tuple[int, ...], int, int]],
    metadata: dict[str, Any],
    block_sizes: Mapping[int, tuple[int, int]],
  ) -> list[StoredTensor]:
    """Finds each tensor's bytes, which must follow each other without gaps."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
      raise self._error(f"general.alignment is {alignment!r}")
    if alignment & (alignment - 1):
      raise self._error(f"general.alignment {alignment} is no power of two")
    data_start = _round_up(self._offset, alignment)
    end = 0
    tensors = []
    for name, (shape, type_id, offset) in infos.items():
      if type_id not in block_sizes:
        raise self._error(f"tensor {name!r} has the unknown type {type_id}")
      block, block_bytes = block_sizes[type_id]
      if shape[-1] % block:
        raise self._error(
          f"tensor {name!r}: rows of {shape[-1]} are not whole blocks of {block}"
        )
      # The loaders of the ggml project insist on this too, and it makes
      # damage to an offset or a shape show.
      if offset != _round_up(end, alignment):
        raise self._error(f"tensor {name!r} has the wrong offset {offset}")
      size_bytes = math.prod(shape) // block * block_bytes
      end = offset + size_bytes
      if data_start + end > self._size_bytes:
        raise self._error(
          f"tensor {name!r} ends beyond the end of the file, which may be cut"
        )
      tensors.append(
        StoredTensor(name, shape, type_id, data_start + offset, size_bytes)
      )
    # Without this, a damaged tensor count would move the start of the data.
    if self._size_bytes > data_start + _round_up(end, alignment):
      raise self._error("there are bytes after the last tensor")
    return tensors

  def _string(self, what: str) -> str:
    size_bytes = self._uint64(what)
    if size_bytes > _MAX_STRING_BYTES:
      raise self._error(f"{what}: a string of {size_bytes} bytes is absurd")
    raw = self._take(size_bytes, what)
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise self._error(f"{what} is not UTF-8") from error

  def _numbers(self, type_id: int, count: int, what: str) -> list[Any]:
    dtype = np.dtype(_NUMBERS[type_id])
    raw = self._take(count * dtype.itemsize, what)
    values = np.frombuffer(raw, dtype).tolist()
    if type_id != _BOOL:
      return values
    if any(value > 1 for value in values):
      raise self._error(f"{what} is neither true nor false")
    return [value == 1 for value in values]

  def _uint32(self, what: str) -> int:
    return int.from_bytes(self._take(4, what), "little")

  def _uint64(self, what: str) -> int:
    return int.from_bytes(self._take(8, what), "little")

  def _take(self, size_bytes: int, what: str) -> bytes:
    if size_bytes > self._left():
      raise self._error(f"{what} ends beyond the end of the file")
    raw = self._file.read(size_bytes)
    if len(raw) != size_bytes:
      raise self._error("the file became shorter while it was read")
    self._offset += size_bytes
    return raw

  def _left(self) -> int:
    return self._size_bytes - self._offset

  def _error(self, problem: str) -> CheckpointError:
    return CheckpointError(f"{self._path}: {problem}")


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple
