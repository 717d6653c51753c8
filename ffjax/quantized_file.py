"""The quantised matrices of a Hugging Face directory, not yet read.

Up the flow: `ffjax.safetensors_file` lists tensors, several for each quantised
matrix, and `ffjax.quantization_config` says what they mean; down the flow:
`ffjax.checkpoint` takes one entry for each matrix. Codes never change; only
where they lie does.

Source: the layouts that GPTQModel, AutoAWQ and compressed-tensors pack.
"""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np

from ffjax.errors import CheckpointError
from ffjax.quantization_config import Scheme
from ffjax.quantized import (
  FORMATS,
  GROUP_SIZES,
  Format,
  QuantizedMatrix,
  dequantize,
  pack_codes,
  unpack_codes,
)
from ffjax.tensor_entry import StoredBits, TensorEntry

# The tensors of a matrix below its module's name: the codes, which only
# quantised matrices have, what else must be there, and what may be.
_TENSORS = {
  "gptq": ("qweight", ("qzeros", "scales"), ("g_idx",)),
  "awq": ("qweight", ("qzeros", "scales"), ()),
  "pack-quantized": (
    "weight_packed",
    ("weight_scale", "weight_shape"),
    ("weight_zero_point", "weight_g_idx"),
  ),
  # These codes are named like plain weights; their scales tell.
  "int-quantized": ("weight", ("weight_scale",), ()),
  "float-quantized": ("weight", ("weight_scale",), ()),
}
_CODE_DTYPES = {
  "int-quantized": np.dtype(np.int8),
  "float-quantized": np.dtype(ml_dtypes.float8_e4m3fn),
}
# A one in each code of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}
_FLOATS = ("float32", "bfloat16", "float16")
# Which column AWQ keeps in each nibble of a word, from the lowest on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def join(scheme: Scheme, entries: list[TensorEntry]) -> list[TensorEntry]:
  """Joins the tensors of each quantised matrix into one entry.

  Args:
    scheme: how matrices are quantised; those that are not stay as they are.
    entries: the tensors of a directory.

  Raises:
    CheckpointError: naming a tensor that is missing or does not fit the others.
  """
  by_name = {entry.name: entry for entry in entries}
  codes, required, optional = _TENSORS[scheme.layout]
  mark = required[0] if codes == "weight" else codes
  modules = [
    name.removesuffix(f".{mark}")
    for name in by_name
    if name.endswith(f".{mark}")
  ]
  # Blocks of rows are asked for one after another; of one matrix at a time.
  read = functools.lru_cache(maxsize=1)(_Matrix.read)
  joined = []
  for module in modules:
    tensors = {}
    for suffix in (codes, *required, *optional):
      entry = by_name.pop(f"{module}.{suffix}", None)
      if entry is not None:
        tensors[suffix] = entry
      elif suffix not in optional:
        raise CheckpointError(
          f"{entries[0].path}: {module}.{suffix} is missing"
        )
    plain = by_name.get(f"{module}.weight")
    if plain is not None:
      raise CheckpointError(
        f"{plain.path}: there is {plain.name} beside {module}.{codes}"
      )
    joined.append(_entry(_Matrix(scheme, module, tensors), read))
  for entry in by_name.values():
    if entry.dtype.name not in _FLOATS:
      raise CheckpointError(
        f"{entry.path}: {entry.name} has dtype {entry.dtype.name}, and is no"
        f" part of a matrix in {scheme.layout}"
      )
  return [*by_name.values(), *joined]


def _entry(
  matrix: "_Matrix", read: "functools._lru_cache_wrapper"
) -> TensorEntry:

  def rows(start: int, stop: int) -> np.ndarray:
    found = read(matrix)
    columns = found.columns
    part = jax.tree.map(
      lambda x: x[start:stop], dataclasses.replace(found, columns=None)
    )
    return np.asarray(dequantize(dataclasses.replace(part, columns=columns)))

  return TensorEntry(
    name=f"{matrix.module}.weight",
    shape=matrix.shape,
    dtype=np.dtype(np.float32),
    path=matrix.path,
    read=rows,
    stored_as=matrix.format.name,
    is_quantized=True,
    bits=StoredBits(matrix.shapes(), functools.partial(read, matrix)),
  )


class _Matrix:
  """One quantised matrix: checks its tensors, and reads them when asked to."""

  def __init__(
    self, scheme: Scheme, module: str, tensors: dict[str, TensorEntry]
  ):
    """Checks the shapes and dtypes of all tensors against each other."""
    self.module = module
    self._scheme = scheme
    self._tensors = tensors
    self._codes = tensors[_TENSORS[scheme.layout][0]]
    self.path = self._codes.path
    self.shape = self._shape()
    out, columns = self.shape
    # How many groups of ours a group of the file's is.
    self.format, self._repeats = self._format()
    self._num_groups = 1
    if scheme.group_size is not None:
      self._num_groups = columns // scheme.group_size
    self._check_tensors()
    self._columns = self._stored_columns()

  def _error(self, suffix: str, message: str) -> CheckpointError:
    path = self._tensors.get(suffix, self._codes).path
    return CheckpointError(f"{path}: {self.module}.{suffix} {message}")

  def _shape(self) -> tuple[int, int]:
    """Returns the matrix's `(out, in)`."""
    per_word = 32 // self._scheme.bits
    if len(self._codes.shape) != 2 or 0 in self._codes.shape:
      suffix = self._codes.name.rsplit(".", 1)[1]
      shape = list(self._codes.shape)
      raise self._error(suffix, f"is not a matrix, but of shape {shape}")
    first, second = self._codes.shape
    if self._scheme.layout == "gptq":
      return second, first * per_word
    if self._scheme.layout == "awq":
      return second * per_word, first
    if self._scheme.layout == "pack-quantized":
      dtype = self._tensors["weight_shape"].dtype
      if not np.issubdtype(dtype, np.integer):
        raise self._error("weight_shape", f"has dtype {dtype.name}")
      stated = self._whole("weight_shape").reshape(-1).tolist()
      if len(stated) != 2 or min(stated) < 1:
        raise self._error("weight_shape", f"says {stated}")
      return stated[0], stated[1]
    return first, second

  def _format(self) -> tuple[Format, int]:
    scheme = self._scheme
    columns = self.shape[1]
    if scheme.bits == 8 and scheme.group_size is None:
      is_float = scheme.layout == "float-quantized"
      return FORMATS["fp8" if is_float else "int8"], 1
    theirs = scheme.group_size or columns
    if columns % theirs or theirs % GROUP_SIZES[-1]:
      raise CheckpointError(
        f"{self.path}: {self.module} has {columns} columns, which are not whole"
        f" groups of {theirs if columns % theirs else GROUP_SIZES[-1]}"
      )
    # Groups larger than those of any format are several with equal scales.
    ours = next(size for size in GROUP_SIZES if theirs % size == 0)
    suffix = "" if scheme.symmetric else "_asym"
    return FORMATS[f"int{scheme.bits}_g{ours}{suffix}"], theirs // ours

  def _check_tensors(self) -> None:
    out, columns = self.shape
    groups, per_word = self._num_groups, 32 // self._scheme.bits
    words, of_out = -(-columns // per_word), -(-out // per_word)
    layouts: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
      "gptq": {
        "qweight": ((words, out),),
        "qzeros": ((groups, of_out),),
        "scales": ((groups, out),),
        "g_idx": ((columns,),),
      },
      "awq": {
        "qweight": ((columns, of_out),),
        "qzeros": ((groups, of_out),),
        "scales": ((groups, out),),
      },
      "pack-quantized": {
        "weight_packed": ((out, words),),
        "weight_scale": ((out, groups),),
        "weight_zero_point": ((of_out, groups), (out, groups)),
        "weight_g_idx": ((columns,),),
      },
      "int-quantized": {"weight_scale": ((out, 1), (out,), (1,), ())},
      "float-quantized": {"weight_scale": ((out, 1), (out,), (1,), ())},
    }
    shapes = layouts[self._scheme.layout]
    for suffix, entry in self._tensors.items():
      accepted = shapes.get(suffix, (entry.shape,))
      if entry.shape not in accepted:
        raise self._error(
          suffix,
          f"has shape {list(entry.shape)}, but that of a matrix of"
          f" {list(self.shape)} is {list(accepted[0])}",
        )
      if "scale" in suffix:
        known = entry.dtype.name in _FLOATS
      elif suffix == "weight":
        known = entry.dtype == _CODE_DTYPES[self._scheme.layout]
      elif suffix == "weight_zero_point":
        known = entry.dtype == (np.int8 if entry.shape[0] == out else np.int32)
      else:
        known = entry.dtype == np.int32 or suffix == "weight_shape"
      if not known:
        raise self._error(suffix, f"has dtype {entry.dtype.name}")
    if self._scheme.layout == "pack-quantized":
      if (
        not self._scheme.symmetric and "weight_zero_point" not in self._tensors
      ):
        raise self._error("weight_zero_point", "is missing")

  def _stored_columns(self) -> np.ndarray | None:
    """Returns the columns `[in]` in an order that makes groups neighbours."""
    size = self._scheme.group_size
    is_gptq = self._scheme.layout == "gptq"
    suffix = "g_idx" if is_gptq else "weight_g_idx"
    if size is None:
      return None
    group_of = self._whole(suffix) if suffix in self._tensors else None
    # -1 is compressed-tensors' way to say that there is no order.
    if group_of is None or (not is_gptq and (group_of == -1).all()):
      if self._scheme.ordered:
        raise self._error(
          suffix,
          "is missing, but the config says that activations order the columns"
          f" ({'desc_act' if is_gptq else 'actorder'})",
        )
      return None
    in_order = np.arange(self.shape[1]) // size
    if (group_of == in_order).all():
      return None
    columns = np.argsort(group_of, kind="stable").astype(np.int32)
    if (group_of[columns] != in_order).any():
      raise self._error(suffix, f"does not make groups of {size} columns each")
    return columns

  def shapes(self) -> QuantizedMatrix:
    """Returns the matrix as shapes and dtypes."""
    out, columns = self.shape
    made = (out, self._num_groups * self._repeats)
    scale = next(e for s, e in self._tensors.items() if "scale" in s)
    return QuantizedMatrix(
      codes=jax.ShapeDtypeStruct(
        (out, columns * self.format.bits // 8), np.uint8
      ),
      scales=jax.ShapeDtypeStruct(made, scale.dtype),
      zeros=None
      if self.format.symmetric
      else jax.ShapeDtypeStruct(made, np.uint8),
      minimums=None,
      columns=None
      if self._columns is None
      else jax.ShapeDtypeStruct((columns,), np.int32),
      format=self.format,
    )

  def read(self) -> QuantizedMatrix:
    """Returns the matrix as NumPy arrays."""
    codes = self._read_codes()
    if self._columns is not None:
      columns = unpack_codes(codes, self.format)[:, self._columns]
      codes = pack_codes(columns, self.format)
    zeros = self._read_zeros()
    return QuantizedMatrix(
      codes=codes,
      scales=self._per_group(self._read_scales()),
      zeros=None if zeros is None else self._per_group(zeros),
      minimums=None,
      columns=self._columns,
      format=self.format,
    )

  def _whole(self, suffix: str) -> np.ndarray:
    entry = self._tensors[suffix]
    return entry.read(0, entry.shape[0] if entry.shape else 1)

  def _per_group(self, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.repeat(array, self._repeats, axis=-1))

  def _read_codes(self) -> np.ndarray:
    """Returns `QuantizedMatrix.codes`, columns in the matrix's own order."""
    out, columns = self.shape
    bits, layout = self._scheme.bits, self._scheme.layout
    words = self._whole(self._codes.name.rsplit(".", 1)[1])
    if layout == "awq":
      return pack_codes(_awq_unpack(words, self.format).T, self.format)
    # The first code of a word is in its lowest bits, and so in its first byte.
    as_bytes = words.view(np.uint8)
    if layout == "gptq":
      as_bytes = as_bytes.reshape(*words.shape, 4).swapaxes(0, 1)
    codes = as_bytes.reshape(out, -1)[:, : columns * bits // 8]
    if bits == 8 and words.dtype == np.int32:
      # From 128 more to two's complement.
      codes = codes ^ np.uint8(0x80)
    return np.ascontiguousarray(codes)

  def _read_scales(self) -> np.ndarray:
    """Returns `[out, groups]`."""
    if self._scheme.layout in ("gptq", "awq"):
      return self._whole("scales").T
    scales = self._whole("weight_scale")
    return np.broadcast_to(
      scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1),
      (self.shape[0], self._num_groups),
    )

  def _read_zeros(self) -> np.ndarray | None:
    """Returns `[out, groups]` uint8, or None of a symmetric format."""
    out, bits = self.shape[0], self._scheme.bits
    if self._scheme.layout == "awq":
      zeros = _awq_unpack(self._whole("qzeros"), self.format).T
      suffix = "qzeros"
    elif self._scheme.layout == "gptq":
      stored = self._whole("qzeros").view(np.uint32)
      # Words were less by this as a whole: a zero point of 0 has borrowed from
      # the one after it.
      stored = stored + np.uint32(self._scheme.zero_offset * _ONES[bits])
      zeros = unpack_codes(stored.view(np.uint8), self.format).T[:out]
      suffix = "qzeros"
    elif "weight_zero_point" in self._tensors:
      stored = self._whole("weight_zero_point")
      suffix = "weight_zero_point"
      if stored.dtype == np.int8:
        wide = stored.astype(np.int16) + 2 ** (bits - 1)
        if wide.min() < 0 or wide.max() >= 2**bits:
          raise self._error(
            suffix,
            f"has {stored.min()} to {stored.max()}, but zero points of {bits}"
            f" bits are {-(2 ** (bits - 1))} to {2 ** (bits - 1) - 1}",
          )
        zeros = wide.astype(np.uint8)
      else:
        # Packed along the first axis.
        turned = np.ascontiguousarray(stored.T).view(np.uint8)
        zeros = unpack_codes(turned, self.format).T[:out]
    else:
      return None
    if not self._scheme.symmetric:
      return zeros
    if (zeros != 2 ** (bits - 1)).any():
      raise self._error(
        suffix,
        f"is not {2 ** (bits - 1)} throughout, as a symmetric format's is",
      )
    return None


def _awq_unpack(words: np.ndarray, format: Format) -> np.ndarray:
  """Returns codes `[rows, out]` of words `[rows, out / 8]`."""
  nibbles = unpack_codes(words.view(np.uint8), format)
  nibbles = nibbles.reshape(*words.shape, 8)
  return nibbles[..., np.argsort(_AWQ_ORDER)].reshape(words.shape[0], -1)
