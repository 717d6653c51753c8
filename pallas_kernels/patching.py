"""The newest key and value, among the keys of the ring's last tile."""

import dataclasses
from typing import Any

from pallas_kernels import mosaic, threads
from pallas_kernels.geometry import TILE
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.threads import PIECE_BYTES, TILE_ROW_BYTES, swizzled_byte


@dataclasses.dataclass(frozen=True)
class Patch:
  """Puts a new key and value among the 64 of a tile; clears later values.

  What lies beyond the new token may be anything, and a value that is NaN would
  still be NaN times 0. Keys need no clearing: their scores are masked.

  Attributes:
    head_dim: H.
  """

  head_dim: int

  @property
  def num_pieces(self) -> int:
    """Pieces of 16 bytes in the new key and value."""
    return 2 * self.head_dim * 2 // PIECE_BYTES

  @property
  def num_cleared(self) -> int:
    """Pieces of 16 bytes in the tile's values."""
    return TILE * self.head_dim * 2 // PIECE_BYTES

  def copied(self, t: Any, k_row: Any, v_row: Any, row: Any) -> tuple[Any, ...]:
    """Returns whether there is such a piece, its place, and where it goes.

    The place is its number in `new`; it goes to a row of the ring and is a
    number in that.
    """
    per_row = TILE_ROW_BYTES // PIECE_BYTES
    block, piece = t // per_row, t % per_row
    blocks = self.head_dim // TILE
    is_value, n = block // blocks, block % blocks
    first = k_row + is_value * (v_row - k_row)
    return t < self.num_pieces, t, first + n * TILE + row, piece

  def cleared(self, t: Any, v_row: Any, row: Any) -> tuple[Any, ...]:
    """Returns whether to clear a piece, and its row and number in the ring."""
    per_row = TILE_ROW_BYTES // PIECE_BYTES
    ring_row, piece = t // per_row, t % per_row
    return row < ring_row % TILE, v_row + ring_row, piece


def patch(
  ring: Ref, new: Ref, k_row: Index, v_row: Index, row: Index, *, head_dim: int
) -> None:
  """Puts `new` into a tile of keys and its values.

  Args:
    ring: `[slots, 128, 64]`, an operand of `wgmma`.
    new: `[2, H]` bfloat16.
    k_row: where in the ring, counted in rows of 64, the tile's keys begin.
    v_row: likewise, its values.
    row: the new one's row in the tile.
    head_dim: H.
  """
  numbers = [k_row, v_row, row]
  threads.run(Patch(head_dim), _emit_patch, [new], [ring], numbers)


def _emit_patch(
  what: Patch, new: Any, ring: Any, k_row: Any, v_row: Any, row: Any
) -> None:
  def place(ring_row: Any, piece: Any) -> Any:
    within = swizzled_byte(ring_row, piece * PIECE_BYTES)
    return ring.plus(ring_row * TILE_ROW_BYTES + within, 1)

  for t in threads.turns(what.num_pieces, guarded=True):
    there, source, ring_row, piece = what.copied(t, k_row, v_row, row)
    mosaic.asm(
      "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $2, 0;"
      " @p ld.shared.v4.b32 {a, b, c, d}, [$0];"
      " @p st.shared.v4.b32 [$1], {a, b, c, d}; }",
      new.plus(source, PIECE_BYTES),
      place(ring_row, piece),
      there,
    )
  for t in threads.turns(what.num_cleared):
    beyond, ring_row, piece = what.cleared(t, v_row, row)
    mosaic.asm(
      "{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ne.b32 p, $1, 0;"
      " @p st.shared.v4.b32 [$0], {z, z, z, z}; }",
      place(ring_row, piece),
      beyond,
    )
