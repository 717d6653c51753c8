"""Which CTA multiplies which part of which matrix, in which order.

Every matrix is cut into units of 8 rows, dealt out in runs of equal length: CTA
c takes units `[c n, (c + 1) n)`, or as many of them as there are. A unit's
chunks cover all columns, so that no sum has parts in two CTAs.

The kernel and the emulator both follow this module, so that neither can follow
a schedule of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import BF16, Format
from pallas_kernels.geometry import (
  CHUNK_WIDTH,
  TILE,
  UNIT_ROWS,
  Geometry,
  round_up,
)
from pallas_kernels.tuning import TILES_AT_ONCE


@dataclasses.dataclass(frozen=True)
class Matmul:
  """One matrix of the step, as it is dealt out.

  Attributes:
    name: of the phase.
    rows: padded to whole units.
    cols: padded to whole chunks.
    num_ctas: P.
    format: how it is stored.
  """

  name: str
  rows: int
  cols: int
  num_ctas: int
  format: Format = BF16

  @property
  def num_units(self) -> int:
    """Units of 8 rows."""
    return self.rows // UNIT_ROWS

  @property
  def tiles(self) -> int:
    """How many times 128 columns of each segment are in a chunk."""
    return self.format.tiles(self.cols)

  @property
  def chunks_per_unit(self) -> int:
    """Chunks of all columns of 8 rows."""
    return self.cols // (CHUNK_WIDTH * self.tiles)

  @property
  def run(self) -> int:
    """Most units that a CTA has; the last runs may be shorter, or empty."""
    return -(-self.num_units // self.num_ctas)

  @property
  def run_chunks(self) -> int:
    """Most chunks that a CTA has, n."""
    return self.run * self.chunks_per_unit

  def table(self) -> np.ndarray:
    """Returns each CTA's run, `[P, 2]` int32: first unit, number of units."""
    first = np.minimum(np.arange(self.num_ctas) * self.run, self.num_units)
    count = np.minimum(self.run, self.num_units - first)
    return np.stack([first, count], 1).astype(np.int32)


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
    """Returns `[P, 5, 2]` int32, see `Matmul.table`."""
    return np.stack([m.table() for m in self.matmuls], axis=1)


def make_schedule(
  geometry: Geometry,
  num_ctas: int,
  layer_format: Format = BF16,
  head_format: Format = BF16,
) -> Schedule:
  """Deals the matrices of a model out to `num_ctas` CTAs.

  Args:
    geometry: the model.
    num_ctas: P.
    layer_format: how the layers' matrices are stored.
    head_format: how the LM head is.
  """
  g = geometry
  d = g.padded_hidden_size
  sizes = dict(
    qkv=(g.num_qkv_heads * g.head_dim, d),
    o=(g.hidden_rows, round_up(g.attention_size, CHUNK_WIDTH)),
    gate_up=(g.gate_up_rows, d),
    down=(g.hidden_rows, round_up(g.gate_up_rows // 2, CHUNK_WIDTH)),
    lm_head=(g.vocab_rows, d),
  )
  return Schedule(
    **{
      name: Matmul(
        name,
        rows,
        cols,
        num_ctas,
        head_format if name == "lm_head" else layer_format,
      )
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

  A round takes about as long for one tile as for four, and a split that does
  not save a round only costs: its part must be sent and merged. On an H100 a
  round is expected to take 1.1 us, and parts 0.8 us for every few (not timed one
  by one, and counted here for heads of 64, of which 5 parts are few). So there
  are as few rounds as the CTAs allow, then as few splits as do with these, and
  those are even: with 8 KV heads on 132 CTAs, 1 split up to 4 tiles, 2 of 4
  for 8, 16 of 4 for 64 (3 batches of parts, 3.5 us), 9 of 8 for 65 (2 batches,
  3.8 us, where 13 of 5 would be 4.6 us), 16 of 8 for 128.

  Args:
    position: int32 scalar, position of the new token: keys `[0, position]`.
    split: int32 scalar in `[0, most)`.
    most: from `Plan.splits`.

  Returns:
    `(first, last + 1, number of tiles, number of splits)`; first is not below
    last + 1 if there is nothing for this split.
  """

  def divide_up(x: Any, y: Any) -> Any:
    # A warp by itself knows no negative numbers.
    return (x + y - 1) // y

  tiles = position // TILE + 1
  fewest = divide_up(tiles, most)
  most_tiles = divide_up(fewest, TILES_AT_ONCE) * TILES_AT_ONCE
  per_split = divide_up(tiles, divide_up(tiles, most_tiles))
  num_splits = divide_up(tiles, per_split)
  first = split * per_split
  end = _minimum(first + per_split, tiles)
  return first, end, tiles, num_splits
