"""How CTAs hand results to each other: words that carry their own stamp.

A word is 8 bytes of device memory: 4 of payload, two bfloat16 or one float32,
and the stamp, the number of the layer that it belongs to, from 1. It is written
and read whole, by a relaxed access of the scope of the GPU; who waits for a
result reads its words until they bear the stamp. No access is ordered with any
other, and none needs to be: each word proves that it has come (PTX ISA, "Memory
Consistency Model": a scalar access of 64 bits is single-copy atomic, and
relaxed ones by two threads are morally strong). So there is neither a fence,
which would wait for the bulk loads that are under way, nor a counter.

Words are zero at launch, and are written again in the next layer. By then all who
read them have: every word of a layer depends on all of the last one's `output`,
that on all of `hidden`, that on all of `middle`, that on all of `attended`, and
each head's part of `attended` on its queries, keys, values and `parts`. Whoever
reads any of these makes something of it that it sends, the last of it after its
last read. So every reader of a layer's words is upstream of every writer of the
next layer's.

These are programs of single threads, which Pallas has no words for: each takes
refs whole and scalars that say where. `interpreter` runs what they mean.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.geometry import TILE
from pallas_kernels.layouts import I32, SWIZZLED, Index, Ref

_THREADS = 128
_WORD_BYTES = 8
_PAYLOAD_BYTES = 4
# A pair of words is loaded at once; so many pairs are before any is looked at.
_MOST_IN_FLIGHT = 16
# A tile of 8 rows of 128 bytes, in which 16 bytes c of row r are at c xor r.
_TILE_ROW_BYTES = 128
_TILE_BYTES = 8 * _TILE_ROW_BYTES
_SWIZZLED_BYTES = 16


def _swizzled_byte(row: Any, byte: Any) -> Any:
  """Returns where in its row of a tile a byte of an operand of `wgmma` is."""
  return byte ^ (row % 8 * _SWIZZLED_BYTES)


def tiled_byte(row: Any, byte: Any) -> Any:
  """Returns where byte `byte` of one of an operand's 8 rows is."""
  within = _swizzled_byte(row, byte % _TILE_ROW_BYTES)
  tile = byte // _TILE_ROW_BYTES
  return tile * _TILE_BYTES + row * _TILE_ROW_BYTES + within


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
    stamped: or what is sent are bare payloads, for others than this kernel.
  """

  num_rows: int
  row_payloads: int
  source_stride: int
  target_stride: int
  half_head: int | None
  stamped: bool

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
    num_rows: rows.
    row_words: words of a row that are wanted, an even number.
    source_stride: words from row to row in device memory.
    masked: whether some of these words are never sent; the payload is 0 then.
    target_stride: payloads from row to row in shared memory, or None if it is
      an operand of `wgmma`.
  """

  num_rows: int
  row_words: int
  source_stride: int
  masked: bool
  target_stride: int | None

  @property
  def num_pairs(self) -> int:
    """Pairs of words."""
    return self.num_rows * self.row_words // 2

  def place(self, t: Any, column: Any, valid: Any) -> tuple[Any, Any, Any, Any]:
    """Says what one thread does in one turn.

    Args:
      t: which pair of words, an integer or an array of them.
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
      return (
        first,
        second,
        word,
        (row * self.target_stride + i) * _PAYLOAD_BYTES,
      )
    return first, second, word, tiled_byte(row, i * _PAYLOAD_BYTES)


def _scalars(*values: Index) -> list[jax.Array]:
  return [jnp.asarray(x, I32) for x in values]


def send(
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
    words: all words.
    first: the first row's first one.
    source: `[rows, columns]` in shared memory, bfloat16 or float32.
    start: word of each row that the source's first payload becomes.
    count: how many words of each row are sent.
    stamp: theirs.
    target_stride: words from row to row.
    num_rows: how many rows, if fewer than the source has.
    row_payloads: how many words a row has at most, if fewer than the source.
    half_head: see `Send`.
  """
  rows, cols = source.shape
  stride = cols * source.dtype.itemsize // _PAYLOAD_BYTES
  what = Send(
    num_rows or rows,
    row_payloads or stride,
    stride,
    target_stride,
    half_head,
    True,
  )
  _run(what, [words, source], [], _scalars(first, start, count, stamp))


def put(source: Ref, target: Ref, start: Index, count: Index) -> None:
  """Stores the first `count` columns of each row of `source` to `target`.

  Args:
    source: `[rows, columns]` float32 in shared memory.
    target: `[rows, more columns]` float32 in device memory.
    start: the first column there.
    count: how many columns.
  """
  rows, cols = source.shape
  what = Send(rows, cols, cols, target.shape[1], None, False)
  _run(what, [target, source], [], _scalars(0, start, count, 0))


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
    valid: how many words are ever sent, from the first row's first one on; the
      payload of others is 0. None if all are.
    tiled: whether `target` is an operand of `wgmma`.
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

  @property
  def what(self) -> Receive:
    """The program that brings them."""
    return Receive(
      self.num_rows,
      self.row_words,
      self.source_stride or self.row_words,
      self.valid is not None,
      None if self.tiled else self.row_words,
    )


def receive(words: Ref, stamp: Index, *wanted: Wanted) -> None:
  """Waits for words and stores their payloads; all loads are under way at once.

  Args:
    words: all words.
    stamp: what those that are wanted must bear.
    *wanted: which ones.
  """
  # Plain refs come before tiled ones.
  wanted = tuple(sorted(wanted, key=lambda w: w.tiled))
  plain = [w.target for w in wanted if not w.tiled]
  tiled = [w.target for w in wanted if w.tiled]
  scalars = [
    x
    for w in wanted
    for x in (
      w.first,
      w.column,
      w.offset_bytes,
      0 if w.valid is None else w.valid,
    )
  ]
  what = tuple(w.what for w in wanted)
  _run(what, [words, *plain], tiled, _scalars(stamp, *scalars))


@dataclasses.dataclass(frozen=True)
class Take:
  """Widens columns of activations, as x holds them, to a row of float32.

  Attributes:
    num_columns: how many.
    segment: columns of a segment.
  """

  num_columns: int
  segment: int

  def place(self, t: Any, start: Any) -> tuple[Any, Any]:
    """Returns whether there is such a column, and where it is, in bytes."""
    column = start + t
    row, byte = column // self.segment, column % self.segment * 2
    return (t < self.num_columns) & (row < 8), tiled_byte(row, byte)


def take(
  x: Ref, offset_bytes: Index, start: Index, target: Ref, *, segment: int
) -> None:
  """Copies columns of x from `start` on to `target`, as float32.

  Args:
    x: the operand of `wgmma`.
    offset_bytes: where in it the sequence begins.
    start: the first column.
    target: `[columns]` float32 in shared memory.
    segment: columns of a segment of x.
  """
  what = Take(target.shape[0], segment)
  _run(what, [target], [x], _scalars(offset_bytes, start))


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
    return 2 * self.head_dim * 2 // _SWIZZLED_BYTES

  @property
  def num_cleared(self) -> int:
    """Pieces of 16 bytes in the tile's values."""
    return TILE * self.head_dim * 2 // _SWIZZLED_BYTES

  def copied(self, t: Any, k_row: Any, v_row: Any, row: Any) -> tuple[Any, ...]:
    """Returns whether there is such a piece, its place, and where it goes.

    The place is its number in `new`; it goes to a row of the ring and is a
    number in that.
    """
    per_row = _TILE_ROW_BYTES // _SWIZZLED_BYTES
    block, piece = t // per_row, t % per_row
    blocks = self.head_dim // TILE
    is_value, n = block // blocks, block % blocks
    first = k_row + is_value * (v_row - k_row)
    return t < self.num_pieces, t, first + n * TILE + row, piece

  def cleared(self, t: Any, v_row: Any, row: Any) -> tuple[Any, ...]:
    """Returns whether to clear a piece, and its row and number in the ring."""
    per_row = _TILE_ROW_BYTES // _SWIZZLED_BYTES
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
  _run(Patch(head_dim), [new], [ring], _scalars(k_row, v_row, row))


# ---- what the threads do ---------------------------------------------------


def _run(
  what: Send | tuple[Receive, ...] | Take | Patch,
  refs: Sequence[Ref],
  tiled: Sequence[Ref],
  scalars: Sequence[jax.Array],
) -> None:
  """Emits a program for the threads of the warpgroup."""
  emitters: dict[type, Callable[..., None]] = {
    Send: _emit_send,
    tuple: _emit_receive,
    Take: _emit_take,
    Patch: _emit_patch,
  }
  emit = emitters[type(what)]

  arg_types = (
    *[plgpu.RefType()] * len(refs),
    *[plgpu.RefType(SWIZZLED)] * len(tiled),
    *[plgpu.Layout.WG_SPLAT] * len(scalars),
  )

  def program(context: Any, *args: Any) -> None:
    del context
    num_refs = len(refs) + len(tiled)
    # What other threads have written to shared memory is there, and what is
    # written here will be.
    mosaic.warpgroup_barrier()
    emit(
      what,
      *(mosaic.Address(x) for x in args[:num_refs]),
      *(mosaic.Int(x) for x in args[num_refs:]),
    )
    mosaic.warpgroup_barrier()

  program.what = what  # type: ignore[attr-defined]
  plgpu.inline_mgpu(arg_types=arg_types)(program)(*refs, *tiled, *scalars)


def _turns(count: int) -> list[Any]:
  t = mosaic.thread_index()
  return [t + i * _THREADS for i in range(-(-count // _THREADS))]


def _emit_send(
  what: Send,
  words: Any,
  source: Any,
  first: Any,
  start: Any,
  count: Any,
  stamp: Any,
) -> None:
  size = _WORD_BYTES if what.stamped else _PAYLOAD_BYTES
  store = (
    "mov.b64 w, {x, $3}; @p st.relaxed.gpu.global.b64 [$0], w;"
    if what.stamped
    else "@p st.global.b32 [$0], x;"
  )
  for t in _turns(what.num_payloads):
    sent, payload, word = what.place(t, start, count)
    mosaic.asm(
      "{ .reg .pred p; .reg .b32 x; .reg .b64 w; setp.ne.b32 p, $2, 0;"
      f" @p ld.shared.b32 x, [$1]; {store} }}",
      words.plus(first + word, size),
      source.plus(payload, _PAYLOAD_BYTES),
      sent,
      stamp,
    )


def _emit_receive(what: tuple[Receive, ...], words: Any, *args: Any) -> None:
  targets, stamp = args[: len(what)], args[len(what)]
  places = []
  for n, (one, target) in enumerate(zip(what, targets, strict=True)):
    at = len(what) + 1 + 4 * n
    first, column, offset_bytes, valid = args[at : at + 4]
    # Without this, every thread has something to do in every turn.
    masked = one.masked or one.num_pairs % _THREADS != 0
    for t in _turns(one.num_pairs):
      wants_a, wants_b, word, byte = one.place(t, column, valid)
      addresses = (
        words.plus(first + word, _WORD_BYTES),
        target.plus(byte + offset_bytes, 1),
      )
      flags = (wants_a, wants_b, t < one.num_pairs) if masked else ()
      places.append((addresses, flags))
  for begin in range(0, len(places), _MOST_IN_FLIGHT):
    operands = [stamp]
    declare, load, check, store = [], [], [], []
    for n, (addresses, flags) in enumerate(
      places[begin : begin + _MOST_IN_FLIGHT]
    ):
      k = len(operands)
      operands += addresses
      inside = ""
      declare.append(f".reg .b64 a{n}, b{n}; .reg .b32 x{n}, y{n}, s{n}, t{n};")
      if flags:
        operands += flags
        declare.append(f".reg .pred p{n}, q{n}, in{n};")
        declare.append(
          f"setp.ne.b32 p{n}, ${k + 2}, 0; setp.ne.b32 q{n}, ${k + 3}, 0;"
          f" setp.ne.b32 in{n}, ${k + 4}, 0; mov.b64 a{n}, 0; mov.b64 b{n}, 0;"
        )
        load.append(
          f"@p{n} ld.relaxed.gpu.global.b64 a{n}, [${k}];"
          f" @q{n} ld.relaxed.gpu.global.b64 b{n}, [${k} + {_WORD_BYTES}];"
        )
        inside = f"@in{n} "
      else:
        load.append(f"ld.relaxed.gpu.global.v2.b64 {{a{n}, b{n}}}, [${k}];")
      check.append(
        f"mov.b64 {{x{n}, s{n}}}, a{n}; mov.b64 {{y{n}, t{n}}}, b{n};"
        f" xor.b32 s{n}, s{n}, $0; xor.b32 t{n}, t{n}, $0;"
      )
      if flags:
        check.append(f"@!p{n} mov.b32 s{n}, 0; @!q{n} mov.b32 t{n}, 0;")
        # A row's second word may never come, and its payload is 0.
        check.append(f"@!p{n} mov.b32 x{n}, 0; @!q{n} mov.b32 y{n}, 0;")
      check.append(
        f"or.b32 missing, missing, s{n}; or.b32 missing, missing, t{n};"
      )
      store.append(f"{inside}st.shared.v2.b32 [${k + 1}], {{x{n}, y{n}}};")
    mosaic.asm(
      " ".join(
        [
          "{ .reg .pred again; .reg .b32 missing;",
          *declare,
          "receive_${:uid}: mov.b32 missing, 0;",
          *load,
          *check,
          "setp.ne.b32 again, missing, 0; @again bra receive_${:uid};",
          *store,
          "}",
        ]
      ),
      *operands,
    )


def _emit_take(
  what: Take, target: Any, x: Any, offset_bytes: Any, start: Any
) -> None:
  for t in _turns(what.num_columns):
    there, at = what.place(t, start)
    mosaic.asm(
      "{ .reg .pred p; .reg .b16 h, z; .reg .b32 w; setp.ne.b32 p, $2, 0;"
      " mov.b16 h, 0; mov.b16 z, 0; @p ld.shared.b16 h, [$0];"
      " mov.b32 w, {z, h}; @p st.shared.b32 [$1], w; }",
      x.plus(at + offset_bytes, 1),
      target.plus(t, _PAYLOAD_BYTES),
      there,
    )


def _emit_patch(
  what: Patch, new: Any, ring: Any, k_row: Any, v_row: Any, row: Any
) -> None:
  def place(ring_row: Any, piece: Any) -> Any:
    within = _swizzled_byte(ring_row, piece * _SWIZZLED_BYTES)
    return ring.plus(ring_row * _TILE_ROW_BYTES + within, 1)

  for t in _turns(what.num_pieces):
    there, source, ring_row, piece = what.copied(t, k_row, v_row, row)
    mosaic.asm(
      "{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $2, 0;"
      " @p ld.shared.v4.b32 {a, b, c, d}, [$0];"
      " @p st.shared.v4.b32 [$1], {a, b, c, d}; }",
      new.plus(source, _SWIZZLED_BYTES),
      place(ring_row, piece),
      there,
    )
  for t in _turns(what.num_cleared):
    beyond, ring_row, piece = what.cleared(t, v_row, row)
    mosaic.asm(
      "{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ne.b32 p, $1, 0;"
      " @p st.shared.v4.b32 [$0], {z, z, z, z}; }",
      place(ring_row, piece),
      beyond,
    )
