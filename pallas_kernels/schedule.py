"""Which CTA multiplies which part of which matrix, in which order.

Every matrix is cut into tiles of 64 rows and each tile into chunks of 128
columns. The chunks of a matrix, tile after tile, are dealt out in runs of equal
length: CTA c streams chunks `[c n, (c + 1) n)`. A tile that ends up in several
runs is owned by the CTA that has its first chunk; the others hand it their
partial sums, which it adds in the order of their columns.

The kernel and the emulator both follow this module, so that neither can follow
a schedule of its own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.geometry import CHUNK_COLS, TILE, Geometry

# Runs may be this much longer than even ones if fewer tiles are cut for it:
# memory, not the number of CTAs that pull, is the limit.
_SLACK = 1.07
# A KV head's tiles of 64 keys go to one more CTA for each that many.
MIN_TILES_PER_SPLIT = 4


@dataclasses.dataclass(frozen=True)
class Matmul:
  """One matrix of the step, as it is dealt out.

  Attributes:
    name: of the phase.
    rows: padded to whole tiles.
    cols: padded to whole chunks.
    num_ctas: P.
  """

  name: str
  rows: int
  cols: int
  num_ctas: int

  @property
  def num_tiles(self) -> int:
    """Tiles of 64 rows."""
    return self.rows // TILE

  @property
  def chunks_per_tile(self) -> int:
    """Chunks of 128 columns in a tile."""
    return self.cols // CHUNK_COLS

  @property
  def num_chunks(self) -> int:
    """Chunks in the matrix."""
    return self.num_tiles * self.chunks_per_tile

  @functools.cached_property
  def run(self) -> int:
    """Length n of a CTA's run of chunks; the last runs may be shorter.

    Of the lengths that are at most `_SLACK` times even, the one that cuts the
    fewest tiles.
    """
    even = -(-self.num_chunks // self.num_ctas)
    most = max(even, int(self.num_chunks * _SLACK / self.num_ctas))
    return min(range(even, most + 1), key=lambda n: (self._num_cuts(n), n))

  def _num_cuts(self, run: int) -> int:
    starts = range(run, self.num_chunks, run)
    return sum(start % self.chunks_per_tile != 0 for start in starts)

  @property
  def num_owners(self) -> int:
    """CTAs that own a tile, and therefore publish results."""
    firsts = range(0, self.num_chunks, self.chunks_per_tile)
    return len({first // self.run for first in firsts})

  def table(self) -> np.ndarray:
    """Returns each CTA's run, `[P, 3]` int32.

    The columns: first chunk, number of chunks, and number of other CTAs that
    contribute to the last tile if this CTA owns it.
    """
    first = np.minimum(np.arange(self.num_ctas) * self.run, self.num_chunks)
    count = np.minimum(self.run, self.num_chunks - first)
    end = first + count
    last_tile = (end - 1) // self.chunks_per_tile
    owns = (count > 0) & (last_tile * self.chunks_per_tile >= first)
    tile_end = (last_tile + 1) * self.chunks_per_tile
    joins = -(-(tile_end - end) // self.run)
    return np.stack([first, count, np.where(owns, joins, 0)], 1).astype(
      np.int32
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The matrices of a step in the order of the stream.

  Attributes:
    qkv: query, key and value projections, of every layer.
    o: output projection.
    gate_up: gate and up projections.
    down: down projection.
    lm_head: once, after the layers.
  """

  qkv: Matmul
  o: Matmul
  gate_up: Matmul
  down: Matmul
  lm_head: Matmul

  @property
  def matmuls(self) -> tuple[Matmul, ...]:
    """All of them, in the order of the table's second axis."""
    return (self.qkv, self.o, self.gate_up, self.down, self.lm_head)

  def table(self) -> np.ndarray:
    """Returns `[P, 5, 3]` int32, see `Matmul.table`."""
    return np.stack([m.table() for m in self.matmuls], axis=1)


def make_schedule(geometry: Geometry, num_ctas: int) -> Schedule:
  """Deals the matrices of a model out to `num_ctas` CTAs."""
  g = geometry
  d, a = g.padded_hidden_size, g.padded_attention_size
  f = g.padded_intermediate_size
  sizes = dict(
    qkv=(g.num_qkv_heads * g.head_dim, d),
    o=(d, a),
    gate_up=(2 * f, d),
    down=(d, f),
    lm_head=(g.padded_vocab_size, d),
  )
  return Schedule(
    **{
      name: Matmul(name, rows, cols, num_ctas)
      for name, (rows, cols) in sizes.items()
    }
  )


def max_splits(geometry: Geometry, batch: int, num_ctas: int) -> int:
  """Returns into how many parts the keys of one KV head may be cut."""
  return max(1, num_ctas // (batch * geometry.num_key_value_heads))


def _minimum(x: Any, y: Any) -> Any:
  # The kernel and strict promotion want JAX's, the host its own integers.
  return jnp.minimum(x, y) if isinstance(x, jax.Array) else np.minimum(x, y)


def split_of(position: Any, split: Any, most: int) -> tuple[Any, Any, Any, Any]:
  """Returns which tiles of 64 keys one split attends to.

  Args:
    position: int32 scalar, position of the new token: keys `[0, position]`.
    split: int32 scalar in `[0, most)`.
    most: from `max_splits`.

  Returns:
    `(first, last + 1, number of tiles, number of splits)`; first is not below
    last + 1 if there is nothing for this split.
  """
  tiles = position // TILE + 1
  wanted = -(-tiles // MIN_TILES_PER_SPLIT)
  wanted = _minimum(wanted, most)
  per_split = -(-tiles // wanted)
  num_splits = -(-tiles // per_split)
  first = split * per_split
  end = _minimum(first + per_split, tiles)
  return first, end, tiles, num_splits
