"""The greedy choice: of each lane's largest logits, of each CTA's, of all.

PTX for programs of `threads`. A warp takes a sequence: lanes hold logits and their
indices, and the larger logit wins, of equals the lower index. Indices are float32,
which holds them all.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels import mosaic, threads
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.plan import GROUP_ROWS
from pallas_kernels.threads import F32_BYTES, WARP, Team
from pallas_kernels.words import WORD_BYTES


@dataclasses.dataclass(frozen=True)
class BeginBest:
  """Says that no logit has come yet.

  Attributes:
    batch: B.
    vocab_size: V, an index after all.
    num_threads: that do.
  """

  batch: int
  vocab_size: int
  num_threads: int


@dataclasses.dataclass(frozen=True)
class SendBest:
  """Sends a CTA's largest logits, and their indices.

  Attributes:
    batch: B.
    row_words: words of all CTAs.
    num_threads: that do.
  """

  batch: int
  row_words: int
  num_threads: int


@dataclasses.dataclass(frozen=True)
class Choose:
  """Waits for all CTAs' and takes the largest.

  Attributes:
    batch: B.
    num_ctas: P.
    row_words: words of all CTAs.
    vocab_size: V.
    num_threads: that do.
  """

  batch: int
  num_ctas: int
  row_words: int
  vocab_size: int
  num_threads: int


def begin_best(team: Team, best: Ref, vocab_size: int) -> None:
  """Says that no logit has come yet; a meeting is to follow.

  Args:
    team: who does.
    best: `[2 B, 64]` float32 in shared memory, logits and then indices.
    vocab_size: V.
  """
  what = BeginBest(best.shape[0] // 2, vocab_size, team.num_threads)
  threads.run(what, _emit_begin_best, [best], [], [])


def send_best(
  team: Team,
  words: Ref,
  first: Index,
  best: Ref,
  stamp: Index,
  *,
  row_words: int,
) -> None:
  """Sends this CTA's largest logit of each sequence, and its index.

  Args:
    team: who does; they have met since `best` was stored.
    words: all words.
    first: this CTA's first one.
    best: see `begin_best`.
    stamp: theirs.
    row_words: from sequence to sequence, and from logits to indices B times that.
  """
  what = SendBest(best.shape[0] // 2, row_words, team.num_threads)
  threads.run(what, _emit_send_best, [words, best], [], [first, stamp])


def choose(
  team: Team,
  words: Ref,
  first: Index,
  chosen: Ref,
  stamp: Index,
  *,
  num_ctas: int,
  row_words: int,
  vocab_size: int,
) -> None:
  """Waits for the largest logits of all CTAs and stores the choice.

  Args:
    team: who does; they have to meet before anybody reads it.
    words: all words.
    first: the first CTA's first one.
    chosen: `[B]` int32 in shared memory, a token even if no logit is a number.
    stamp: that words bear.
    num_ctas: P.
    row_words: see `send_best`.
    vocab_size: V.
  """
  what = Choose(
    *(chosen.shape[0], num_ctas, row_words, vocab_size, team.num_threads)
  )
  threads.run(what, _emit_choose, [words, chosen], [], [first, stamp])


# ---- what the threads do ---------------------------------------------------


def _sequences(what: Any) -> list[tuple[Any, Any]]:
  """Returns the sequence of each of a warp's turns, and whether it is one."""
  num_warps = what.num_threads // WARP
  warp = mosaic.thread_index(what.num_threads) // WARP
  found = []
  for n in range(-(-what.batch // num_warps)):
    b = warp + n * num_warps
    there = b < what.batch
    # Who has none takes the first, and stores nothing.
    found.append((b * there, there))
  return found


# The best so far is in v, its index in i.
_SCRATCH = (
  ".reg .pred q, r, again; .reg .b32 m, s; .reg .f32 v, i, other_v, other_i;"
)


def _take(value: str, index: str) -> str:
  """Returns PTX that keeps the better of the best so far and another logit."""
  return (
    f"setp.gt.f32 q, {value}, v; setp.eq.f32 r, {value}, v;"
    f" setp.lt.and.f32 r, {index}, i, r; or.pred q, q, r;"
    f" selp.f32 v, {value}, v, q; selp.f32 i, {index}, i, q;"
  )


def _of_warp() -> str:
  """Returns PTX that gives all lanes the best of all."""
  return " ".join(
    f"{threads.exchange('other_v', 'v', distance)}"
    f" {threads.exchange('other_i', 'i', distance)}"
    f" {_take('other_v', 'other_i')}"
    for distance in (16, 8, 4, 2, 1)
  )


def _emit_begin_best(what: BeginBest, best: Any) -> None:
  count = what.batch * GROUP_ROWS
  index_bytes = count * F32_BYTES
  for t in threads.turns(count, what.num_threads, guarded=True):
    mosaic.asm(
      "{ .reg .pred p; setp.ne.b32 p, $1, 0;"
      f" @p st.shared.f32 [$0], {threads.f32(-math.inf)};"
      f" @p st.shared.f32 [$0 + {index_bytes}],"
      f" {threads.f32(what.vocab_size)}; }}",
      best.plus(t, F32_BYTES),
      t < count,
    )


def _emit_send_best(
  what: SendBest, words: Any, best: Any, first: Any, stamp: Any
) -> None:
  lane = mosaic.thread_index(what.num_threads) % WARP
  index_bytes = what.batch * GROUP_ROWS * F32_BYTES
  for b, there in _sequences(what):
    mosaic.asm(
      f"{{ {_SCRATCH} .reg .f32 w, j; .reg .b64 x;"
      f" ld.shared.f32 v, [$0]; ld.shared.f32 i, [$0 + {index_bytes}];"
      f" ld.shared.f32 w, [$0 + {WARP * F32_BYTES}];"
      f" ld.shared.f32 j, [$0 + {index_bytes + WARP * F32_BYTES}];"
      f" {_take('w', 'j')} {_of_warp()} setp.ne.b32 q, $2, 0;"
      " mov.b64 x, {v, $3}; @q st.relaxed.gpu.global.b64 [$1], x;"
      " mov.b64 x, {i, $3}; @q st.relaxed.gpu.global.b64"
      f" [$1 + {what.batch * what.row_words * WORD_BYTES}], x; }}",
      best.plus(b * GROUP_ROWS + lane, F32_BYTES),
      words.plus(first + b * what.row_words, WORD_BYTES),
      there & (lane < 1),
      stamp,
    )


def _emit_choose(
  what: Choose, words: Any, chosen: Any, first: Any, stamp: Any
) -> None:
  lane = mosaic.thread_index(what.num_threads) % WARP
  turns = -(-what.num_ctas // WARP)
  index_bytes = what.batch * what.row_words * WORD_BYTES
  for b, there in _sequences(what):
    declare, load, check, take = [], [], [], []
    operands = [stamp]
    for k in range(turns):
      cta = lane + k * WARP
      real = cta < what.num_ctas
      # Who has no CTA left looks at the first one again.
      at = first + b * what.row_words + cta * real
      operands.append(words.plus(at, WORD_BYTES))
      declare.append(f".reg .b64 x{k}, y{k}; .reg .f32 w{k}, j{k};")
      load.append(
        f"ld.relaxed.gpu.global.b64 x{k}, [${k + 1}];"
        f" ld.relaxed.gpu.global.b64 y{k}, [${k + 1} + {index_bytes}];"
      )
      check.append(
        f"mov.b64 {{w{k}, s}}, x{k}; xor.b32 s, s, $0; or.b32 m, m, s;"
        f" mov.b64 {{j{k}, s}}, y{k}; xor.b32 s, s, $0; or.b32 m, m, s;"
      )
      take.append(_take(f"w{k}", f"j{k}"))
    at = len(operands)
    mosaic.asm(
      f"{{ {_SCRATCH} {' '.join(declare)}"
      f" choose_${{:uid}}: {' '.join(load)} mov.b32 m, 0; {' '.join(check)}"
      " setp.ne.b32 again, m, 0;"
      # The warp goes on as one, see `words`.
      " vote.sync.any.pred again, again, 0xFFFFFFFF;"
      " @again bra choose_${:uid};"
      f" mov.f32 v, w0; mov.f32 i, j0; {' '.join(take[1:])} {_of_warp()}"
      f" min.f32 i, i, {threads.f32(what.vocab_size - 1)};"
      f" max.f32 i, i, {threads.f32(0)}; cvt.rzi.s32.f32 s, i;"
      f" setp.ne.b32 q, ${at + 1}, 0; @q st.shared.b32 [${at}], s; }}",
      *operands,
      chosen.plus(b, F32_BYTES),
      there & (lane < 1),
    )
