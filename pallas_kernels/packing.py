"""Weights in the order in which the kernel streams them.

`[out, in]` matrices become chunks `[..., P, n, 128, 64]` bfloat16: CTA p reads
its n chunks unit by unit, see `geometry` for what is in one. Row `64 h +
8 r + s` of a chunk is 64 columns, half h of its 128, of segment s of the unit's
row r. Rows and columns are padded with zeros. What packs and what unpacks are
inverses bit for bit, NaNs included.

Rows alternate where the results of two rows meet: the two halves of a head, for
rope, and gate and up.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.geometry import (
  CHUNK_COLS,
  CHUNK_ROWS,
  SEGMENTS,
  UNIT_ROWS,
)
from pallas_kernels.schedule import Matmul


def _bits(weights: jax.Array) -> jax.Array:
  # XLA may pad and join bfloat16 as float32 and change NaNs on the way.
  return lax.bitcast_convert_type(weights, jnp.uint16)


def _weights(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.bfloat16)


def pack_matrix(matmul: Matmul, rows: jax.Array) -> jax.Array:
  """Packs `[..., out, in]`, rows permuted already, into chunks.

  Args:
    matmul: how the matrix is dealt out.
    rows: bfloat16.

  Returns:
    `[..., P, n, 128, 64]` bfloat16.
  """
  *lead, out, cols = rows.shape
  pad = [(0, 0)] * len(lead)
  margins = [*pad, (0, matmul.rows - out), (0, matmul.cols - cols)]
  x = jnp.pad(_bits(rows), margins)
  units, chunks = matmul.num_units, matmul.chunks_per_unit
  x = x.reshape(*lead, units, UNIT_ROWS, SEGMENTS, chunks, 2, CHUNK_COLS // 2)
  # Rows and segments behind chunks and halves.
  x = jnp.moveaxis(x, (-5, -4), (-3, -2))
  x = x.reshape(*lead, -1, CHUNK_ROWS, CHUNK_COLS // 2)
  total = matmul.num_ctas * matmul.run_chunks
  x = jnp.pad(x, [*pad, (0, total - x.shape[-3]), (0, 0), (0, 0)])
  x = x.reshape(*lead, matmul.num_ctas, matmul.run_chunks, *x.shape[-2:])
  return _weights(x)


def unpack_matrix(
  matmul: Matmul, packed: jax.Array, out: int, cols: int
) -> jax.Array:
  """Undoes `pack_matrix`.

  Args:
    matmul: how the matrix is dealt out.
    packed: `[..., P, n, 128, 64]` bfloat16.
    out: rows before padding.
    cols: columns before padding.

  Returns:
    `[..., out, cols]` bfloat16.
  """
  lead = packed.shape[:-4]
  units, chunks = matmul.num_units, matmul.chunks_per_unit
  x = _bits(packed).reshape(*lead, -1, CHUNK_ROWS, CHUNK_COLS // 2)
  x = x[..., : units * chunks, :, :]
  x = x.reshape(*lead, units, chunks, 2, UNIT_ROWS, SEGMENTS, CHUNK_COLS // 2)
  x = jnp.moveaxis(x, (-3, -2), (-5, -4))
  x = x.reshape(*lead, matmul.rows, matmul.cols)
  return _weights(x[..., :out, :cols])


def permute_heads(rows: jax.Array, head_dim: int) -> jax.Array:
  """Alternates the rows that rope joins; `[..., heads H, in]`."""
  *lead, out, cols = rows.shape
  x = rows.reshape(*lead, -1, 2, head_dim // 2, cols)
  return jnp.swapaxes(x, -3, -2).reshape(*lead, out, cols)


def unpermute_heads(rows: jax.Array, head_dim: int) -> jax.Array:
  """Undoes `permute_heads`."""
  *lead, out, cols = rows.shape
  x = rows.reshape(*lead, -1, head_dim // 2, 2, cols)
  return jnp.swapaxes(x, -3, -2).reshape(*lead, out, cols)


def interleave(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Alternates rows of each; two `[..., F, in]` to `[..., 2 F, in]`."""
  *lead, out, cols = gate.shape
  is_bf16 = gate.dtype == jnp.bfloat16
  both = [_bits(x) if is_bf16 else x for x in (gate, up)]
  joined = jnp.stack(both, axis=-2).reshape(*lead, 2 * out, cols)
  return _weights(joined) if is_bf16 else joined


def deinterleave(rows: jax.Array, out: int) -> tuple[jax.Array, jax.Array]:
  """Undoes `interleave`: two `[..., F, in]`, F = `out`."""
  *lead, _, cols = rows.shape
  x = rows[..., : 2 * out, :].reshape(*lead, out, 2, cols)
  return x[..., 0, :], x[..., 1, :]
