"""Programs of single threads on what they hold of the results of `wgmma`.

Thread t of a warpgroup holds of `[64, 8]` the rows r and r + 8 and the columns
c and c + 1, where r is 16 (t / 32) + t % 32 / 4 and c is 2 (t % 4). Most of what a
thread makes of its own values costs neither shuffles nor shared memory, which sums
and maxima of Pallas go through. Words are read and written as in `words`;
`interpreter` runs what the programs mean.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import mosaic, threads
from pallas_kernels.geometry import SEGMENTS, UNIT_ROWS
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.parts import Part
from pallas_kernels.plan import MASKED, WARPS
from pallas_kernels.threads import (
  F32_BYTES,
  THREADS,
  TILE_BYTES,
  WARP,
  tiled_byte,
)
from pallas_kernels.words import WORD_BYTES

# Values that a thread holds of `[64, 8]`, in two rows.
_VALUES = 4

# Largest scores, sums of weights, and weighted values, `[64, 8]` for each 64 of
# H; all rows of the first two are the same.
State = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class SendPart:
  """Sends a state.

  Attributes:
    part: how.
  """

  part: Part


@dataclasses.dataclass(frozen=True)
class MergeParts:
  """Waits for states and adds them to one, in their order.

  Attributes:
    part: how they come.
  """

  part: Part


@dataclasses.dataclass(frozen=True)
class ReduceRows:
  """Takes the maximum or the sum of all rows.

  Attributes:
    kind: `max` or `add`.
  """

  kind: str


@dataclasses.dataclass(frozen=True)
class StoreOwn:
  """Sums up the products of segments with their own columns, and stores the sums.

  Attributes:
    batch: B; products are `[64, 8 B]`.
    row_values: values of a sequence where they are stored.
    may_add: whether there may be a sum already.
  """

  batch: int
  row_values: int
  may_add: bool

  def column(self, row: Any) -> Any:
    """Returns which of a sequence's 8 columns is a row's own."""
    return row % SEGMENTS


@dataclasses.dataclass(frozen=True)
class StoreWeights:
  """Stores the weights of keys, rounded, as an operand of `wgmma`."""


def send_part(
  words: Ref, first: Index, stamp: Index, state: State, part: Part
) -> None:
  """Sends a state.

  Args:
    words: all words.
    first: the part's first one.
    stamp: theirs.
    state: what to send.
    part: how.
  """
  threads.run(
    SendPart(part), _emit_send, [words], [], [first, stamp], arrays=state
  )


def merge_parts(
  words: Ref,
  first: Index,
  count: Index,
  stamp: Index,
  state: State,
  part: Part,
) -> State:
  """Waits for parts and adds them to a state, in their order.

  Args:
    words: all words.
    first: the first part's first one; the others follow.
    count: how many parts.
    stamp: that their words bear.
    state: of the keys before.
    part: how they come.

  Returns:
    The state of all these keys.
  """
  return threads.run(
    MergeParts(part),
    _emit_merge,
    [words],
    [],
    [first, count, stamp],
    arrays=state,
    num_results=len(state),
  )


def reduce_rows(kind: str, values: jax.Array, scratch: Ref) -> jax.Array:
  """Returns the maximum or the sum of all rows, as each row.

  Between two uses of the scratch, the threads have to meet.

  Args:
    kind: `max` or `add`.
    values: `[64, 8]` float32.
    scratch: `[warps * 8]` float32 in shared memory.
  """
  (found,) = threads.run(
    ReduceRows(kind),
    _emit_reduce,
    [scratch],
    [],
    [],
    arrays=[values],
    num_results=1,
  )
  return found


def store_own(
  products: Sequence[jax.Array], sums: Ref, u: Index, *, adds: Index
) -> None:
  """Sums up the products of rows' segments with their own columns.

  Stores the sums of 8 rows of the matrix, or adds them. Threads are to meet before
  anybody reads them; what is added to, its thread has stored.

  Args:
    products: `[64, 8 B]` float32, or as many `[64, 8]`.
    sums: `[B, rows]` float32 in shared memory.
    u: which 8 rows of it.
    adds: whether there is a sum already; if it is known that there is not, False.
  """
  batch, row_values = sums.shape
  what = StoreOwn(batch, row_values, adds is not False)
  threads.run(
    what,
    _emit_store_own,
    [sums],
    [],
    [u, adds],
    arrays=products,
  )


def store_weights(weights: Sequence[jax.Array], p: Ref) -> None:
  """Stores the weights of tiles of keys, to be committed by the caller.

  Args:
    weights: `[64, 8]` float32 of each tile.
    p: `[8, keys]` bfloat16, an operand of `wgmma`.
  """
  threads.run(
    StoreWeights(),
    _emit_store_weights,
    [],
    [p],
    [],
    arrays=weights,
  )


# ---- what the threads do ---------------------------------------------------


def _place() -> tuple[Any, Any]:
  """Returns this thread's first row and column."""
  t = mosaic.thread_index(THREADS)
  return t // WARP * 16 + t % WARP // 4, t % 4 * 2


def _emit_send(what: SendPart, words: Any, *args: Any) -> list[Any]:
  *state, first, stamp = args
  part = what.part
  row, col = _place()
  real = col < part.group
  most, total, *out = state

  def store(word: Any, values: Sequence[Any], sent: Any) -> None:
    mosaic.asm(
      "{ .reg .pred p; .reg .b64 a, b, c, d; setp.ne.b32 p, $1, 0;"
      " mov.b64 a, {$3, $2}; mov.b64 b, {$4, $2};"
      " mov.b64 c, {$5, $2}; mov.b64 d, {$6, $2};"
      " @p st.relaxed.gpu.global.v2.b64 [$0], {a, b};"
      f" @p st.relaxed.gpu.global.v2.b64 [$0 + {2 * WORD_BYTES}], {{c, d}}; }}",
      words.plus(first + word, WORD_BYTES),
      sent,
      stamp,
      *values,
    )

  for n, values in enumerate(out):
    store(part.value(n, row, col), values, real)
  # One thread of each pair of columns has row 0, and the others the same.
  store(part.most(col), [*most[:2], *total[:2]], real & (row < 1))
  return []


def _emit_merge(what: MergeParts, words: Any, *args: Any) -> list[Any]:
  *state, first, count, stamp = args
  part = what.part
  row, col = _place()
  most, total, *out = state
  # Where a thread's words of a part are, from the first ones on: four of
  # maxima and sums, four of each block.
  blocks = range(part.blocks)
  offsets = [0, *(n * part.block_words for n in blocks)]
  num_words = _VALUES * len(offsets)
  declare, begin, load, check, payloads = [], [], [], [], []
  for j in range(part.at_once):
    declare.append(f".reg .pred p{j};")
    begin.append(f"setp.gt.s32 p{j}, left, {j}; and.pred p{j}, p{j}, real;")
    names = [f"{j}_{k}" for k in range(num_words)]
    payloads.append([f"x{name}" for name in names])
    declare.append(
      f".reg .b64 {', '.join('w' + n for n in names)};"
      f" .reg .f32 {', '.join('x' + n for n in names)};"
    )
    for k, name in enumerate(names):
      # A part that is not there weighs nothing.
      nothing = "masked" if k < 2 else "zero"
      begin.append(f"mov.b64 w{name}, {{{nothing}, stamp}};")
      check.append(
        f"mov.b64 {{x{name}, s}}, w{name}; xor.b32 s, s, stamp;"
        " or.b32 missing, missing, s;"
      )
    for k in range(0, num_words, 2):
      pair = f"{{w{names[k]}, w{names[k + 1]}}}"
      base = "scales" if k < _VALUES else "values"
      word = j * part.num_words + offsets[k // _VALUES] + k % _VALUES
      load.append(
        f"@p{j} ld.relaxed.gpu.global.v2.b64 {pair},"
        f" [{base} + {word * WORD_BYTES}];"
      )
  held = [f"o{k}" for k in range(_VALUES * part.blocks)]
  merge = ["mov.f32 n0, m0; mov.f32 n1, m1;"]
  for x in payloads:
    merge.append(f"max.f32 n0, n0, {x[0]}; max.f32 n1, n1, {x[1]};")
  for k in range(2):
    merge.append(
      f"sub.f32 f{k}, m{k}, n{k}; ex2.approx.ftz.f32 f{k}, f{k};"
      f" mov.f32 m{k}, n{k}; mul.f32 t{k}, t{k}, f{k};"
    )
  merge += [f"mul.f32 {o}, {o}, f{k % 2};" for k, o in enumerate(held)]
  for x in payloads:
    for k in range(2):
      merge.append(
        f"sub.f32 f{k}, {x[k]}, n{k}; ex2.approx.ftz.f32 f{k}, f{k};"
        f" fma.rn.f32 t{k}, {x[2 + k]}, f{k}, t{k};"
      )
    merge += [
      f"fma.rn.f32 {o}, {x[_VALUES + k]}, f{k % 2}, {o};"
      for k, o in enumerate(held)
    ]
  results = ["m0", "m1", "t0", "t1", *held]
  inputs = [*most[:2], *total[:2], *(x for values in out for x in values)]
  num, at = len(results), 2 * len(results)
  stride = part.at_once * part.num_words * WORD_BYTES
  found = mosaic.asm(
    " ".join(
      [
        "{ .reg .pred again, none, real; .reg .b64 scales, values;"
        " .reg .b32 left, stamp, missing, s, zero, masked;",
        f".reg .f32 {', '.join(results)}, n0, n1, f0, f1;",
        *declare,
        *(f"mov.f32 {x}, ${num + k};" for k, x in enumerate(results)),
        f"mov.b64 scales, ${at}; mov.b64 values, ${at + 1};",
        f"setp.ne.b32 real, ${at + 2}, 0;",
        f"mov.b32 left, ${at + 3}; mov.b32 stamp, ${at + 4};",
        f"mov.b32 zero, 0; mov.b32 masked, {np.float32(MASKED).view('u4')};",
        "next_${:uid}: setp.le.s32 none, left, 0; @none bra done_${:uid};",
        *begin,
        "poll_${:uid}: mov.b32 missing, 0;",
        *load,
        *check,
        "setp.ne.b32 again, missing, 0; @again bra poll_${:uid};",
        *merge,
        f"add.s64 scales, scales, {stride}; add.s64 values, values, {stride};",
        f"sub.s32 left, left, {part.at_once}; bra next_${{:uid}};",
        "done_${:uid}:",
        *(f"mov.f32 ${k}, {x};" for k, x in enumerate(results)),
        "}",
      ]
    ),
    *inputs,
    words.plus(first + part.most(col), WORD_BYTES),
    words.plus(first + part.value(0, row, col), WORD_BYTES),
    col < part.group,
    count,
    stamp,
    num_f32_results=num,
  )
  return [
    found[:2] * 2,
    found[2:4] * 2,
    *(found[4 + _VALUES * n :][:_VALUES] for n in blocks),
  ]


def _emit_reduce(
  what: ReduceRows, scratch: Any, values: Sequence[Any]
) -> list[Any]:
  t = mosaic.thread_index(THREADS)
  warp, lane = t // WARP, t % WARP
  op = f"{what.kind}.f32"
  steps = " ".join(
    f"{threads.exchange('y', x, distance)} {op} {x}, {x}, y;"
    for distance in (4, 8, 16)
    for x in "ab"
  )
  mosaic.asm(
    "{ .reg .pred p; .reg .b32 m; .reg .f32 a, b, y; setp.ne.b32 p, $1, 0;"
    f" {op} a, $2, $4; {op} b, $3, $5; {steps}"
    " @p st.shared.v2.f32 [$0], {a, b}; }",
    scratch.plus(warp * SEGMENTS + lane * 2, F32_BYTES),
    lane < SEGMENTS // 2,
    *values,
  )
  mosaic.warpgroup_barrier()
  parts = [(f"a{w}", f"b{w}") for w in range(WARPS)]
  loads = " ".join(
    f".reg .f32 {a}, {b}; ld.shared.v2.f32 {{{a}, {b}}},"
    f" [$2 + {w * SEGMENTS * F32_BYTES}];"
    for w, (a, b) in enumerate(parts)
  )
  merges = " ".join(
    f"{op} a0, a0, {a}; {op} b0, b0, {b};" for a, b in parts[1:]
  )
  found = mosaic.asm(
    f"{{ {loads} {merges} mov.f32 $0, a0; mov.f32 $1, b0; }}",
    scratch.plus(lane % 4 * 2, F32_BYTES),
    num_f32_results=2,
  )
  return [found * 2]


def _emit_store_own(what: StoreOwn, sums: Any, *args: Any) -> list[Any]:
  *arrays, u, adds = args
  products = [x for array in arrays for x in array]
  t = mosaic.thread_index(THREADS)
  warp, lane = t // WARP, t % WARP
  # Rows r and r + 8 have the same own column, which one thread of four holds; they
  # are segments of two rows of the matrix, and the warp has all of those.
  row, col = _place()
  own = what.column(row)
  mine = (col < own + 1) & (own < col + 2)
  values = [f"s{n}" for n in range(2 * what.batch)]
  own_products = " ".join(
    f"selp.f32 s{n}, ${5 + 2 * n}, ${4 + 2 * n}, odd;"
    f" selp.f32 s{n}, s{n}, {threads.f32(0)}, mine;"
    for n in range(len(values))
  )
  n, there = threads.sum_of_lane(lane, len(values))
  add = ""
  if what.may_add:
    # Who stores no sum looks at the first one and drops it. Where `q` was `adds`
    # and `p`, ptxas 13.0 took a register that held something else for `p` in the
    # kernel of Llama-3.1-8B at batch 3, and nothing was added (bench/LOG.md).
    n = n * there
    add = (
      f"setp.ne.b32 q, $3, 0; @q ld.shared.f32 x, [${len(products) + 4}];"
      " @q add.f32 s0, s0, x;"
    )
  place = n // 2 * what.row_values + u * UNIT_ROWS + warp * 2 + n % 2
  mosaic.asm(
    f"{{ .reg .pred mine, odd, p, q; .reg .f32 x, {', '.join(values)};"
    f" {threads.SUMS_SCRATCH}"
    " setp.ne.b32 mine, $0, 0; setp.ne.b32 odd, $1, 0;"
    " setp.ne.b32 p, $2, 0;"
    f" {own_products} {threads.warp_sums(values)}"
    f" {add} @p st.shared.f32 [${len(products) + 4}], s0; }}",
    mine,
    own % 2,
    there,
    adds,
    *products,
    sums.plus(place, F32_BYTES),
  )
  return []


def _emit_store_weights(what: StoreWeights, p: Any, *weights: Any) -> list[Any]:
  del what
  row, col = _place()
  # Two rows of two columns; they are where they are in every tile.
  addresses = [
    p.plus(tiled_byte(col + k, 2 * (row + 8 * half)), 1)
    for half in range(2)
    for k in range(2)
  ]
  stores = [
    f"cvt.rn.bf16.f32 h, ${_VALUES * (n + 1) + k};"
    f" st.shared.b16 [${k} + {n * TILE_BYTES}], h;"
    for n in range(len(weights))
    for k in range(_VALUES)
  ]
  mosaic.asm(
    f"{{ .reg .b16 h; {' '.join(stores)} }}",
    *addresses,
    *(x for values in weights for x in values),
  )
  return []
