"""Weights in the order in which the kernel streams them.

`[out, in]` matrices become chunks `[..., P, n, 128, 64]` bfloat16: CTA p reads
its n chunks from front to back. Rows and columns are padded with zeros. What
packs and what unpacks are inverses bit for bit, NaNs included.

Rows are permuted where the results of two rows meet: 32 rows of one kind, then
the 32 that they meet, in every tile of 64. Those are the two halves of a head,
for rope, and gate and up.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.geometry import CHUNK_COLS, CHUNK_ROWS, HALF, TILE
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
  tiles, chunks = matmul.num_tiles, matmul.chunks_per_tile
  x = x.reshape(*lead, tiles, TILE, chunks, 2, CHUNK_COLS // 2)
  x = jnp.moveaxis(x, -4, -2)  # tiles, chunks, 2, TILE, 64
  x = x.reshape(*lead, matmul.num_chunks, CHUNK_ROWS, CHUNK_COLS // 2)
  total = matmul.num_ctas * matmul.run
  x = jnp.pad(x, [*pad, (0, total - matmul.num_chunks), (0, 0), (0, 0)])
  x = x.reshape(*lead, matmul.num_ctas, matmul.run, *x.shape[-2:])
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
  tiles, chunks = matmul.num_tiles, matmul.chunks_per_tile
  x = _bits(packed).reshape(*lead, -1, CHUNK_ROWS, CHUNK_COLS // 2)
  x = x[..., : matmul.num_chunks, :, :]
  x = x.reshape(*lead, tiles, chunks, 2, TILE, CHUNK_COLS // 2)
  x = jnp.moveaxis(x, -2, -4)
  x = x.reshape(*lead, matmul.rows, matmul.cols)
  return _weights(x[..., :out, :cols])


def permute_heads(rows: jax.Array, head_dim: int) -> jax.Array:
  """Puts the rows that rope joins into the same tile; `[..., heads H, in]`."""
  *lead, out, cols = rows.shape
  x = rows.reshape(*lead, -1, 2, head_dim // TILE, HALF, cols)
  return jnp.swapaxes(x, -4, -3).reshape(*lead, out, cols)


def unpermute_heads(rows: jax.Array, head_dim: int) -> jax.Array:
  """Undoes `permute_heads`."""
  *lead, out, cols = rows.shape
  x = rows.reshape(*lead, -1, head_dim // TILE, 2, HALF, cols)
  return jnp.swapaxes(x, -4, -3).reshape(*lead, out, cols)


def interleave(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Alternates 32 rows of each; two `[..., F, in]` to `[..., 2 F', in]`.

  F' is F rounded up to a multiple of 32, padded with zeros.
  """
  *lead, out, cols = gate.shape
  pad = [*[(0, 0)] * len(lead), (0, -out % HALF), (0, 0)]
  both = [
    jnp.pad(_bits(x), pad).reshape(*lead, -1, 1, HALF, cols) for x in (gate, up)
  ]
  return _weights(jnp.concatenate(both, axis=-3).reshape(*lead, -1, cols))


def deinterleave(rows: jax.Array, out: int) -> tuple[jax.Array, jax.Array]:
  """Undoes `interleave`: two `[..., out, in]`."""
  *lead, _, cols = rows.shape
  x = rows.reshape(*lead, -1, 2, HALF, cols)
  gate, up = (
    x[..., i, :, :].reshape(*lead, -1, cols)[..., :out, :] for i in (0, 1)
  )
  return gate, up
