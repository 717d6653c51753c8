"""How layers and LM head are stored: the one table of formats.

A format says what is in a chunk: bfloat16 itself, or codes of 8 or 4 bits in the
order in which threads take them to the tensor core, and beside them the scales of
the chunk's rows. Everything else, ring, schedule and barriers, is the same.
"""

import dataclasses

from pallas_kernels.geometry import (
  CHUNK_BYTES,
  CHUNK_COLS,
  CHUNK_WIDTH,
  TILE,
)

# A row of the ring's slots, and of scales.
ROW_BYTES = 128
# Of a thread's 16 bytes of codes, all of one row or the one 8 below.
PIECE_BYTES = 16
# Columns that one `wgmma` takes.
STEP_COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class Format:
  """One way to store a matrix.

  Attributes:
    bits: of a weight: 16, which is bfloat16, 8 or 4.
    is_float: whether a code of 8 bits is a float8_e4m3fn, or an integer.
    group: columns that share a scale, or None for a whole row.
    scale: dtype of the scales: float16, bfloat16, or float32, with nothing
      beside it.
    beside: what there is beside each scale: `zero`, an integer that codes are
      counted from, `minimum`, of the scale's dtype, which is added; or None.
  """

  bits: int = 16
  is_float: bool = False
  group: int | None = None
  scale: str = "bfloat16"
  beside: str | None = None

  @property
  def is_packed(self) -> bool:
    """Whether weights are codes."""
    return self.bits < 16

  @property
  def tile_bytes(self) -> int:
    """Bytes of 64 rows of 128 codes."""
    return TILE * CHUNK_COLS * self.bits // 8

  @property
  def piece_columns(self) -> int:
    """Columns of which a thread has its codes in 16 bytes: 8 of each 16."""
    return PIECE_BYTES * 8 // self.bits // 8 * STEP_COLUMNS

  @property
  def entry_bytes(self) -> int:
    """Bytes of a scale and of what is beside it."""
    return 4 if self.beside or self.scale == "float32" else 2

  def tiles(self, cols: int) -> int:
    """Returns how many times 128 columns of each segment are in a chunk.

    As many as fit in a slot, if that many divide a matrix of `cols` columns.
    """
    most = CHUNK_BYTES // self.tile_bytes
    return max(n for n in range(1, most + 1) if cols // CHUNK_WIDTH % n == 0)

  def chunk_rows(self, tiles: int) -> int:
    """Returns how many of the ring's rows a chunk takes."""
    return tiles * self.tile_bytes // ROW_BYTES

  def span(self, tiles: int) -> int:
    """Returns how many of a chunk's columns share a scale."""
    return min(self.group or tiles * CHUNK_COLS, CHUNK_COLS * tiles)

  def num_spans(self, tiles: int) -> int:
    """Returns how many scales a row of a chunk has."""
    return tiles * CHUNK_COLS // self.span(tiles)

  def scale_rows(self, tiles: int) -> int:
    """Returns how many rows of 32 int32 the scales of a chunk take."""
    return TILE * self.num_spans(tiles) * self.entry_bytes // ROW_BYTES


BF16 = Format()
