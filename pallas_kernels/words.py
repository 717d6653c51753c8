"""How CTAs hand results to each other: words that carry their own stamp.

A word is 8 bytes of device memory. It holds a float32 and its stamp, the number
of the layer that it belongs to, counted from 1 through all steps since words were
zero; or four bfloat16, of which the first has the stamp's lowest bit in place of
its second exponent bit, see `STAMP_BIT`. It is written and read whole, by a
relaxed access of the scope of the GPU; who waits for a result reads its words
until they bear the stamp. No access is ordered with any other, and none needs to
be: each word proves that it has come (PTX ISA, "Memory Consistency Model": a
scalar access of 64 bits is single-copy atomic, a vector one is some of these in
no order, and relaxed ones by two threads are morally strong). So there is neither
a fence, which would wait for the bulk loads that are under way, nor a counter.
One bit is enough of a stamp, since every word is written once in each layer, and
whoever wants one has seen the layer's before, or that was in an earlier launch:
it holds that or the one that is wanted. Only `final`, what the last layer puts
out, goes to CTAs that see no layer; it is written once in each launch, and its
stamp counts steps.

Words are written again in the next layer. By then all who read them have: every
word of a layer depends on all of the last one's `output`, that on all of
`hidden`, that on all of `middle`, that on all of `attended`, and each head's part
of `attended` on its queries, keys, values and `parts`. Whoever reads any of these
makes something of it that it sends, the last of it after its last read. So every
reader of a layer's words is upstream of every writer of the next layer's, and
would read what depends on its own reading if it read that (the same chapter's
axiom "No-Thin-Air"; there is no other order between the two, nor a need of one).
The words of a step's last layer, and `candidates`, which bear the same stamp, are
written again in the next launch, which begins when this one has ended. Nothing
needs to be zero in between.

`threads` says what the programs here are.
"""

import dataclasses
from typing import Any

from pallas_kernels import gains, mosaic, threads
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.threads import F32_BYTES, PIECE_COLUMNS, Team, tiled_byte

WORD_BYTES = 8
# Payload of a word of bfloat16.
_BF16_BYTES = 8
# A pair of words is loaded at once; so many pairs at most before any is looked at.
_MOST_IN_FLIGHT = 16
# Likewise if they are of several sequences: more at a time only stand in the way
# of what CTAs load whose words have come (bench/LOG.md).
_MOST_OF_SEQUENCES = 8

# Where the first of four bfloat16 has the stamp. The highest exponent bit, one
# to the left, tells what this one was: the other, for all from 2^-63 to 2^65.
# Less becomes 0; more, infinity and NaN become NaN.
STAMP_BIT = 13
_STAMP = 1 << STAMP_BIT
SMALLEST, LARGEST = 0x2000, 0x5FFF


@dataclasses.dataclass(frozen=True)
class Send:
  """Stores rows of shared memory as words.

  Attributes:
    num_rows: rows.
    row_payloads: words of a row that may be sent.
    source_stride: payloads from row to row in shared memory.
    target_stride: words from row to row in device memory.
    half_head: words of half a head if the two halves of a row go to the two
      halves of heads, or None if rows go where they are.
    stamped: or what is sent are float32 as they are, for others than this kernel.
    num_threads: that send.
  """

  num_rows: int
  row_payloads: int
  source_stride: int
  target_stride: int
  half_head: int | None
  stamped: bool
  num_threads: int

  @property
  def payload_bytes(self) -> int:
    """Of a word, or of what is sent instead."""
    return _BF16_BYTES if self.stamped else F32_BYTES

  @property
  def num_payloads(self) -> int:
    """Of all rows."""
    return self.num_rows * self.row_payloads

  def place(self, t: Any, start: Any, count: Any) -> tuple[Any, Any, Any]:
    """Says what one thread does in one turn.

    Args:
      t: which payload, an integer or an array of them.
      start: word of a row to which its first payload goes.
      count: how many of its payloads are sent.

    Returns:
      Whether anything, index of the payload, and of the word.
    """
    row, i = t // self.row_payloads, t % self.row_payloads
    source = row * self.source_stride + i
    if self.half_head is None:
      return (
        (i < count) & (row < self.num_rows),
        source,
        (row * self.target_stride + start + i),
      )
    # Half a row is the first halves of some heads, half the second ones.
    pairs = self.row_payloads // 2
    second, i = i // pairs, i % pairs
    at = start // 2 + i
    head, within = at // self.half_head, at % self.half_head
    word = (2 * head + second) * self.half_head + within
    sent = (i * 2 < count) & (row < self.num_rows)
    return sent, source, row * self.target_stride + word


@dataclasses.dataclass(frozen=True)
class Receive:
  """Waits for rows of words and stores their payloads to shared memory.

  Attributes:
    num_sequences: how often there are such rows.
    num_rows: rows of each.
    row_words: words of a row that are wanted, an even number.
    source_stride: words from row to row in device memory.
    sequence_words: words from sequence to sequence there.
    masked: whether some of these words are never sent; the payload is 0 then.
    target_stride: payloads from row to row in shared memory, or None if it is
      an operand of `wgmma`, with 8 rows for each sequence.
    sequence_bytes: from sequence to sequence in shared memory.
    gained: whether to multiply by a norm's weights and to sum up squares.
    num_threads: that wait.
  """

  num_sequences: int
  num_rows: int
  row_words: int
  source_stride: int
  sequence_words: int
  masked: bool
  target_stride: int | None
  sequence_bytes: int
  gained: bool
  num_threads: int

  @property
  def num_pairs(self) -> int:
    """Pairs of words of a sequence."""
    return self.num_rows * self.row_words // 2

  def place(
    self, sequence: int, t: Any, column: Any, valid: Any
  ) -> tuple[Any, Any, Any, Any]:
    """Says what one thread does in one turn.

    Args:
      sequence: which one.
      t: which of its pairs of words, an integer or an array of them.
      column: word of a row from which on they are wanted.
      valid: how many words are ever sent, from the first row's first one on.

    Returns:
      Whether the first word of the pair is waited for, whether the second is,
      the first one's index, and where in shared memory both go, in bytes.
    """
    row_pairs = self.row_words // 2
    row, i = t // row_pairs, t % row_pairs
    i = i * 2
    word = row * self.source_stride + column + i
    first = second = row < self.num_rows
    if self.masked:
      inside = column + i < self.source_stride
      first = first & inside & (word < valid)
      second = second & inside & (word + 1 < valid)
    if self.target_stride is not None:
      byte = (row * self.target_stride + i) * _BF16_BYTES
    else:
      byte = tiled_byte(row, i * _BF16_BYTES)
    return (
      first,
      second,
      word + sequence * self.sequence_words,
      byte + sequence * self.sequence_bytes,
    )


def sequences_at_once(batch: int, columns: int, num_threads: int) -> int:
  """Returns for how many sequences all loads of bfloat16 can be under way."""
  turns = -(-columns // (PIECE_COLUMNS * num_threads))
  most = max(1, _MOST_OF_SEQUENCES // turns)
  return max(n for n in range(1, most + 1) if batch % n == 0)


def send(
  team: Team,
  words: Ref,
  first: Index,
  source: Ref,
  start: Index,
  count: Index,
  stamp: Index,
  *,
  target_stride: int,
  num_rows: int | None = None,
  row_payloads: int | None = None,
  half_head: int | None = None,
) -> None:
  """Sends rows of `source`, at most `count` words of each.

  Args:
    team: who sends; they meet before, and have to again before any of them
      writes to `source`.
    words: all words.
    first: the first row's first one.
    source: `[rows, columns]` bfloat16 in shared memory.
    start: word of each row that the source's first payload becomes.
    count: how many words of each row are sent.
    stamp: theirs.
    target_stride: words from row to row.
    num_rows: how many rows, if fewer than the source has.
    row_payloads: how many words a row has at most, if fewer than the source.
    half_head: see `Send`.
  """
  rows, cols = source.shape
  stride = cols * source.dtype.itemsize // _BF16_BYTES
  what = Send(
    num_rows or rows,
    row_payloads or stride,
    stride,
    target_stride,
    half_head,
    True,
    team.num_threads,
  )
  team.meet()
  threads.run(
    what, _emit_send, [words, source], [], [first, start, count, stamp]
  )


def put(
  team: Team, source: Ref, target: Ref, start: Index, count: Index
) -> None:
  """Stores the first `count` columns of each row of `source` to `target`.

  Args:
    team: who stores, see `send`.
    source: `[rows, columns]` float32 in shared memory.
    target: `[rows, more columns]` float32 in device memory.
    start: the first column there.
    count: how many columns.
  """
  rows, cols = source.shape
  what = Send(
    *(rows, cols, cols, target.shape[1]),
    *(None, False, team.num_threads),
  )
  team.meet()
  threads.run(what, _emit_send, [target, source], [], [0, start, count, 0])


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Words that are waited for, and where they go.

  Attributes:
    target: in shared memory.
    first: the first row's first word.
    row_words: see `Receive`.
    num_rows: likewise.
    source_stride: likewise; 0 if rows follow each other.
    column: word of each row from which on they are wanted.
    offset_bytes: where in `target` to begin.
    valid: how many words of a sequence are ever sent, from the first row's
      first one on; the payload of others is 0. None if all are.
    tiled: whether `target` is an operand of `wgmma`.
    num_sequences: see `Receive`.
    sequence_words: likewise.
    sequence_bytes: likewise.
    gain: of the norm that follows, or None.
  """

  target: Ref
  first: Index
  row_words: int
  num_rows: int
  source_stride: int = 0
  column: Index = 0
  offset_bytes: Index = 0
  valid: Index | None = None
  tiled: bool = False
  num_sequences: int = 1
  sequence_words: int = 0
  sequence_bytes: int = 0
  gain: gains.Gain | None = None

  def by(self, team: Team) -> Receive:
    """Returns the program that brings them."""
    return Receive(
      self.num_sequences,
      self.num_rows,
      self.row_words,
      self.source_stride or self.row_words,
      self.sequence_words,
      self.valid is not None,
      None if self.tiled else self.row_words,
      self.sequence_bytes,
      self.gain is not None,
      team.num_threads,
    )


def receive(team: Team, words: Ref, stamp: Index, *wanted: Wanted) -> None:
  """Waits for words and stores their payloads; all loads are under way at once.

  The team has to have done with what was at the targets, and to meet, or to
  commit, before anybody reads these.

  Args:
    team: who waits.
    words: all words.
    stamp: what those that are wanted must bear.
    *wanted: which ones; only one alone may have a gain.
  """
  # Plain refs come before tiled ones.
  wanted = tuple(sorted(wanted, key=lambda w: w.tiled))
  norms, norm, squares, square = wanted[0].gain or (None, 0, None, 0)
  gain = [] if norms is None else [norms, squares]
  plain = [w.target for w in wanted if not w.tiled]
  tiled = [w.target for w in wanted if w.tiled]
  numbers = [
    x
    for w in wanted
    for x in (
      w.first,
      w.column,
      w.offset_bytes,
      0 if w.valid is None else w.valid,
    )
  ]
  what = tuple(w.by(team) for w in wanted)
  threads.run(
    what,
    _emit_receive,
    [words, *gain, *plain],
    tiled,
    [norm, square, stamp, *numbers],
  )


# ---- what the threads do ---------------------------------------------------


def _emit_send(
  what: Send,
  words: Any,
  source: Any,
  first: Any,
  start: Any,
  count: Any,
  stamp: Any,
) -> None:
  size = WORD_BYTES if what.stamped else what.payload_bytes
  if what.stamped:
    stamp = _bit_of(stamp)
    code = (
      "@p ld.shared.v2.b32 {x, y}, [$1];"
      f" {_make_room('x')} or.b32 x, x, $3; mov.b64 w, {{x, y}};"
      " @p st.relaxed.gpu.global.b64 [$0], w;"
    )
  else:
    code = "@p ld.shared.b32 x, [$1]; @p st.global.b32 [$0], x;"
  for t in threads.turns(what.num_payloads, what.num_threads, guarded=True):
    sent, payload, word = what.place(t, start, count)
    mosaic.asm(
      "{ .reg .pred p, e; .reg .b32 x, y, m; .reg .b64 w;"
      f" mov.b32 x, 0; mov.b32 y, 0; setp.ne.b32 p, $2, 0; {code} }}",
      words.plus(first + word, size),
      source.plus(payload, what.payload_bytes),
      sent,
      stamp,
    )


def _bit_of(stamp: Any) -> Any:
  return stamp % 2 * _STAMP


def _make_room(x: str) -> str:
  """Returns PTX that clears the stamp's bit of x, and what it would not bear."""
  outside = 3 << STAMP_BIT
  return (
    f"and.b32 m, {x}, {outside}; setp.eq.u32 e, m, 0;"
    f" @e and.b32 {x}, {x}, 0xFFFF8000;"
    f" setp.eq.u32 e, m, {outside};"
    f" @e or.b32 {x}, {x}, 0x7FFF;"
    f" and.b32 {x}, {x}, {~_STAMP & 0xFFFFFFFF};"
  )


def _take_out(x: str) -> str:
  """Returns PTX that puts back what the stamp has taken the place of."""
  # (x & ~_STAMP) | (~(x >> 1) & _STAMP)
  return (
    f"shr.u32 m, {x}, 1; lop3.b32 {x}, {x}, m, {_STAMP}, 0x72;"
    f" and.b32 m, {x}, 0x7FFF; setp.eq.u32 e, m, {SMALLEST};"
    f" @e and.b32 {x}, {x}, 0xFFFF8000;"
    f" setp.eq.u32 e, m, {LARGEST}; @e or.b32 {x}, {x}, 0x7FFF;"
  )


def _emit_receive(what: tuple[Receive, ...], words: Any, *args: Any) -> None:
  norms = squares = None
  if what[0].gained:
    norms, squares, *args = args  # type: ignore[assignment]
  targets, (norm, square, stamp) = args[: len(what)], args[len(what) :][:3]
  numbers = args[len(what) + 3 :]
  operands = [_bit_of(stamp)]
  declare, load, check, store = [gains.SCRATCH], [], [], []
  # Pairs of words of a thread: all are under way at once.
  i = 0
  for n, (one, target) in enumerate(zip(what, targets, strict=True)):
    first, column, offset_bytes, valid = numbers[4 * n :][:4]
    # Without this, every thread has something to do in every turn.
    masked = one.masked or one.num_pairs % one.num_threads != 0
    for j, t in enumerate(
      threads.turns(one.num_pairs, one.num_threads, guarded=True)
    ):
      inside, wants = "", ("", "")
      wants_a, wants_b, word, byte = one.place(0, t, column, valid)
      there = t < one.num_pairs
      if masked:
        name, k = f"{n}_{j}", len(operands)
        operands += [wants_a, wants_b, there]
        declare.append(
          f".reg .pred p{name}, q{name}, in{name};"
          f" setp.ne.b32 p{name}, ${k}, 0; setp.ne.b32 q{name}, ${k + 1}, 0;"
          f" setp.ne.b32 in{name}, ${k + 2}, 0;"
        )
        inside, wants = f"@in{name}", (f"@p{name}", f"@q{name}")
      if norms is not None:
        if one.num_pairs % one.num_threads != 0:
          # Who has nothing to do reads the first weights.
          t = t * there
        element = norm * (one.num_rows * one.row_words * 4) + t * PIECE_COLUMNS
        declare.append(gains.load_gain(j, len(operands)))
        operands.append(norms.plus(element, F32_BYTES))
      k = len(operands)
      operands += [
        words.plus(first + word, WORD_BYTES),
        target.plus(byte + offset_bytes, 1),
      ]
      # Sequences differ by what is known here.
      for sequence in range(one.num_sequences):
        at = f"${k} + {sequence * one.sequence_words * WORD_BYTES}"
        # What is never sent reads as zero.
        declare.append(
          f".reg .b64 a{i}, b{i}; mov.b64 a{i}, 0; mov.b64 b{i}, 0;"
          f" .reg .b32 w{i}_0, w{i}_1, w{i}_2, w{i}_3;"
        )
        if masked:
          load.append(
            f"{wants[0]} ld.relaxed.gpu.global.b64 a{i}, [{at}];"
            f" {wants[1]} ld.relaxed.gpu.global.b64 b{i}, [{at} + {WORD_BYTES}];"
          )
        else:
          # Who has its words need not ask again for the others of its warp.
          load.append(
            f"@again ld.relaxed.gpu.global.v2.b64 {{a{i}, b{i}}}, [{at}];"
          )
        # missing | (word ^ stamp)
        check += [
          f"mov.b64 {{low, m}}, {half}{i};"
          f" {want} lop3.b32 missing, missing, low, $0, 0xF6;"
          for want, half in zip(wants, "ab", strict=True)
        ]
        store += [
          f"mov.b64 {{w{i}_0, w{i}_1}}, a{i}; mov.b64 {{w{i}_2, w{i}_3}}, b{i};",
          _take_out(f"w{i}_0"),
          _take_out(f"w{i}_2"),
        ]
        if norms is not None:
          store.append(gains.apply_gain(i, j, sequence))
        store.append(
          f"{inside} st.shared.v4.b32"
          f" [${k + 1} + {sequence * one.sequence_bytes}],"
          f" {{w{i}_0, w{i}_1, w{i}_2, w{i}_3}};"
        )
        i += 1
  if i > _MOST_IN_FLIGHT:
    raise ValueError(f"{i} pairs of words are too many for a thread")
  if squares is not None:
    count = what[0].num_sequences
    declare.append(gains.begin_squares(count))
    store.append(gains.store_squares(count, len(operands)))
    operands += gains.squares_of(squares, square, count, what[0].num_threads)
  mosaic.asm(
    " ".join(
      [
        "{ .reg .pred again, any; .reg .b32 missing, low;",
        *declare,
        "setp.eq.u32 again, 0, 0;",
        "receive_${:uid}: mov.b32 missing, 0;",
        *load,
        *check,
        f"and.b32 missing, missing, {_STAMP}; setp.ne.b32 again, missing, 0;",
        # The warp goes on as one: threads that went on by themselves would
        # each take the time of what follows.
        "vote.sync.any.pred any, again, 0xFFFFFFFF;",
        "@any bra receive_${:uid};",
        *store,
        "}",
      ]
    ),
    *operands,
  )
