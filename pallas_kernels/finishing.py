"""What becomes of a group's sums: residual stream, rope, SwiGLU, logits.

PTX for programs of `threads`. A thread takes one row of the matrix and one
sequence at a time; what there is to do with a result needs at most the next row's,
which the next thread has. All loads of all its rows come before any store, so that
they are under way together.
`interpreter` runs what the programs mean.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels import mosaic, threads
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.plan import GROUP_ROWS
from pallas_kernels.threads import F32_BYTES, Team

_BF16_BYTES = 2
# Angles that a thread loads at once.
PIECE_FLOATS = 4


@dataclasses.dataclass(frozen=True)
class Norm:
  """The factor that a norm has left to the results, see `activations`.

  Attributes:
    num_warps: that have summed up squares.
    hidden_size: D.
    eps: added to the mean square.
  """

  num_warps: int
  hidden_size: int
  eps: float


@dataclasses.dataclass(frozen=True)
class Rows:
  """A group's rows and all sequences.

  Attributes:
    batch: B.
    num_threads: that finish.
    norm: of the results, or None.
  """

  batch: int
  num_threads: int
  norm: Norm | None


@dataclasses.dataclass(frozen=True)
class AddResidual(Rows):
  """Adds results to the residual stream, which is what is sent.

  Attributes:
    residual_stride: rows from sequence to sequence.
  """

  residual_stride: int


@dataclasses.dataclass(frozen=True)
class ApplyRope(Rows):
  """Turns queries and keys; puts a group's even rows before its odd ones.

  Attributes:
    num_turned: pairs of rows that are turned, from the matrix's first one on.
    angles_stride: angles from sequence to sequence.
  """

  num_turned: int
  angles_stride: int


@dataclasses.dataclass(frozen=True)
class ApplySwiglu(Rows):
  """Multiplies `silu` of even rows with odd ones."""


@dataclasses.dataclass(frozen=True)
class KeepBest(Rows):
  """Stores logits; keeps the largest of each lane, the first of equals.

  Attributes:
    vocab_size: rows from there on are no tokens.
  """

  vocab_size: int


@dataclasses.dataclass(frozen=True)
class LoadAngles:
  """Copies a step's angles, the first ones again at the end.

  Attributes:
    batch: B.
    source_batch: sequences that there are angles of.
    source_stride: angles of a sequence.
    target_stride: likewise, in shared memory.
    num_threads: that copy.
  """

  batch: int
  source_batch: int
  source_stride: int
  target_stride: int
  num_threads: int

  @property
  def num_pieces(self) -> int:
    """Of four angles."""
    return 2 * self.batch * self.target_stride // PIECE_FLOATS

  def place(self, t: Any) -> tuple[Any, Any]:
    """Returns where piece t comes from in a step's angles, and where it goes."""
    row_pieces = self.target_stride // PIECE_FLOATS
    row, i = t // row_pieces, t % row_pieces * PIECE_FLOATS
    n, b = row // self.batch, row % self.batch
    source = (n * self.source_batch + b) * self.source_stride
    return source + i % self.source_stride, t * PIECE_FLOATS


def load_angles(team: Team, angles: Ref, step: Index, cos_sin: Ref) -> None:
  """Copies a step's angles to shared memory; the team is to meet.

  Args:
    team: who does.
    angles: `[T, 2, sequences, H / 2]` float32.
    step: which ones.
    cos_sin: `[2, B, more angles]` float32 in shared memory; they begin anew at the
      end.
  """
  _, _, source_batch, source_stride = angles.shape
  what = LoadAngles(
    *(cos_sin.shape[1], source_batch, source_stride, cos_sin.shape[2]),
    team.num_threads,
  )
  threads.run(what, _emit_load_angles, [angles, cos_sin], [], [step])


def add_residual(
  team: Team, sums: Ref, residual: Ref, results: Ref, at: Index
) -> None:
  """Adds a group's results to the residual stream.

  As for all of these, the team has met since the sums were stored, and has to
  before anybody reads what is stored here.

  Args:
    team: who does.
    sums: `[B, 64]` float32 in shared memory.
    residual: `[B, rows]` float32.
    results: `[B, 64]` bfloat16, what is there then.
    at: the group's first row in `residual`.
  """
  what = AddResidual(sums.shape[0], team.num_threads, None, residual.shape[1])
  threads.run(what, _emit_add_residual, [sums, residual, results], [], [at])


def apply_rope(
  team: Team,
  norm: Norm,
  sums: Ref,
  squares: Ref,
  cos_sin: Ref,
  results: Ref,
  pair: Index,
  start: Index,
  num_turned: int,
) -> None:
  """Finishes queries, keys and values.

  Args:
    team: see `add_residual`.
    norm: of the results.
    sums: likewise.
    squares: `[B * warps or more]` float32, sums of squares.
    cos_sin: `[2, B, angles]` float32.
    results: `[B, 64]` bfloat16, first the even rows, then the odd ones.
    pair: the group's first pair of rows in the matrix.
    start: angle of that pair.
    num_turned: pairs that are turned, from the matrix's first one on.
  """
  what = ApplyRope(
    sums.shape[0], team.num_threads, norm, num_turned, cos_sin.shape[2]
  )
  refs = [sums, squares, cos_sin, results]
  threads.run(what, _emit_apply_rope, refs, [], [pair, start])


def apply_swiglu(
  team: Team, norm: Norm, sums: Ref, squares: Ref, results: Ref
) -> None:
  """Finishes gates, in even rows, and what they gate, in odd ones.

  Args:
    team: see `add_residual`.
    norm: of the results.
    sums: likewise.
    squares: see `apply_rope`.
    results: `[B, 64]` bfloat16, of which the first half is written.
  """
  what = ApplySwiglu(sums.shape[0], team.num_threads, norm)
  threads.run(what, _emit_apply_swiglu, [sums, squares, results], [], [])


def keep_best(
  team: Team,
  norm: Norm,
  sums: Ref,
  squares: Ref,
  results: Ref,
  best: Ref,
  row: Index,
  num_rows: Index,
  vocab_size: int,
) -> None:
  """Finishes logits.

  Args:
    team: see `add_residual`.
    norm: of the results.
    sums: likewise.
    squares: see `apply_rope`.
    results: `[B, 64]` float32.
    best: `[2 B, 64]` float32, each lane's largest logits and their indices.
    row: the group's first one.
    num_rows: how many rows it has.
    vocab_size: rows from there on are no tokens.
  """
  what = KeepBest(sums.shape[0], team.num_threads, norm, vocab_size)
  refs = [sums, squares, results, best]
  threads.run(what, _emit_keep_best, refs, [], [row, num_rows])


# ---- what the threads do ---------------------------------------------------


class _Program:
  """Lines of PTX of all of a thread's rows, and their operands.

  For each row n there are the result `y{n}`, whether there is one, `p{n}`, and
  scratch: floats `a{n}`, `o{n}` and `z{n}`, of bits `m{n}` and `k{n}`, predicate
  `q{n}`.
  """

  def __init__(self, what: Rows, sums: Any, squares: Any = None):
    self.operands: list[Any] = []
    self.load: list[str] = []
    self.compute: list[str] = []
    self.store: list[str] = []
    # Of each turn: n, sequence and row.
    self.rows = []
    norm = what.norm
    count = what.batch * GROUP_ROWS
    for n, t in enumerate(threads.turns(count, what.num_threads, guarded=True)):
      there = t < count
      if count % what.num_threads:
        # Who has nothing to do reads the first row.
        t = t * there
      b, row = t // GROUP_ROWS, t % GROUP_ROWS
      self.rows.append((n, b, row))
      self.load.append(
        f".reg .pred p{n}, q{n}; .reg .f32 y{n}, a{n}, o{n}, z{n};"
        f" .reg .b32 m{n}; .reg .b16 k{n};"
        f" setp.ne.b32 p{n}, {self.operand(there)}, 0;"
        f" ld.shared.f32 y{n}, [{self.operand(sums.plus(t, F32_BYTES))}];"
      )
      if norm is None:
        continue
      first = self.operand(squares.plus(b * norm.num_warps, F32_BYTES))
      names = [f"s{n}_{w}" for w in range(norm.num_warps)]
      self.load.append(f".reg .f32 {', '.join(names)};")
      for w in range(0, norm.num_warps, 4):
        self.load.append(
          f"ld.shared.v4.f32 {{{', '.join(names[w : w + 4])}}},"
          f" [{first} + {w * F32_BYTES}];"
        )
      self.compute.append(
        " ".join(f"add.f32 {names[0]}, {names[0]}, {x};" for x in names[1:])
        + f" fma.rn.f32 a{n}, {names[0]}, {threads.f32(1 / norm.hidden_size)},"
        f" {threads.f32(norm.eps)}; rsqrt.approx.f32 a{n}, a{n};"
        f" mul.f32 y{n}, y{n}, a{n};"
      )

  def operand(self, value: Any) -> str:
    """Returns the name of an operand."""
    self.operands.append(value)
    return f"${len(self.operands) - 1}"

  def partner(self, n: int) -> str:
    """Returns PTX that puts the pair's other row into `o{n}`."""
    return threads.exchange(f"o{n}", f"y{n}", 1, f"m{n}")

  def store_bf16(self, n: int, value: str, address: Any) -> None:
    """Stores a row's value, rounded."""
    self.store.append(
      f"cvt.rn.bf16.f32 k{n}, {value};"
      f" @p{n} st.shared.b16 [{self.operand(address)}], k{n};"
    )

  def emit(self) -> None:
    """Emits them."""
    code = " ".join(["{", *self.load, *self.compute, *self.store, "}"])
    mosaic.asm(code, *self.operands)


def _emit_load_angles(
  what: LoadAngles, angles: Any, cos_sin: Any, step: Any
) -> None:
  step_angles = 2 * what.source_batch * what.source_stride
  load, store = [], []
  operands: list[Any] = []
  count = what.num_pieces
  for n, t in enumerate(threads.turns(count, what.num_threads, guarded=True)):
    there = t < count
    # Who has nothing to do reads the first ones.
    source, target = what.place(t * there)
    k = len(operands)
    operands += [
      angles.plus(step * step_angles + source, F32_BYTES),
      cos_sin.plus(target, F32_BYTES),
      there,
    ]
    values = f"{{a{n}, b{n}, c{n}, d{n}}}"
    load.append(
      f".reg .pred p{n}; .reg .f32 a{n}, b{n}, c{n}, d{n};"
      f" setp.ne.b32 p{n}, ${k + 2}, 0; ld.global.nc.v4.f32 {values}, [${k}];"
    )
    store.append(f"@p{n} st.shared.v4.f32 [${k + 1}], {values};")
  mosaic.asm(" ".join(["{", *load, *store, "}"]), *operands)


def _emit_add_residual(
  what: AddResidual, sums: Any, residual: Any, results: Any, at: Any
) -> None:
  program = _Program(what, sums)
  for n, b, row in program.rows:
    index = b * what.residual_stride + at + row
    address = program.operand(residual.plus(index, F32_BYTES))
    program.load.append(f"ld.shared.f32 z{n}, [{address}];")
    program.compute.append(f"add.f32 y{n}, y{n}, z{n};")
    program.store.append(f"@p{n} st.shared.f32 [{address}], y{n};")
    target = results.plus(b * GROUP_ROWS + row, _BF16_BYTES)
    program.store_bf16(n, f"y{n}", target)
  program.emit()


def _emit_apply_rope(
  what: ApplyRope,
  sums: Any,
  squares: Any,
  cos_sin: Any,
  results: Any,
  pair: Any,
  start: Any,
) -> None:
  program = _Program(what, sums, squares)
  for n, b, row in program.rows:
    half, odd = row // 2, row % 2
    angle = b * what.angles_stride + start + half
    cos = program.operand(cos_sin.plus(angle, F32_BYTES))
    sin_bytes = what.batch * what.angles_stride * F32_BYTES
    turned = program.operand(pair + half < what.num_turned)
    is_odd = program.operand(odd)
    program.load.append(
      f".reg .f32 cos{n}, sin{n}; ld.shared.f32 cos{n}, [{cos}];"
      f" ld.shared.f32 sin{n}, [{cos} + {sin_bytes}];"
    )
    program.compute.append(
      f"setp.ne.b32 q{n}, {turned}, 0;"
      f" selp.f32 cos{n}, cos{n}, {threads.f32(1)}, q{n};"
      f" selp.f32 sin{n}, sin{n}, {threads.f32(0)}, q{n};"
      f" setp.ne.b32 q{n}, {is_odd}, 0; neg.f32 z{n}, sin{n};"
      f" selp.f32 sin{n}, sin{n}, z{n}, q{n};"
      f" {program.partner(n)}"
      f" mul.f32 z{n}, y{n}, cos{n}; fma.rn.f32 z{n}, o{n}, sin{n}, z{n};"
    )
    index = b * GROUP_ROWS + odd * (GROUP_ROWS // 2) + half
    program.store_bf16(n, f"z{n}", results.plus(index, _BF16_BYTES))
  program.emit()


def _emit_apply_swiglu(
  what: ApplySwiglu, sums: Any, squares: Any, results: Any
) -> None:
  program = _Program(what, sums, squares)
  for n, b, row in program.rows:
    is_odd = program.operand(row % 2)
    program.compute.append(
      f"{program.partner(n)} mul.f32 z{n}, y{n}, {threads.f32(-math.log2(math.e))};"
      f" ex2.approx.ftz.f32 z{n}, z{n}; add.f32 z{n}, z{n}, {threads.f32(1)};"
      f" rcp.approx.ftz.f32 z{n}, z{n}; mul.f32 z{n}, z{n}, y{n};"
      f" mul.f32 z{n}, z{n}, o{n};"
      f" setp.eq.and.b32 p{n}, {is_odd}, 0, p{n};"
    )
    index = b * GROUP_ROWS + row // 2
    program.store_bf16(n, f"z{n}", results.plus(index, _BF16_BYTES))
  program.emit()


def _emit_keep_best(
  what: KeepBest,
  sums: Any,
  squares: Any,
  results: Any,
  best: Any,
  first: Any,
  num_rows: Any,
) -> None:
  program = _Program(what, sums, squares)
  index_bytes = what.batch * GROUP_ROWS * F32_BYTES
  for n, b, row in program.rows:
    at = b * GROUP_ROWS + row
    kept = program.operand(best.plus(at, F32_BYTES))
    target = program.operand(results.plus(at, F32_BYTES))
    index = first + row
    real = program.operand((index < what.vocab_size) & (row < num_rows))
    program.load.append(f"ld.shared.f32 z{n}, [{kept}];")
    program.compute.append(
      f"setp.ne.and.b32 q{n}, {real}, 0, p{n};"
      f" setp.gt.and.f32 q{n}, y{n}, z{n}, q{n};"
      f" cvt.rn.f32.s32 o{n}, {program.operand(index)};"
    )
    # Rows come in ascending order: the first of equals stays.
    program.store.append(
      f"@p{n} st.shared.f32 [{target}], y{n};"
      f" @q{n} st.shared.f32 [{kept}], y{n};"
      f" @q{n} st.shared.f32 [{kept} + {index_bytes}], o{n};"
    )
  program.emit()
