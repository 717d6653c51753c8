"""Tokens' rows of the packed embedding, to x and to the residual stream."""

import dataclasses
from collections.abc import Sequence
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
  """Takes rows of the packed embedding to x, and some of each to the residual.

  Attributes:
    num_sequences: how many rows.
    unit_chunks: chunks that a row lies in.
    sequence_bytes: from sequence to sequence in x.
    num_columns: how many go to the residual.
    num_threads: that do it.
  """

  num_sequences: int
  unit_chunks: int
  sequence_bytes: int
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
  firsts: Sequence[Index],
  x: Ref,
  sequence_bytes: int,
  gain: gains.Gain,
  residual: Ref,
  b: Index,
  start: Index,
  *,
  unit_chunks: int,
) -> None:
  """Looks up tokens: x gets their rows, and the residual stream a part of each.

  All loads are under way at once. Whoever reads these has to meet the team, or to
  commit, first.

  Args:
    team: who does it.
    embedding: `[P, n, 128, 64]` bfloat16, packed.
    firsts: for each token, the element where its row's first segment begins.
    x: the operand of `wgmma`.
    sequence_bytes: from sequence to sequence there.
    gain: of the norm that follows.
    residual: `[B, columns]` float32 in shared memory.
    b: the first token's sequence; the others' follow.
    start: the first column that goes to the residual.
    unit_chunks: see `Embed`.
  """
  norms, norm, squares, square = gain
  what = Embed(
    *(len(firsts), unit_chunks, sequence_bytes),
    *(residual.shape[1], team.num_threads),
  )
  refs = [embedding, norms, squares, residual]
  numbers = [norm, square, b, start, *firsts]
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
  b: Any,
  start: Any,
  *firsts: Any,
) -> None:
  load, store = ["{", gains.SCRATCH], []
  operands: list[Any] = []
  # Without this, every thread has something to do in every turn.
  partial = what.num_pieces % what.num_threads != 0
  for n, t in enumerate(
    threads.turns(what.num_pieces, what.num_threads, guarded=True)
  ):
    there = t < what.num_pieces
    inside = ""
    if partial:
      # Who has nothing to do reads the first piece, which then counts nothing.
      t = t * there
      inside = f"@in{n} "
      load.append(f".reg .pred in{n}; setp.ne.b32 in{n}, ${len(operands)}, 0;")
      operands.append(there)
    element, byte = what.piece(t)
    gain = norm * (what.num_pieces * PIECE_COLUMNS) + t * PIECE_COLUMNS
    load.append(gains.load_gain(n, len(operands)))
    operands.append(norms.plus(gain, F32_BYTES))
    for k, first in enumerate(firsts):
      at = n * what.num_sequences + k
      registers = ", ".join(f"w{at}_{j}" for j in range(4))
      load.append(
        f".reg .b32 {registers};"
        f" ld.global.nc.v4.b32 {{{registers}}}, [${len(operands)}];"
      )
      if partial:
        store += [f"@!in{n} mov.b32 w{at}_{j}, 0;" for j in range(4)]
      store.append(gains.apply_gain(at, n, k))
      store.append(
        f"{inside}st.shared.v4.b32 [${len(operands) + 1}], {{{registers}}};"
      )
      operands += [
        embedding.plus(first + element, 2),
        x.plus((b + k) * what.sequence_bytes + byte, 1),
      ]
  for n, t in enumerate(
    threads.turns(what.num_columns, what.num_threads, guarded=True)
  ):
    for k, first in enumerate(firsts):
      there, element = what.residual(t, start)
      name, at = f"{n}_{k}", len(operands)
      load.append(
        f".reg .pred p{name}; .reg .b16 h{name}; mov.b16 h{name}, 0;"
        f" setp.ne.b32 p{name}, ${at}, 0;"
        f" @p{name} ld.global.nc.b16 h{name}, [${at + 1}];"
      )
      store.append(
        f"mov.b16 z, 0; mov.b32 m, {{z, h{name}}};"
        f" @p{name} st.shared.b32 [${at + 2}], m;"
      )
      operands += [
        there,
        embedding.plus(first + element, 2),
        residual.plus((b + k) * what.num_columns + t, F32_BYTES),
      ]
  load.append(".reg .b16 z;")
  count = what.num_sequences
  load.append(gains.begin_squares(count))
  store.append(gains.store_squares(count, len(operands)))
  operands += gains.squares_of(squares, square, count, what.num_threads)
  mosaic.asm(" ".join([*load, *store, "}"]), *operands)
