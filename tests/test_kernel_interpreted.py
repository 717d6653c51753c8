"""Tests of the kernel itself on a CPU, in Pallas' interpreter.

The whole body runs: stream, barriers, words, every phase. What it gives is
compared with the same step in plain `jnp`, from weights that were never packed.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import interpreter

if interpreter.missing():
  pytest.skip(interpreter.missing(), allow_module_level=True)

from interpreted_step import (
  NINE_CTAS,
  TINY,
  WIDE,
  Case,
  assert_close,
  check,
  cos_sin,
  interpret,
  launch,
  make_step,
  pack,
  plan_of,
  progress_of,
  reference,
)

from pallas_kernels import kernel
from pallas_kernels import plan as plan_lib
from pallas_kernels.geometry import CHUNK_BYTES
from pallas_kernels.parts import Part
from pallas_kernels.plan import make_plan

_F32, _BF16 = jnp.float32, jnp.bfloat16

_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)
_WIDE_LAYER = dataclasses.replace(
  WIDE, num_hidden_layers=1, num_attention_heads=4
)


def _group(size):
  """Returns a model of one layer with so many queries per KV head."""
  return dataclasses.replace(_LAYER, num_attention_heads=size)


_ONE = Case(TINY, 1, 128, (70,))
_FOUR = Case(TINY, 4, 128, (70,))
_CASES = {
  "one CTA": _ONE,
  "four CTAs": _FOUR,
  "first token": Case(TINY, 4, 128, (0,)),
  "two sequences": Case(TINY, 4, 128, (64, 127), (True, True)),
  "an idle sequence": Case(TINY, 2, 128, (0, 100), (False, True)),
  "wide heads, three CTAs": Case(WIDE, 3, 64, (40,)),
  "wide heads, two sequences": Case(WIDE, 3, 128, (3, 90), (True, True)),
  "a CTA without a part in the layers": NINE_CTAS,
  "keys of a head split": Case(TINY, 4, 512, (500,)),
  # Parts come in two batches, and the last tile is not full.
  "eight splits, groups of 8": Case(_group(8), 8, 2048, (1990,)),
  "seven splits, groups of 1": Case(_group(1), 7, 1792, (1791,)),
  "five splits, wide heads": Case(_WIDE_LAYER, 5, 1280, (1270,)),
  "two compute warpgroups": Case(TINY, 1, 128, (70,), compute_wgs=2),
  # Uneven runs, several items of attention, and sequences that do not divide.
  "two compute warpgroups, three sequences": Case(
    WIDE, 3, 128, (3, 90, 64), (True, False, True), compute_wgs=2
  ),
  "two compute warpgroups, a CTA without a part in the layers": (
    dataclasses.replace(NINE_CTAS, compute_wgs=2)
  ),
  "two compute warpgroups, keys of a head split": Case(
    TINY, 4, 512, (500,), compute_wgs=2
  ),
  "eight sequences": Case(
    _group(4),
    4,
    384,
    (0, 63, 64, 130, 383, 257, 320, 7),
    (True, True, False, True, True, True, True, True),
    compute_wgs=2,
  ),
}


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES.keys())
def test_step_equals_plain_jnp(case):
  check(case)


# The last tile is full, or all but; nothing is left over of the last round, or
# all but one tile.
@pytest.mark.parametrize("position", [20, 127, 150, 255, 256, 300, 575])
def test_rounds_of_one_to_nine_tiles(position):
  case = Case(_LAYER, 1, 576, (position,))
  assert make_plan(case.geometry, 1, 576, 1).tiles_at_once == 4
  check(case)


@pytest.mark.parametrize(
  ("geometry", "at_once"), [(_LAYER, 2), (_WIDE_LAYER, 1)]
)
def test_rounds_are_shorter_where_the_ring_is(geometry, at_once, monkeypatch):
  fixed = make_plan(geometry, 1, 192, 1).fixed_smem_bytes
  monkeypatch.setattr(plan_lib, "SMEM_BYTES", fixed + 3 * CHUNK_BYTES)
  plan = make_plan(geometry, 1, 192, 1)
  assert (plan.num_slots, plan.tiles_at_once) == (3, at_once)
  check(Case(geometry, 1, 192, (170,)))


# Those before the new key fill half of the last tile, or all of it but one key.
@pytest.mark.parametrize("position", [31, 32, 33, 96, 97])
@pytest.mark.parametrize("geometry", [_LAYER, _WIDE_LAYER])
def test_half_of_the_last_tile_is_loaded_if_that_is_enough(geometry, position):
  check(Case(geometry, 1, 128, (position,)))


@pytest.mark.parametrize(
  ("splits", "at_once"), [(1, 1), (2, 1), (3, 2), (9, 5)]
)
def test_no_more_parts_are_merged_at_once_than_there_are(splits, at_once):
  assert Part(64, 4, splits).at_once == at_once


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
def test_the_words_of_a_part_are_all_different(head_dim, group):
  part = Part(head_dim, group, 16)
  row, col = np.mgrid[:64, : 2 * part.pairs]
  found = [part.most(col[0]), part.total(col[0])]
  found += [part.value(n, row, col).ravel() for n in range(part.blocks)]
  found = np.concatenate(found)
  np.testing.assert_array_equal(np.sort(found), np.arange(part.num_words))
  # What a thread loads at once begins on 16 bytes.
  assert part.num_words % 2 == 0
  assert (part.value(0, row[:, ::2], col[:, ::2]) % 2 == 0).all()


@pytest.mark.parametrize("positions", [(40,), (63, 5)])
def test_activations_come_in_blocks_where_they_are_too_many(
  positions, monkeypatch
):
  # Three chunks of columns, of which two fit: the last block is shorter.
  monkeypatch.setattr(plan_lib, "X_BYTES", 4096 * len(positions))
  g = dataclasses.replace(TINY, num_hidden_layers=1, intermediate_size=2100)
  case = Case(g, 3, 64, positions, (True,) * len(positions))
  plan = plan_lib.make_plan(g, len(positions), 64, 3)
  assert plan.num_blocks(plan.schedule.down) == 2
  assert plan.block_chunks(plan.schedule.down) == 2
  check(case)


def test_what_lies_beyond_the_position_is_never_used():
  # Anything finite, that is: the tile of values is multiplied with zeros there.
  s = make_step(_FOUR)
  largest = jnp.finfo(_BF16).max
  beyond = jnp.arange(_FOUR.capacity) >= _FOUR.positions[0]
  for name in ("k_cache", "v_cache"):
    cache = getattr(s, name)
    noise = jnp.where(
      beyond[None, None, None, :, None], jnp.full_like(cache, largest), cache
    )
    setattr(s, name, noise)
  (logits, _), _ = interpret(_FOUR, s, detect_races=False)
  assert_close(logits, np.asarray(reference(_FOUR, s)[0]))


# ---- several steps ---------------------------------------------------------

# They end by a token, have ended, fill the cache, go on.
_FOUR_ENDS = Case(
  # The tokens after these are not the same ones.
  dataclasses.replace(TINY, tie_word_embeddings=False),
  *(2, 64),
  positions=(3, 0, 63, 5),
  active=(True, False, True, True),
)


@pytest.fixture(scope="module")
def two_steps():
  """A plan, operands of the first of two steps, and what launches the kernel."""
  case, plan = _FOUR_ENDS, plan_of(_FOUR_ENDS)
  s = make_step(case)
  operands = pack(case, plan, s)
  positions = np.pad(case.positions, (0, 4))
  angles = [jnp.stack(cos_sin(TINY, positions + n)) for n in range(2)]
  eos = int(np.argmax(reference(case, s)[0][0]))
  operands |= dict(
    progress=progress_of(s.token_ids, case.positions, case.active, 0, 2),
    angles=jnp.stack(angles),
    words=jnp.zeros_like(operands["words"]),
  )

  def run(operands, **kwargs):
    logits, changed, races = launch(
      plan, operands, eos_token_ids=(eos,), **kwargs
    )
    assert not races
    return logits, {name: np.asarray(x) for name, x in changed.items()}

  return operands, eos, run


def _expect_progress(changed, rows, clock):
  progress = changed["progress"]
  np.testing.assert_array_equal(progress[:3, :4], rows)
  np.testing.assert_array_equal(progress[3, :2], clock)


def _bits(x):
  return np.asarray(x).view(np.uint8)


def test_steps_follow_each_other(two_steps):
  operands, eos, run = two_steps
  before = np.asarray(operands["progress"])[:, :4]
  _, first = run(operands)
  logits, second = run(operands | first)
  ids = first["progress"][0, :4]
  assert ids[0] == eos
  assert (ids[2:] != eos).all()
  assert (ids[[0, 2, 3]] != before[0, [0, 2, 3]]).all()
  assert ids[1] == before[0, 1]
  _expect_progress(first, [ids, [0, 0, 0, 6], [0, 0, 0, 1]], (1, 2))
  last = second["progress"][0, 3]
  assert last != eos
  _expect_progress(
    second, [[*ids[:3], last], [0, 0, 0, 7], [0, 0, 0, 1]], (2, 2)
  )
  np.testing.assert_array_equal(
    second["emitted"][:, :4], [[eos, -1, *ids[2:]], [-1, -1, -1, last]]
  )
  # A step of its own, from words that are zero.
  progress = first["progress"].copy()
  progress[3, :2] = 0, 1
  alone = dict(progress=jnp.asarray(progress), angles=operands["angles"][::-1])
  logits_alone, one = run(
    operands | first | alone | dict(words=operands["words"])
  )
  np.testing.assert_array_equal(logits[3], logits_alone[3])
  _expect_progress(one, second["progress"][:3, :4], (1, 1))
  for name in ("k_cache", "v_cache"):
    np.testing.assert_array_equal(_bits(one[name]), _bits(second[name]))


def test_without_logits_all_else_is_the_same(two_steps):
  operands, _, run = two_steps
  _, expected = run(operands)
  logits, changed = run(operands, with_logits=False)
  assert logits is None
  for name, x in expected.items():
    np.testing.assert_array_equal(_bits(changed[name]), _bits(x))


@pytest.mark.parametrize("nothing", ["active", "left"])
def test_with_nothing_to_do_nothing_changes(two_steps, nothing):
  operands, _, run = two_steps
  progress = np.array(operands["progress"])
  if nothing == "active":
    progress[2] = 0
  else:
    progress[3, :2] = 2
  operands = operands | dict(progress=jnp.asarray(progress))
  _, after = run(operands)
  for name, x in after.items():
    before = np.asarray(operands[name])
    if name == "progress":
      _expect_progress(after, before[:3, :4], before[3, :2])
    else:
      np.testing.assert_array_equal(_bits(x), _bits(before))


# ---- the extension of the interpreter itself -------------------------------


class _NeverFrees(kernel.Cta):
  def free(self, i):
    # One slot is never given back, and the stream waits for it.
    @pl.when(i > 0)
    def _():
      kernel.Cta.free(self, i)


def test_a_deadlock_at_a_barrier_is_an_error(monkeypatch):
  monkeypatch.setattr(interpreter, "DEADLOCK_S", 1.0)
  with pytest.raises(Exception, match="deadlock: Barrier"):
    interpret(_ONE, make_step(_ONE), cta_class=_NeverFrees)
  interpreter.reset()
