"""Tests of the kernel itself on a CPU, in Pallas' interpreter.

The whole body runs: stream, barriers, words, every phase. What it gives is
compared with the same step in plain `jnp`, from weights that were never packed.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
  interpret,
  make_step,
  reference,
)

from pallas_kernels import kernel
from pallas_kernels import plan as plan_lib

_F32, _BF16 = jnp.float32, jnp.bfloat16

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
}


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES.keys())
def test_step_equals_plain_jnp(case):
  check(case)


@pytest.mark.parametrize("positions", [(40,), (63, 5)])
def test_activations_come_in_blocks_where_they_are_too_many(
  positions, monkeypatch
):
  # Three chunks of columns, of which two fit: the last block is shorter.
  monkeypatch.setattr(plan_lib, "_X_BYTES", 4096 * len(positions))
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
  (logits, *_), _ = interpret(_FOUR, s, detect_races=False)
  assert_close(logits, np.asarray(reference(_FOUR, s)[0]))


# ---- the extension of the interpreter itself -------------------------------


class _NeverFrees(kernel.Cta):
  def consume(self, i, use):
    # One slot is never given back, and the stream waits for it.
    slot = lax.rem(i, jnp.int32(self.plan.num_slots))
    plgpu.barrier_wait(self.produced.at[slot])
    use(self.ring.at[slot])

    @pl.when(i > 0)
    def _():
      plgpu.barrier_arrive(self.consumed.at[slot])

    return i + 1


def test_a_deadlock_at_a_barrier_is_an_error(monkeypatch):
  monkeypatch.setattr(interpreter, "DEADLOCK_S", 1.0)
  with pytest.raises(Exception, match="deadlock: Barrier"):
    interpret(_ONE, make_step(_ONE), cta_class=_NeverFrees)
  interpreter.reset()
