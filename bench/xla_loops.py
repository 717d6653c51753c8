"""Loops of the step in `bench.xla_step`, and the variants that are timed."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

import ffjax
from bench import checks, loops, xla_step
from bench.loops import LoopRun
from bench.xla_step import State, Variant, Weights
from ffjax import stepping
from ffjax.cache import KVCache

# By name: how the step is written, and whether the loop is the device's.
VARIANTS = {
  "xla: sum": (Variant("sum", joined=False), True),
  "xla: sum, joined": (Variant("sum", joined=True), True),
  "xla: sum, joined, loop on the host": (Variant("sum", joined=True), False),
  "xla: dot, joined": (Variant("dot", joined=True), True),
}

_one_step = jax.jit(xla_step.step, static_argnums=(0, 1), donate_argnums=3)


@functools.partial(
  jax.jit,
  static_argnames=("config", "variant", "num_steps"),
  donate_argnames=("state",),
)
def device_loop(
  config: ffjax.LlamaConfig,
  variant: Variant,
  weights: Weights,
  state: State,
  num_steps: int,
) -> tuple[State, jax.Array]:
  """Runs steps; returns the last state and the tokens `[num_steps]`."""

  def body(
    i: jax.Array, carry: tuple[State, jax.Array]
  ) -> tuple[State, jax.Array]:
    state, tokens = carry
    _, state = xla_step.step(config, variant, weights, state)
    return state, tokens.at[i].set(state.token_id)

  tokens = jnp.zeros((num_steps,), jnp.int32)
  return jax.lax.fori_loop(0, num_steps, body, (state, tokens))


def host_loop(
  config: ffjax.LlamaConfig,
  variant: Variant,
  weights: Weights,
  state: State,
  num_steps: int,
) -> tuple[State, jax.Array]:
  """Does the same with one launch of a step at a time, which overlap."""
  tokens = []
  for _ in range(num_steps):
    _, state = _one_step(config, variant, weights, state)
    # A copy: the state is donated to the next step.
    tokens.append(jnp.copy(state.token_id))
  return state, jnp.stack(tokens)


def steps(
  config: ffjax.LlamaConfig, variant: Variant, weights: Weights
) -> checks.Steps:
  """Returns the steps that `checks.Checker.steps` runs."""

  def run(cache: KVCache, token_ids: np.ndarray) -> np.ndarray:
    state = xla_step.state_of(cache, jnp.int32(0))
    logits = []
    for token_id in token_ids[0]:
      state = state._replace(token_id=jnp.int32(token_id))
      one, state = _one_step(config, variant, weights, state)
      logits.append(np.asarray(one)[None])
    return np.stack(logits)

  return run


def time_loop(
  name: str,
  model: ffjax.Model,
  weights: Weights,
  token_ids: np.ndarray,
  num_steps: int,
  capacity: int,
) -> LoopRun:
  """Runs a prefill by the reference and a loop of a variant.

  Raises:
    CheckFailedError: if what was emitted are not that many token ids.
  """
  variant, on_device = VARIANTS[name]
  begin = time.perf_counter()
  lengths = np.full(1, token_ids.shape[1], np.int32)
  prefilled = stepping.prefill(
    model, token_ids, lengths, capacity=capacity, stop_on_eos=False
  )
  state = xla_step.state_of(prefilled.cache, prefilled.token_ids[0])
  del prefilled
  jax.block_until_ready(state)
  middle = time.perf_counter()
  loop = device_loop if on_device else host_loop
  _, tokens = loop(model.config, variant, weights, state, num_steps)
  emitted = np.asarray(tokens)
  end = time.perf_counter()
  loops.check_tokens(emitted, (num_steps,), model.config.vocab_size)
  return LoopRun(middle - begin, end - middle, emitted)
