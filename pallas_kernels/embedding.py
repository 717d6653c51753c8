"""A token's row of the packed embedding, to x and to the residual stream."""

import dataclasses
from typing import Any

from pallas_kernels import gains, mosaic, threads
from pallas_kernels.geometry import CHUNK_COLS, CHUNK_ROWS, SEGMENTS, TILE
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.threads import (
  F32_BYTES,
  PIECE_BYTES,
  PIECE_COLUMNS,
  Team,
  tiled_byte,
)


@dataclasses.dataclass(frozen=True)
class Embed:
  """Takes a row of the packed embedding to x, and some of it to the residual.

  Attributes:
    unit_chunks: chunks that a row lies in.
    num_columns: how many go to the residual.
    num_threads: that do it.
  """

  unit_chunks: int
  num_columns: int
  num_threads: int

  @property
  def segment(self) -> int:
    """Columns of a segment."""
    return self.unit_chunks * CHUNK_COLS

  @property
  def num_pieces(self) -> int:
    """Pieces of 16 bytes, 8 columns, in a row."""
    return SEGMENTS * self.segment // PIECE_COLUMNS

  def _element(self, segment: Any, column: Any) -> Any:
    """Returns where in the unit's first row a column of a segment is."""
    half = CHUNK_COLS // 2
    chunk, within = column // CHUNK_COLS, column % CHUNK_COLS
    row = chunk * CHUNK_ROWS + within // half * TILE + segment
    return row * half + within % half

  def piece(self, t: Any) -> tuple[Any, Any]:
    """Returns the element where piece t begins, and its byte in x."""
    row_pieces = self.segment // PIECE_COLUMNS
    row, i = t // row_pieces, t % row_pieces
    return (
      self._element(row, i * PIECE_COLUMNS),
      tiled_byte(row, i * PIECE_BYTES),
    )

  def residual(self, t: Any, start: Any) -> tuple[Any, Any]:
    """Returns whether there is a column `start` + t, and its element."""
    column = start + t
    row, within = column // self.segment, column % self.segment
    there = (t < self.num_columns) & (row < SEGMENTS)
    return there, self._element(row, within)


def embed(
  team: Team,
  embedding: Ref,
  first: Index,
  x: Ref,
  offset_bytes: Index,
  gain: gains.Gain,
  residual: Ref,
  start: Index,
  *,
  unit_chunks: int,
) -> None:
  """Looks up a token: x gets its row, and the residual stream a part of it.

  Whoever reads these has to meet the team, or to commit, first.

  Args:
    team: who does it.
    embedding: `[P, n, 128, 64]` bfloat16, packed.
    first: element where the first segment of the token's row begins.
    x: the operand of `wgmma`.
    offset_bytes: where in it the sequence begins.
    gain: of the norm that follows.
    residual: `[columns]` float32 in shared memory.
    start: the first column that goes there.
    unit_chunks: see `Embed`.
  """
  norms, norm, squares, square = gain
  what = Embed(unit_chunks, residual.shape[0], team.num_threads)
  refs = [embedding, norms, squares, residual]
  numbers = [norm, square, first, offset_bytes, start]
  threads.run(what, _emit_embed, refs, [x], numbers)


def _emit_embed(
  what: Embed,
  embedding: Any,
  norms: Any,
  squares: Any,
  residual: Any,
  x: Any,
  norm: Any,
  square: Any,
  first: Any,
  offset_bytes: Any,
  start: Any,
) -> None:
  code = [
    "{",
    gains.SCRATCH,
    ".reg .f32 ss0; mov.f32 ss0, 0f00000000;",
  ]
  operands: list[Any] = []
  # Without this, every thread has something to do in every turn.
  partial = what.num_pieces % what.num_threads != 0
  for n, t in enumerate(
    threads.turns(what.num_pieces, what.num_threads, guarded=True)
  ):
    there = t < what.num_pieces
    if partial:
      # Who has nothing to do reads the first piece, which then counts nothing.
      t = t * there
    element, byte = what.piece(t)
    gain = norm * (what.num_pieces * PIECE_COLUMNS) + t * PIECE_COLUMNS
    k = len(operands)
    operands += [
      embedding.plus(first + element, 2),
      x.plus(byte + offset_bytes, 1),
      norms.plus(gain, F32_BYTES),
    ]
    registers = ", ".join(f"w{n}_{j}" for j in range(4))
    code.append(
      f".reg .b32 {registers}; ld.global.nc.v4.b32 {{{registers}}}, [${k}];"
    )
    if partial:
      operands.append(there)
      code.append(f".reg .pred in{n}; setp.ne.b32 in{n}, ${k + 3}, 0;")
      code += [f"@!in{n} mov.b32 w{n}_{j}, 0;" for j in range(4)]
    code += [
      gains.load_gain(n, k + 2),
      gains.apply_gain(n, n, 0),
      f"{f'@in{n} ' if partial else ''}st.shared.v4.b32 [${k + 1}],"
      f" {{{registers}}};",
    ]
  code += [gains.store_squares(0, len(operands)), "}"]
  mosaic.asm(
    " ".join(code),
    *operands,
    gains.squares_of(squares, square, 0, what.num_threads),
  )
  for t in threads.turns(what.num_columns, what.num_threads, guarded=True):
    there, element = what.residual(t, start)
    mosaic.asm(
      "{ .reg .pred p; .reg .b16 h, z; .reg .b32 w; setp.ne.b32 p, $2, 0;"
      " mov.b16 h, 0; mov.b16 z, 0; @p ld.global.nc.b16 h, [$0];"
      " mov.b32 w, {z, h}; @p st.shared.b32 [$1], w; }",
      embedding.plus(first + element, 2),
      residual.plus(t, F32_BYTES),
      there,
    )
