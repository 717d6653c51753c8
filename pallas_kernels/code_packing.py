"""Codes and their scales in the order in which the kernel streams them.

What `packing` is for bfloat16. Codes come as they are stored, `[..., out, bytes]`
uint8; of 4 bits, the first of two columns in the low bits. They become chunks
`[..., P, n, rows of the ring, 64]`, whose bytes pass for bfloat16, in the order
that `codes` says; scales become `[..., P, n, rows, 32]` int32, a row of the operand
after the other. Rows and columns are padded with scales of zero, or codes of zero
where a whole row has one scale. What packs and what unpacks are inverses bit for
bit.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import (
  PIECE_BYTES,
  ROW_BYTES,
  Format,
)
from pallas_kernels.geometry import SEGMENTS, TILE, UNIT_ROWS
from pallas_kernels.schedule import Matmul

_PIECES = ROW_BYTES // PIECE_BYTES
# Of bfloat16 128, to which codes of 4 bits are added, and their zeros.
_ZERO = 0x4300
_SIGN = 0x80


# Axes of a chunk: warp, upper or lower rows, segment; tile of 64 columns, half of
# it, thread, step, half of its columns, neighbour. And where they go: first the
# piece of 16 bytes and the thread, then its bytes.
_AXES = (4, 2, 8, -1, 2, 4, 2, 2, 2)
_WARP, _LOWER, _SEGMENT, _TILE, _HALF, _THREAD, _STEP, _PAIR, _NEXT = range(9)
_ORDER = {
  4: (
    *(_TILE, _WARP, _SEGMENT, _THREAD),
    *(_HALF, _STEP, _NEXT, _PAIR, _LOWER),
  ),
  8: (
    *(_TILE, _HALF, _WARP, _SEGMENT, _THREAD),
    *(_STEP, _PAIR, _NEXT, _LOWER),
  ),
}


def _swap_halves(x: jax.Array, segment: int, half: int) -> jax.Array:
  """Swaps the halves of tiles, of odd segments; an involution."""
  shape = [1] * x.ndim
  shape[segment] = SEGMENTS
  odd = jnp.arange(SEGMENTS, dtype=jnp.int32).reshape(shape) % 2 == 1
  return jnp.where(odd, jnp.flip(x, half), x)


def pack_codes(matmul: Matmul, codes: jax.Array) -> jax.Array:
  """Packs codes `[..., out, bytes]` uint8, rows permuted already, into chunks.

  Args:
    matmul: how the matrix is dealt out, and its format.
    codes: as they are stored.

  Returns:
    `[..., P, n, rows of the ring, 64]` bfloat16, in name.
  """
  f = matmul.format
  *lead, out, _ = codes.shape
  if f.bits == 4:
    x = jnp.stack([codes & 15, codes >> 4], axis=-1)
    x = x.reshape(*lead, out, -1)
  else:
    x = codes
  x = _chunks_of_rows(matmul, x, matmul.cols)
  if f.bits == 8 and not f.is_float:
    # After padding: a row's one scale is that of columns of padding too.
    x = x ^ _SIGN
  k = len(x.shape) - 2
  x = x.reshape(*x.shape[:-2], *_AXES)
  x = _swap_halves(x, k + _SEGMENT, k + _HALF)
  x = x.transpose(*range(k), *(k + i for i in _ORDER[f.bits]))
  if f.bits == 4:
    x = x[..., 0] | x[..., 1] << 4
  x = _swizzled(x.reshape(*x.shape[:k], -1, _PIECES, PIECE_BYTES))
  x = lax.bitcast_convert_type(
    x.reshape(*x.shape[:k], -1, ROW_BYTES // 2, 2), jnp.uint16
  )
  # Last of all: XLA may move bfloat16 as float32 and change what are NaNs to it.
  return lax.bitcast_convert_type(_deal_out(matmul, x), jnp.bfloat16)


def unpack_codes(
  matmul: Matmul, packed: jax.Array, out: int, cols: int
) -> jax.Array:
  """Undoes `pack_codes`, for a matrix `[out, cols]` before padding."""
  f = matmul.format
  x = _collect(matmul, lax.bitcast_convert_type(packed, jnp.uint16), 2)
  x = _rows_of_chunks(matmul, _chunk_codes(f, x))
  x = x[..., :out, :cols]
  if f.bits == 4:
    return x[..., 0::2] | x[..., 1::2] << 4
  return x if f.is_float else x ^ _SIGN


def _chunk_codes(f: Format, x: jax.Array) -> jax.Array:
  """From chunks `[..., rows, 64]` uint16 to codes `[..., 64, columns]`."""
  x = lax.bitcast_convert_type(x, jnp.uint8)
  k = x.ndim - 3
  x = _swizzled(x.reshape(*x.shape[:k], -1, _PIECES, PIECE_BYTES))
  if f.bits == 4:
    x = jnp.stack([x & 15, x >> 4], axis=-1)
  order = _ORDER[f.bits]
  x = x.reshape(*x.shape[:k], *(_AXES[i] for i in order))
  back = sorted(range(len(order)), key=lambda i: order[i])
  x = x.transpose(*range(k), *(k + i for i in back))
  x = _swap_halves(x, k + _SEGMENT, k + _HALF)
  return x.reshape(*x.shape[:k], TILE, -1)


def chunk_values(
  f: Format, tiles: int, chunk: jax.Array, entries: jax.Array
) -> jax.Array:
  """Returns the weights of one chunk, `[64, columns]` float32.

  Args:
    f: the format.
    tiles: times 128 columns in it.
    chunk: `[rows of the ring, 64]` bfloat16, in name.
    entries: `[rows, 32]` int32, its scales.
  """
  codes = _chunk_codes(f, lax.bitcast_convert_type(chunk, jnp.uint16))
  if f.is_float:
    values = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    values = values.astype(jnp.float32)
  else:
    values = codes.astype(jnp.float32)
  if f.bits == 8 and not f.is_float:
    values = values - float(_SIGN)
  kind = jnp.uint16 if f.entry_bytes == 2 else jnp.uint32
  rows = lax.bitcast_convert_type(entries, kind).reshape(TILE, -1)
  rows = _swap_spans(f, rows)
  scales, beside = _parts_of_entries(f, rows)
  values = values.reshape(TILE, f.num_spans(tiles), -1)

  def spread(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x.astype(jnp.float32)[..., None], values.shape)

  if f.beside == "zero" and beside is not None:
    values = values - spread(beside)
  elif f.bits == 4 and f.beside is None:
    values = values - 8.0
  values = values * spread(scales)
  if f.beside == "minimum" and beside is not None:
    values = values + spread(beside)
  return values.reshape(TILE, -1)


def pack_scales(
  matmul: Matmul, scales: jax.Array, beside: jax.Array | None
) -> jax.Array:
  """Packs scales, and zeros or minimums, `[..., out, groups]`.

  Args:
    matmul: how the matrix is dealt out, and its format.
    scales: of the format's dtype.
    beside: zeros uint8, or minimums of the scales' dtype, or None.

  Returns:
    `[..., P, n, rows, 32]` int32.
  """
  f = matmul.format
  x = _entries(f, scales, beside)
  if f.group is None:
    # Every chunk of a row has its scale.
    per_row = SEGMENTS * matmul.chunks_per_unit
    x = jnp.broadcast_to(x, (*x.shape[:-1], per_row))
  else:
    per_row = matmul.cols // f.group
  x = _swap_spans(f, _chunks_of_rows(matmul, x, per_row))
  x = x.reshape(*x.shape[:-2], -1)
  if x.dtype == jnp.uint16:
    x = x.reshape(*x.shape[:-1], -1, 2)
  x = lax.bitcast_convert_type(x, jnp.int32)
  return _deal_out(matmul, x.reshape(*x.shape[:-1], -1, ROW_BYTES // 4))


def unpack_scales(
  matmul: Matmul, packed: jax.Array, out: int, cols: int
) -> tuple[jax.Array, jax.Array | None]:
  """Undoes `pack_scales`, for a matrix `[out, cols]` before padding."""
  f = matmul.format
  kind = jnp.uint16 if f.entry_bytes == 2 else jnp.uint32
  x = lax.bitcast_convert_type(packed, kind)
  x = _collect(matmul, x, 2 if f.entry_bytes == 4 else 3)
  k = len(packed.shape) - 3
  x = _swap_spans(f, x.reshape(*x.shape[:k], TILE, -1))
  x = _rows_of_chunks(matmul, x)[..., :out, :]
  x = x[..., :1] if f.group is None else x[..., : cols // f.group]
  return _parts_of_entries(f, x)


def _parts_of_entries(
  f: Format, x: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Undoes `_entries`."""
  if f.beside is None:
    return lax.bitcast_convert_type(x, jnp.dtype(f.scale)), None
  scales = lax.bitcast_convert_type(
    (x & 0xFFFF).astype(jnp.uint16), jnp.dtype(f.scale)
  )
  beside = (x >> 16).astype(jnp.uint16)
  if f.beside == "minimum":
    return scales, lax.bitcast_convert_type(beside, jnp.dtype(f.scale))
  return scales, (beside - _ZERO).astype(jnp.uint8)


def _swap_spans(f: Format, x: jax.Array) -> jax.Array:
  """Swaps `[..., 64, spans]` as the halves of tiles, if spans are that short."""
  if f.group != TILE // 2:
    return x
  halves = x.reshape(*x.shape[:-2], -1, SEGMENTS, x.shape[-1] // 2, 2)
  return _swap_halves(halves, halves.ndim - 3, halves.ndim - 1).reshape(x.shape)


def _entries(
  f: Format, scales: jax.Array, beside: jax.Array | None
) -> jax.Array:
  if f.beside is None:
    kind = jnp.uint16 if f.entry_bytes == 2 else jnp.uint32
    return lax.bitcast_convert_type(scales, kind)
  assert beside is not None
  low = lax.bitcast_convert_type(scales, jnp.uint16)
  if f.beside == "minimum":
    high = lax.bitcast_convert_type(beside, jnp.uint16)
  else:
    # Those of bfloat16: from 128 on, neighbours are 1 apart.
    high = beside.astype(jnp.uint16) + jnp.uint16(_ZERO)
  return low.astype(jnp.uint32) | high.astype(jnp.uint32) << 16


def _swizzled(x: jax.Array) -> jax.Array:
  """Puts piece q of row r where the ring has q, which is at q xor r; an involution."""
  rows = x.shape[-3]
  row = jnp.arange(rows, dtype=jnp.int32)[:, None] % _PIECES
  piece = jnp.arange(_PIECES, dtype=jnp.int32)[None] ^ row
  return jnp.take_along_axis(
    x, piece.reshape(*[1] * (x.ndim - 3), rows, _PIECES, 1), axis=-2
  )


def _chunks_of_rows(matmul: Matmul, x: jax.Array, per_row: int) -> jax.Array:
  """From `[..., out, values]` to `[..., chunks, 64, values of a chunk]`."""
  *lead, out, cols = x.shape
  pad = [(0, 0)] * len(lead)
  x = jnp.pad(x, [*pad, (0, matmul.rows - out), (0, per_row - cols)])
  units, chunks = matmul.num_units, matmul.chunks_per_unit
  x = x.reshape(*lead, units, UNIT_ROWS, SEGMENTS, chunks, -1)
  x = jnp.moveaxis(x, -2, -4)
  return x.reshape(*lead, units * chunks, TILE, -1)


def _rows_of_chunks(matmul: Matmul, x: jax.Array) -> jax.Array:
  """Undoes `_chunks_of_rows`, but for the padding."""
  lead = x.shape[:-3]
  units, chunks = matmul.num_units, matmul.chunks_per_unit
  x = x.reshape(*lead, units, chunks, UNIT_ROWS, SEGMENTS, -1)
  x = jnp.moveaxis(x, -4, -2)
  return x.reshape(*lead, matmul.rows, -1)


def _deal_out(matmul: Matmul, x: jax.Array) -> jax.Array:
  """From `[..., chunks, *rest]` to `[..., P, n, *rest]`."""
  axis = x.ndim - 3
  total = matmul.num_ctas * matmul.run_chunks
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, total - x.shape[axis])
  return jnp.pad(x, pad).reshape(
    *x.shape[:axis], matmul.num_ctas, matmul.run_chunks, *x.shape[axis + 1 :]
  )


def _collect(matmul: Matmul, x: jax.Array, num_rest: int) -> jax.Array:
  """Undoes `_deal_out`."""
  axis = x.ndim - num_rest - 2
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  num_chunks = matmul.num_units * matmul.chunks_per_unit
  return lax.slice_in_dim(x, 0, num_chunks, axis=axis)
