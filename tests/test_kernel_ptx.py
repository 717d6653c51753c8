"""What the PTX of programs computes, run on the CPU by `ptx`.

The interpreter knows what programs mean and never sees their PTX, and a GPU is not
always there.
"""

import numpy as np
import pytest
from jax.numpy import bfloat16

from pallas_kernels import mosaic

if mosaic.missing():
  pytest.skip(mosaic.missing(), allow_module_level=True)

import ptx

from pallas_kernels import (
  choosing,
  embedding,
  finishing,
  fragments,
  interpreter,
  threads,
  words,
)
from pallas_kernels.geometry import CHUNK_COLS, SEGMENTS, TILE
from pallas_kernels.plan import GROUP_ROWS

_RNG_SEED = 0
_WARPS = 8
_THREADS = 32 * _WARPS
_EPS = 1e-5
# Less than the rows of the last group.
_VOCAB_SIZE = 500


def _random(*shape, seed=_RNG_SEED):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _norm(squares, hidden_size):
  return finishing.Norm(squares.shape[1], hidden_size, _EPS)


def _scale(squares, hidden_size):
  return 1 / np.sqrt(squares.sum(1, keepdims=True) / hidden_size + _EPS)


@pytest.mark.parametrize(
  ("may_add", "adds"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_own_products_are_summed_up(batch, may_add, adds):
  products = _random(TILE, SEGMENTS * batch)
  before = _random(batch, GROUP_ROWS, seed=1)
  t = np.arange(threads.THREADS)
  row, col = t // 32 * 16 + t % 32 // 4, t % 4 * 2
  held = [
    [products[row + r, SEGMENTS * b + col + c] for r in (0, 8) for c in (0, 1)]
    for b in range(batch)
  ]
  machine = ptx.Machine(threads.THREADS)
  sums = machine.array(before)
  what = fragments.StoreOwn(batch, GROUP_ROWS, may_add)
  machine.run(fragments._emit_store_own, what, sums, *held, 5, int(adds))
  r = np.arange(TILE)
  own = np.stack(
    [products[r, SEGMENTS * b + r % SEGMENTS] for b in range(batch)]
  )
  expected = before.copy()
  expected[:, 40:48] = (
    own.reshape(batch, 8, SEGMENTS).sum(2) + adds * (before[:, 40:48])
  )
  np.testing.assert_allclose(sums.value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_results_are_added_to_the_residual_stream(batch, num_threads):
  machine = ptx.Machine(num_threads)
  rows, before = _random(batch, GROUP_ROWS), _random(batch, 96, seed=1)
  residual = machine.array(before)
  results = machine.array(np.zeros((batch, GROUP_ROWS), bfloat16))
  what = finishing.AddResidual(batch, num_threads, None, 96)
  machine.run(
    finishing._emit_add_residual,
    what,
    machine.array(rows),
    residual,
    results,
    32,
  )
  expected = before.copy()
  expected[:, 32:] += rows
  np.testing.assert_array_equal(residual.value, expected)
  np.testing.assert_array_equal(
    results.value, expected[:, 32:].astype(bfloat16)
  )


@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_queries_and_keys_are_turned_and_values_are_not(batch, num_threads):
  machine = ptx.Machine(num_threads)
  rows = _random(batch, GROUP_ROWS)
  squares = _random(batch, num_threads // 32, seed=1) ** 2
  cos_sin = _random(2, batch, 64, seed=2)
  results = machine.array(np.zeros((batch, GROUP_ROWS), bfloat16))
  # Pairs 10 and after of this group are values.
  pair, start, num_turned = 100, 20, 110
  what = finishing.ApplyRope(
    batch, num_threads, _norm(squares, 512), num_turned, 64
  )
  machine.run(
    finishing._emit_apply_rope,
    what,
    *(machine.array(x) for x in (rows, squares, cos_sin)),
    results,
    pair,
    start,
  )
  x, y = np.split(
    (rows * _scale(squares, 512)).reshape(batch, 32, 2), 2, axis=2
  )
  x, y = x[..., 0], y[..., 0]
  cos, sin = cos_sin[:, :, start : start + 32].copy()
  cos[:, 10:], sin[:, 10:] = 1, 0
  expected = np.concatenate([x * cos - y * sin, y * cos + x * sin], axis=1)
  np.testing.assert_allclose(
    results.value.astype(np.float32), expected, rtol=2**-7, atol=1e-6
  )


@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_gates_are_applied(batch, num_threads):
  machine = ptx.Machine(num_threads)
  rows = 5 * _random(batch, GROUP_ROWS)
  rows[0, 0], rows[0, 2] = -300, 300
  squares = np.full((batch, num_threads // 32), 512 / (num_threads // 32), "f4")
  results = machine.array(np.zeros((batch, GROUP_ROWS), bfloat16))
  what = finishing.ApplySwiglu(batch, num_threads, _norm(squares, 512))
  machine.run(
    finishing._emit_apply_swiglu,
    what,
    machine.array(rows),
    machine.array(squares),
    results,
  )
  gate, up = rows[:, ::2], rows[:, 1::2]
  with np.errstate(over="ignore"):
    expected = gate / (1 + np.exp(-gate)) * up
  found = results.value.astype(np.float32)
  np.testing.assert_allclose(found[:, :32], expected, rtol=2**-7, atol=1e-6)
  assert not found[:, 32:].any()


def _choose(machine, given, batch, num_ctas, row_words, stamp):
  chosen = machine.array(np.full(batch, -1, np.int32))
  what = choosing.Choose(
    batch, num_ctas, row_words, _VOCAB_SIZE, machine.num_threads
  )
  machine.run(choosing._emit_choose, what, given, chosen, 0, stamp)
  return chosen.value


# In the first and in the second half of the lanes.
@pytest.mark.parametrize("winner", [77, 100])
@pytest.mark.parametrize("last_rows", [24, 64])
@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_largest_logits_are_kept_sent_and_chosen(
  batch, num_threads, last_rows, winner
):
  machine = ptx.Machine(num_threads)
  num_ctas, row_words, stamp = 40, 128, 9
  squares = _random(batch, num_threads // 32, seed=1) ** 2
  logits = _random(batch, 512)
  # Equals of the same lane and of another, of which the first counts.
  logits[:, [winner, winner + 64, 301]] = 50
  logits[:, 7] = np.nan
  # Larger than all are rows that are no tokens, or of no unit of this group.
  logits[:, min(448 + last_rows, _VOCAB_SIZE) :] = 100
  best = machine.array(np.zeros((2 * batch, GROUP_ROWS), np.float32))
  begin = choosing.BeginBest(batch, _VOCAB_SIZE, num_threads)
  machine.run(choosing._emit_begin_best, begin, best)
  results = machine.array(np.zeros((batch, GROUP_ROWS), np.float32))
  norm = _norm(squares, 512)
  what = finishing.KeepBest(batch, num_threads, norm, _VOCAB_SIZE)
  squares_array = machine.array(squares)
  for row in range(0, 512, GROUP_ROWS):
    rows = logits[:, row : row + GROUP_ROWS]
    machine.run(
      finishing._emit_keep_best,
      what,
      machine.array(rows),
      squares_array,
      results,
      best,
      row,
      last_rows if row == 448 else GROUP_ROWS,
    )
    expected = rows * _scale(squares, 512)
    np.testing.assert_allclose(results.value, expected, rtol=1e-5)
  sent = machine.array(np.zeros((2 * batch * row_words, 2), np.uint32))
  send = choosing.SendBest(batch, row_words, num_threads)
  machine.run(choosing._emit_send_best, send, sent, best, 3, stamp)
  found = sent.value.reshape(2, batch, row_words, 2)
  assert (found[:, :, 3, 1] == stamp).all()
  assert not np.delete(found, 3, axis=2).any()
  assert (found[1, :, 3, 0].view(np.float32) == winner).all()
  # Other CTAs have less, or as much of later tokens.
  others = np.zeros((2, batch, row_words, 2), np.uint32)
  others[..., 1] = stamp
  others[0, :, :, 0] = np.float32(1).view(np.uint32)
  others[1, :, :, 0] = np.float32(400).view(np.uint32)
  others[:, :, 3] = found[:, :, 3]
  others[0, :, 39] = found[0, :, 3]
  given = machine.array(others.reshape(-1, 2))
  chosen = _choose(machine, given, batch, num_ctas, row_words, stamp)
  assert (chosen == winner).all()
  # One that has not come.
  others[1, batch - 1, 39, 1] -= 1
  late = machine.array(others.reshape(-1, 2))
  with pytest.raises(AssertionError, match="words are missing"):
    _choose(machine, late, batch, num_ctas, row_words, stamp)


def test_a_token_is_chosen_even_if_no_logit_is_a_number():
  machine = ptx.Machine(128)
  batch, row_words = 1, 128
  best = machine.array(np.zeros((2, GROUP_ROWS), np.float32))
  begin = choosing.BeginBest(batch, _VOCAB_SIZE, 128)
  machine.run(choosing._emit_begin_best, begin, best)
  squares = np.ones((batch, 4), np.float32)
  what = finishing.KeepBest(batch, 128, _norm(squares, 512), _VOCAB_SIZE)
  rows = np.full((batch, GROUP_ROWS), np.nan, np.float32)
  arrays = (machine.array(x) for x in (rows, squares, np.zeros_like(rows)))
  machine.run(finishing._emit_keep_best, what, *arrays, best, 0, GROUP_ROWS)
  sent = machine.array(np.ones((2 * row_words, 2), np.uint32))
  send = choosing.SendBest(batch, row_words, 128)
  machine.run(choosing._emit_send_best, send, sent, best, 0, 1)
  chosen = _choose(machine, sent, batch, 1, row_words, 1)
  assert chosen.tolist() == [_VOCAB_SIZE - 1]


@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("half", [32, 64])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_angles_are_copied_and_begin_anew(batch, half, num_threads):
  machine = ptx.Machine(num_threads)
  angles = _random(3, 2, 8, half)
  copied = machine.array(np.zeros((2, batch, half + 32), np.float32))
  what = finishing.LoadAngles(batch, 8, half, half + 32, num_threads)
  machine.run(
    finishing._emit_load_angles, what, machine.array(angles), copied, 2
  )
  expected = angles[2, :, :batch]
  expected = np.concatenate([expected, expected[..., :32]], axis=2)
  np.testing.assert_array_equal(copied.value, expected)


def _rows_of_x(x, sequences, columns):
  """Returns `[sequences, 8, columns]` of an operand of `wgmma`."""
  row, column = np.arange(SEGMENTS)[:, None], np.arange(columns)
  at = threads.tiled_byte(row, 2 * column)
  flat = x.view(np.uint8).reshape(sequences, -1)
  return np.stack([flat[:, at], flat[:, at + 1]], -1).view(bfloat16)[..., 0]


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("sequences", [1, 2, 3, 8])
@pytest.mark.parametrize("columns", [128, 256, 384])
@pytest.mark.parametrize("num_threads", [128, 256])
def test_words_are_received(num_threads, columns, sequences, gained):
  num_warps = num_threads // 32
  # Of so many, a thread has at most 16 pairs of words.
  sequences = min(sequences, 16 * num_threads // columns)
  machine = ptx.Machine(num_threads)
  stamp = 3
  values = _random(sequences, SEGMENTS, columns).astype(bfloat16)
  values[0, 0, :4] = [0, np.inf, -np.inf, 1e-30]
  values[0, 1, 0] = np.nan
  values[-1, 1, 4] = -0.0
  bits = interpreter._stamped(values.view(np.uint64).ravel(), stamp)
  gain = _random(2, SEGMENTS, columns, seed=1)
  x = machine.array(np.zeros((sequences, SEGMENTS, columns), bfloat16))
  squares = machine.array(np.zeros((1 + sequences, num_warps), np.float32))
  what = words.Receive(
    num_sequences=sequences,
    num_rows=SEGMENTS,
    row_words=columns // 4,
    source_stride=columns // 4,
    sequence_words=SEGMENTS * columns // 4,
    masked=False,
    target_stride=None,
    sequence_bytes=SEGMENTS * columns * 2,
    gained=gained,
    num_threads=num_threads,
  )
  normed = [machine.array(gain), squares] if gained else []
  sent = machine.array(np.concatenate([np.zeros(6, np.uint64), bits]))
  scalars = [1, num_warps, stamp, 6, 0, 0, 0]
  machine.run(words._emit_receive, (what,), sent, *normed, x, *scalars)
  expected = values.astype(np.float32)
  if gained:
    expected = (expected * gain[1]).astype(bfloat16).astype(np.float32)
    total = np.square(values.astype(np.float32)).sum((1, 2))
    np.testing.assert_allclose(squares.value[1:].sum(1), total, rtol=1e-4)
    assert not squares.value[0].any()
  found = _rows_of_x(x.value, sequences, columns).astype(np.float32)
  # The first of four, if it is too small or too large.
  expected[0, 1, 0] = np.nan
  np.testing.assert_array_equal(found, expected)


# A block of columns of which some words are never sent: the next segments' last
# ones, and all of a block beyond them.
@pytest.mark.parametrize("column", [0, 32, 64])
def test_what_is_never_sent_is_zero(column):
  machine = ptx.Machine(_THREADS)
  sequences, columns, stride = 2, 128, 80
  # Of 8 segments of 80 words, 333 words are sent.
  values = _random(sequences, SEGMENTS, 4 * stride).astype(bfloat16)
  values = values.reshape(sequences, -1)
  values[:, 4 * 333 :] = 0
  bits = interpreter._stamped(values.view(np.uint64).ravel(), 1)
  bits = bits.reshape(sequences, -1)
  bits[:, 333:] = 0
  what = words.Receive(
    num_sequences=sequences,
    num_rows=SEGMENTS,
    row_words=columns // 4,
    source_stride=stride,
    sequence_words=SEGMENTS * stride,
    masked=True,
    target_stride=None,
    sequence_bytes=SEGMENTS * columns * 2,
    gained=False,
    num_threads=_THREADS,
  )
  before = np.full((1 + sequences, SEGMENTS, columns), 7, bfloat16)
  x, sent = machine.array(before), machine.array(bits)
  offset_bytes = what.sequence_bytes
  scalars = [0, 0, 1, 0, column, offset_bytes, 333]
  machine.run(words._emit_receive, (what,), sent, x, *scalars)
  padded = np.zeros((sequences, SEGMENTS, 1024), bfloat16)
  padded[..., : 4 * stride] = values.reshape(sequences, SEGMENTS, -1)
  expected = padded[..., 4 * column : 4 * column + columns]
  found = _rows_of_x(x.value, 1 + sequences, columns)
  np.testing.assert_array_equal(found[1:], expected)
  assert (found[0] == 7).all()


@pytest.mark.parametrize("late", [0, 1, 100, 511])
def test_words_that_have_not_come_are_waited_for(late):
  machine = ptx.Machine(_THREADS)
  values = np.zeros((1, SEGMENTS, 256), bfloat16)
  bits = interpreter._stamped(values.view(np.uint64).ravel(), 4)
  # The bit of the layer before.
  bits[late] ^= np.uint64(1 << words.STAMP_BIT)
  what = words.Receive(
    num_sequences=1,
    num_rows=SEGMENTS,
    row_words=64,
    source_stride=64,
    sequence_words=SEGMENTS * 64,
    masked=False,
    target_stride=None,
    sequence_bytes=0,
    gained=False,
    num_threads=_THREADS,
  )
  x, sent = machine.array(values), machine.array(bits)
  scalars = [0, 0, 4, 0, 0, 0, 0]
  with pytest.raises(AssertionError, match="words are missing"):
    machine.run(words._emit_receive, (what,), sent, x, *scalars)


@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("unit_chunks", [1, 2, 3])
@pytest.mark.parametrize("sequences", [1, 3])
def test_tokens_are_looked_up(sequences, unit_chunks, num_threads):
  machine = ptx.Machine(num_threads)
  columns = unit_chunks * CHUNK_COLS
  sequence_bytes = SEGMENTS * columns * 2
  own = 48
  what = embedding.Embed(
    sequences, unit_chunks, sequence_bytes, own, num_threads
  )
  table = _random(sequences, unit_chunks * TILE * 256).astype(bfloat16)
  gain = _random(2, SEGMENTS, columns, seed=1)
  squares = machine.array(np.zeros((sequences, num_threads // 32), np.float32))
  residual = machine.array(np.zeros((1 + sequences, own), np.float32))
  x = machine.array(np.zeros((1 + sequences, SEGMENTS, columns), bfloat16))
  firsts = [k * table.shape[1] for k in range(sequences)]
  start = columns + 16
  machine.run(
    embedding._emit_embed,
    what,
    machine.array(table),
    machine.array(gain),
    squares,
    residual,
    x,
    *(1, 0, 1, start),
    *firsts,
  )
  # Chunks hold 64 columns of each segment, and then 64 more of each.
  segment, column = np.arange(SEGMENTS)[:, None], np.arange(columns)
  rows = table[:, what._element(segment, column)].astype(np.float32)
  found = _rows_of_x(x.value, 1 + sequences, columns).astype(np.float32)
  expected = (rows * gain[1]).astype(bfloat16).astype(np.float32)
  np.testing.assert_array_equal(found[1:], expected)
  assert not found[0].any()
  total = np.square(rows).sum((1, 2))
  np.testing.assert_allclose(squares.value.sum(1), total, rtol=1e-4)
  whole = rows.reshape(sequences, -1)
  np.testing.assert_array_equal(
    residual.value[1:], whole[:, start : start + own]
  )


def test_threads_without_anything_to_do_must_be_seen_to():
  with pytest.raises(ValueError, match="384 is not a multiple of 256"):
    threads.turns(384, 256)
