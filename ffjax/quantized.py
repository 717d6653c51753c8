"""Matrices of few bits per weight: the table of formats, and what they mean.

Up the flow: checkpoints (`ffjax.checkpoint`) and `ffjax.quantizing` make
quantised matrices; down the flow: the reference dequantises them layer by layer
(`ffjax.quantized_model`), the fused kernel on their way to the tensor core.
"""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from ffjax.errors import RequestError

# Codes are packed by NumPy while files are read and written, else by JAX.
Codes = TypeVar("Codes", np.ndarray, jax.Array)

GROUP_SIZES = (128, 64, 32)
# Of a symmetric 4-bit code, which is 0 to 15.
SYMMETRIC_ZERO = 8
# The largest finite float8_e4m3fn.
FLOAT8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Format:
  """How the weights of a matrix are stored.

  Attributes:
    name: key in `FORMATS`.
    bits: bits of a code: 4 or 8.
    is_float: whether a code is a float8_e4m3fn; else it is an integer.
    group_size: neighbours in a row that share a scale; None for a whole row.
    symmetric: whether there are no zero points and no minimums.
  """

  name: str
  bits: int
  is_float: bool
  group_size: int | None
  symmetric: bool

  def num_groups(self, num_columns: int) -> int:
    """Returns how many scales a row of so many weights has."""
    return 1 if self.group_size is None else num_columns // self.group_size

  def num_bytes(self, shape: tuple[int, ...], entry_bytes: int) -> int:
    """Returns the bytes of a matrix, or a stack of them.

    Args:
      shape: `[..., out, in]`, of weights.
      entry_bytes: of a scale and what is beside it.
    """
    *outer, num_columns = shape
    codes_bytes = math.prod(shape) * self.bits // 8
    num_entries = math.prod(outer) * self.num_groups(num_columns)
    return codes_bytes + num_entries * entry_bytes


def _table() -> dict[str, Format]:
  made = [
    Format(f"int4_g{size}{suffix}", 4, False, size, not suffix)
    for suffix in ("", "_asym")
    for size in GROUP_SIZES
  ]
  made.append(Format("int8", 8, False, None, True))
  made += [
    Format(f"int8_g{size}", 8, False, size, True) for size in GROUP_SIZES
  ]
  made.append(Format("fp8", 8, True, None, True))
  return {item.name: item for item in made}


FORMATS = _table()


def checked_format(name: Any) -> Format:
  """Returns the format of that name.

  Raises:
    RequestError: if there is none; the message lists them.
  """
  if not isinstance(name, str) or name not in FORMATS:
    raise RequestError(
      f"format={name!r} does not exist (there are: {', '.join(FORMATS)})"
    )
  return FORMATS[name]


@struct.dataclass
class QuantizedMatrix:
  """A matrix `[out, in]`, or a stack of them, as codes and scales; a pytree.

  Attributes:
    codes: `[..., out, in * bits / 8]` uint8. Of 4 bits, column 2 i is in the
      low nibble of byte i, column 2 i + 1 in the high one, both 0 to 15; of 8
      bits, a two's complement integer or the bits of a float8_e4m3fn.
    scales: `[..., out, groups]` float32, bfloat16 or float16; one group if
      there is a scale for each row.
    zeros: `[..., out, groups]` uint8, the code that means 0, itself 0 to 16; or
      None, which for 4 bits means 8 unless there are minimums.
    minimums: `[..., out, groups]`, in the scales' dtype, what code 0 means; or
      None.
    columns: `[..., in]` int32, which column of the matrix each stored column
      is, where groups are not neighbours (GPTQ's act-order); or None if the
      order is the matrix's own.
    format: the format; its group size is in stored columns.
  """

  # Any: arrays of JAX or, while they are read, of NumPy, or their shapes.
  codes: Any
  scales: Any
  zeros: Any
  minimums: Any
  columns: Any
  format: Format = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape in weights, `[..., out, in]`."""
    *outer, row_bytes = self.codes.shape
    return (*outer, row_bytes * 8 // self.format.bits)

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.codes.shape)

  @property
  def num_bytes(self) -> int:
    """Bytes of all that is stored, scales and the rest included."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def dequantize(matrix: QuantizedMatrix) -> jax.Array:
  """Returns the weights, `[..., out, in]` float32.

  A weight is scale * (code - zero), or scale * code + minimum. It is exact for
  scales in 16 bits, but for one rounding where there is a minimum.
  """
  codes = unpack_codes(jnp.asarray(matrix.codes), matrix.format)
  values = code_values(codes, matrix.format)
  grouped = values.reshape(*values.shape[:-1], matrix.scales.shape[-1], -1)

  def spread(x: jax.Array) -> jax.Array:
    """Returns one number per group as one per weight."""
    x = jnp.asarray(x).astype(jnp.float32)
    return jnp.broadcast_to(x[..., None], grouped.shape)

  if matrix.minimums is not None:
    grouped = spread(matrix.scales) * grouped + spread(matrix.minimums)
  else:
    if matrix.zeros is not None:
      grouped -= spread(matrix.zeros)
    elif matrix.format.bits == 4:
      grouped -= float(SYMMETRIC_ZERO)
    grouped *= spread(matrix.scales)
  values = grouped.reshape(values.shape)
  if matrix.columns is None:
    return values
  stored_at = jnp.argsort(matrix.columns, axis=-1)[..., None, :]
  stored_at = jnp.broadcast_to(stored_at, values.shape)
  return jnp.take_along_axis(values, stored_at, axis=-1)


def pack_codes(codes: Codes, format: Format) -> Codes:
  """Returns `QuantizedMatrix.codes` of codes `[..., in]` uint8, a byte each."""
  if format.bits == 8:
    return codes
  return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(codes: Codes, format: Format) -> Codes:
  """Undoes `pack_codes`."""
  if format.bits == 8:
    return codes
  pairs = [codes & 15, codes >> 4]
  if isinstance(codes, np.ndarray):
    joined = np.stack(pairs, axis=-1)
  else:
    joined = jnp.stack(pairs, axis=-1)
  return joined.reshape(*codes.shape[:-1], -1)


def code_values(codes: jax.Array, format: Format) -> jax.Array:
  """Returns what codes `[...]` uint8, a byte each, stand for, as float32."""
  if format.bits == 4:
    return codes.astype(jnp.float32)
  dtype = jnp.float8_e4m3fn if format.is_float else jnp.int8
  return jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)


def rows(matrix: QuantizedMatrix, at: jax.Array) -> QuantizedMatrix:
  """Returns rows `[..., in]` of a matrix `[out, in]`, at indices `[...]`."""
  assert matrix.columns is None  # They are the same for all rows.
  return jax.tree.map(lambda x: x[at], matrix)


@functools.partial(jax.jit, static_argnames=("shape", "format", "dtype"))
def random_matrix(
  key: jax.Array,
  shape: tuple[int, ...],
  format: Format,
  dtype: jax.typing.DTypeLike,
) -> QuantizedMatrix:
  """Makes a matrix `shape`, `[..., out, in]`, of random codes.

  Weights have a standard deviation of about 0.02; no two parts of a row share
  all of their scale and zero point.

  Args:
    key: a `jax.random` key.
    shape: in weights.
    format: the format.
    dtype: of the scales.
  """
  if len(shape) > 2:
    # One after another: what is random takes more memory than what is made.
    return jax.lax.map(
      lambda own: random_matrix(own, shape[1:], format, dtype),
      jax.random.split(key, shape[0]),
    )
  *outer, columns = shape
  grouped = (*outer, format.num_groups(columns))
  for_codes, for_scales, for_zeros = jax.random.split(key, 3)
  codes = jax.random.bits(
    for_codes, (*outer, columns * format.bits // 8), jnp.uint8
  )
  every = np.arange(2**format.bits, dtype=np.uint8)
  if format.is_float:
    # Values below 2, so that there is no NaN.
    codes &= 0xBF
    every = (every & 0xBF).view(ml_dtypes.float8_e4m3fn)
  elif format.bits == 4 and format.symmetric:
    # Without a code 0, whose opposite there is not, weights have a mean of 0.
    for low, zero in ((0x0F, 0x08), (0xF0, 0x80)):
      codes = jnp.where(codes & low == 0, codes | zero, codes)
    every = every[1:]
  spread = float(np.std(every.astype(np.float32)))
  scales = jax.random.uniform(for_scales, grouped, minval=0.5, maxval=1.5)
  zeros = None
  if not format.symmetric:
    zeros = jax.random.randint(for_zeros, grouped, 6, 11).astype(jnp.uint8)
  return QuantizedMatrix(
    codes=codes,
    scales=(0.02 / spread * scales).astype(dtype),
    zeros=zeros,
    minimums=None,
    columns=None,
    format=format,
  )
