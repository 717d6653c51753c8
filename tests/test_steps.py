"""Tests of what goes on from launch to launch, with a launch that is not one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax import stepping
from ffjax.cache import KVCache
from ffjax.sampling import Sampling
from pallas_kernels import steps

_CAPACITY = 12


@pytest.mark.parametrize("eos_token_ids", [(), (3,), (0, 5, 7)])
def test_sequences_advance_as_in_the_loop(make_config, eos_token_ids):
  config = make_config(eos_token_ids=eos_token_ids)
  rng = np.random.default_rng(0)
  num = 200
  token_ids, chosen = rng.integers(0, 9, (2, num), np.int32)
  active = rng.integers(0, 2, num).astype(bool)
  # Inactive ones may have any length.
  lengths = rng.integers(0, _CAPACITY, num, np.int32)
  none = jnp.zeros((1, num, 1, _CAPACITY, 1))
  state = stepping.DecodeState(
    cache=KVCache(k=none, v=none, lengths=jnp.asarray(lengths + active)),
    token_ids=jnp.asarray(token_ids),
    finished=jnp.asarray(~active),
    keys=jnp.zeros(num),
    seen=None,
  )
  after = stepping._with_next_token(
    ffjax.Model(params={}, config=config),
    state,
    jnp.zeros((num, 9)),
    Sampling(),
    True,
    jnp.asarray(chosen),
  )
  found = steps.advance(
    token_ids,
    np.where(active, lengths, 0),
    active.astype(np.int32),
    chosen,
    _CAPACITY,
    eos_token_ids,
  )
  goes_on = ~np.asarray(after.finished)
  assert 0 < goes_on.sum() < active.sum()
  expected = after.token_ids, np.where(goes_on, lengths + 1, 0), goes_on
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, theirs)


def _counting(operands):
  """A launch whose next token is one more; words count launches."""
  progress, emitted = operands["progress"], operands["emitted"]
  token_ids, positions, active, clock = progress
  chosen = token_ids + 1
  now = clock[0]
  goes_on = (active[:2] > 0).any() & (now < clock[1])
  sequences = steps.advance(token_ids, positions, active, chosen, _CAPACITY, ())
  changed = dict(
    progress=jnp.stack([*sequences, clock.at[0].add(1)]),
    emitted=emitted.at[now].set(jnp.where(active > 0, chosen, -1)),
  )
  changed = {
    name: jnp.where(goes_on, x, operands[name]) for name, x in changed.items()
  }
  rest = {name: operands[name] for name in ("k_cache", "v_cache")}
  return None, changed | rest | dict(words=operands["words"] + 1)


@pytest.mark.parametrize("num_steps", [-1, 0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize("launches", [1, 4, 32])
def test_launches_come_in_blocks(num_steps, launches, monkeypatch):
  monkeypatch.setattr(steps, "LAUNCHES_PER_LOOK", launches)
  max_steps = 20
  # The first one ends after 3 steps, the second one after 9. What is beyond the
  # batch is never looked at.
  active = np.asarray([1, 1, *[1] * 6])
  positions = np.asarray([_CAPACITY - 3, _CAPACITY - 9, *[0] * 6])
  token_ids = np.asarray([10, 20, *[0] * 6])
  clock = np.asarray([0, num_steps, *[0] * 6])
  operands = dict(
    progress=jnp.asarray([token_ids, positions, active, clock], jnp.int32),
    emitted=jnp.full((max_steps, 8), -1, jnp.int32),
    words=jnp.int32(0),
    k_cache=jnp.zeros(3),
    v_cache=jnp.zeros(3),
  )
  last = steps.run(_counting, 2, operands)
  most = max(0, min(num_steps, 9))
  expected = np.full((max_steps, 2), -1)
  for b, num in enumerate((min(3, most), most)):
    expected[:num, b] = token_ids[b] + 1 + np.arange(num)
  np.testing.assert_array_equal(last["emitted"][:, :2], expected)
  assert last["progress"][3].tolist()[:2] == [most, num_steps]
  block = min(launches, max_steps)
  assert int(last["words"]) == -(-most // block) * block


def test_a_block_is_traced_once(monkeypatch):
  traced = []

  def launch(operands):
    traced.append(1)
    return _counting(operands)

  shapes = dict(
    progress=(4, 8), emitted=(64, 8), words=(), k_cache=(), v_cache=()
  )
  operands = {
    name: jax.ShapeDtypeStruct(shape, jnp.int32)
    for name, shape in shapes.items()
  }
  lowered = jax.jit(lambda x: steps.run(launch, 2, x)).lower(operands)
  assert len(traced) == 1
  calls = lowered.as_text().count("call @launch")
  assert calls == steps.LAUNCHES_PER_LOOK
