"""The joints of decoding, each a pure function from arrays to arrays.

`forward` extends a cache and returns logits; `prefill` starts sequences;
`decode_step` maps state to state; `decode_steps` is the whole loop as one
call. All but `forward` are jitted and donate the cache they are given; inside
another `jax.jit` they are inlined.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

from ffjax import device_memory
from ffjax.cache import KVCache
from ffjax.errors import RequestError
from ffjax.implementation import (
  reference_hidden,
  reference_logits,
  resolve,
)
from ffjax.params import Model
from ffjax.sampling import Sampling, choose
from pallas_kernels.steps import NO_TOKEN

# Tokens of a prompt that run at a time: enough that reading, or unpacking, the
# weights is the smaller part of the work.
_MAX_CHUNK = 2048
# Of all sequences, so that activations stay small.
_MAX_CHUNK_TOKENS = 8192
# Chunks longer than this are a multiple of it.
_CHUNK_MULTIPLE = 64

# Steps between two looks at whether all sequences have finished, on a GPU, where
# each look is a wait for the host. An implementation's own steps look as they
# like.
_STEPS_PER_LOOK = 8


@struct.dataclass
class DecodeState:
  """Everything that changes from token to token.

  Attributes:
    cache: keys and values of all tokens but the newest.
    token_ids: `[B]` int32, the newest token of each sequence, not yet in the
      cache.
    finished: `[B]` bool; a finished sequence no longer changes.
    keys: `[B]` random keys.
    seen: `[B, V]` bool, tokens so far, or None if the sampling does not
      depend on them.
  """

  cache: KVCache
  token_ids: jax.Array
  finished: jax.Array
  keys: jax.Array
  seen: jax.Array | None


def chunk_length(batch: int, num_tokens: int) -> int:
  """Returns how many prompt tokens of each sequence to run at a time.

  The number of chunks is the least that memory allows, and they are of about
  equal length.
  """
  most = min(_MAX_CHUNK, max(1, _MAX_CHUNK_TOKENS // batch))
  num_chunks = -(-num_tokens // most)
  needed = -(-num_tokens // num_chunks)
  if needed < _CHUNK_MULTIPLE:
    return min(most, 1 << (needed - 1).bit_length())
  return min(most, -(-needed // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)


def forward(
  model: Model, token_ids: jax.Array, lengths: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  """Runs new tokens of each sequence by the reference, chunk by chunk.

  Args:
    model: the model.
    token_ids: `[B, T]` int32 in `[0, V)`, padded at the end.
    lengths: `[B]` int32 in `[0, T]`, tokens that are not padding.
    cache: with room for them; its dtype is that of the activations.

  Returns:
    Float32 logits `[B, V]` after each sequence's last new token (meaningless
    where there is none) and the extended cache.
  """
  # Under x64 NumPy's own integers are 64 bits wide.
  token_ids, lengths = jnp.int32(token_ids), jnp.int32(lengths)
  b, t = token_ids.shape
  chunk = chunk_length(b, t)
  num_chunks = -(-t // chunk)
  token_ids = jnp.pad(token_ids, ((0, 0), (0, num_chunks * chunk - t)))
  chunks = token_ids.reshape(b, num_chunks, chunk).swapaxes(0, 1)
  starts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk

  def run_chunk(
    carry: tuple[KVCache, jax.Array], xs: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[KVCache, jax.Array], None]:
    cache, last = carry
    ids, start = xs
    num_tokens = jnp.clip(lengths - start, 0, chunk)
    hidden, cache = reference_hidden(model, ids, num_tokens, cache)
    index = lengths - 1 - start
    inside = (index >= 0) & (index < chunk)
    here = jnp.take_along_axis(
      hidden, jnp.clip(index, 0, chunk - 1)[:, None, None], axis=1
    )[:, 0]
    return (cache, jnp.where(inside[:, None], here, last)), None

  last = jnp.zeros((b, model.config.hidden_size), cache.k.dtype)
  (cache, last), _ = jax.lax.scan(run_chunk, (cache, last), (chunks, starts))
  return reference_logits(model, last), cache


@functools.partial(
  jax.jit,
  static_argnames=("capacity", "implementation", "stop_on_eos"),
  donate_argnames=("cache",),
)
def prefill(
  model: Model,
  token_ids: jax.Array,
  lengths: jax.Array,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  *,
  capacity: int | None = None,
  cache: KVCache | None = None,
  implementation: str = "reference",
  stop_on_eos: bool = True,
) -> DecodeState:
  """Runs the prompts and chooses the first new token of each.

  Jitted; donates `cache`. Being traced, it cannot check values: ids and lengths
  out of range give meaningless tokens, where `generate` raises.

  Args:
    model: the model.
    token_ids: `[B, T]` int32 in `[0, V)`, padded at the end.
    lengths: `[B]` int32 in `[1, T]`, prompt lengths.
    sampling: how to choose.
    capacity: S of a new cache, room for prompts and everything after.
    cache: a cache to continue instead, for example `state.cache`, which lacks
      only the newest token. A repetition penalty then knows only the tokens
      given here.
    implementation: what will run the steps; decides the new cache's dtype.
    stop_on_eos: whether an eos token ends a sequence.

  Returns:
    The state after the prompts.
  """
  config = model.config
  b = token_ids.shape[0]
  if (cache is None) == (capacity is None):
    raise RequestError("prefill needs either capacity or cache")
  if capacity is not None and capacity < 1:
    raise RequestError(f"capacity={capacity} must be at least 1")
  if capacity is not None:
    dtype = resolve(implementation, model).dtype(model)
    cache = KVCache.create(config, b, capacity, dtype)
  assert cache is not None
  resolve(implementation, model, cache)  # Refuses what no step could take.
  logits, cache = forward(model, token_ids, lengths, cache)
  seen = None
  if sampling.remembers:
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    step = jnp.arange(token_ids.shape[1], dtype=jnp.int32)[None, :]
    ids = jnp.where(step < lengths[:, None], token_ids, config.vocab_size)
    seen = jnp.zeros((b, config.vocab_size), bool)
    seen = seen.at[rows, ids].set(True, mode="drop")
  state = DecodeState(
    cache=cache,
    token_ids=jnp.zeros((b,), jnp.int32),
    finished=jnp.zeros((b,), bool),
    keys=sampling.keys(b),
    seen=seen,
  )
  return _with_next_token(model, state, logits, sampling, stop_on_eos)


def _with_next_token(
  model: Model,
  state: DecodeState,
  logits: jax.Array,
  sampling: Sampling,
  stop_on_eos: bool,
  greedy_ids: jax.Array | None = None,
) -> DecodeState:
  """Chooses the next token of the sequences that have not finished."""
  lengths, seen = state.cache.lengths, state.seen
  token_ids = choose(logits, sampling, state.keys, lengths, seen, greedy_ids)
  token_ids = jnp.where(state.finished, state.token_ids, token_ids)
  if seen is not None:
    rows = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    seen = seen.at[rows, token_ids].set(True)
  # A full cache ends a sequence too: the newest token would have no slot.
  finished = state.finished | (lengths >= state.cache.capacity)
  if stop_on_eos:
    for eos in model.config.eos_token_ids:
      finished |= token_ids == eos
  return dataclasses.replace(
    state, token_ids=token_ids, finished=finished, seen=seen
  )


def _step(
  model: Model,
  state: DecodeState,
  sampling: Sampling,
  implementation: str,
  stop_on_eos: bool,
) -> DecodeState:
  step = resolve(implementation, model, state.cache).step
  out = step(model, state.token_ids, ~state.finished, state.cache)
  state = dataclasses.replace(state, cache=out.cache)
  return _with_next_token(
    model, state, out.logits, sampling, stop_on_eos, out.greedy_ids
  )


@functools.partial(
  jax.jit,
  static_argnames=("implementation", "stop_on_eos"),
  donate_argnames=("state",),
)
def decode_step(
  model: Model,
  state: DecodeState,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  *,
  implementation: str = "reference",
  stop_on_eos: bool = True,
) -> DecodeState:
  """Runs the newest tokens and chooses the next ones.

  Jitted; donates `state`.

  Args:
    model: the model.
    state: from `prefill` or an earlier step.
    sampling: how to choose; with the same options on as for `prefill`.
    implementation: what runs the step.
    stop_on_eos: whether an eos token ends a sequence.

  Returns:
    The next state. Finished sequences are as they were.
  """
  return _step(model, state, sampling, implementation, stop_on_eos)


def _looks_are_costly(implementation: str, model: Model) -> bool:
  # Compiled for a GPU that is elsewhere, the kernel is still the kernel.
  is_fused = resolve(implementation, model).name == "fused"
  return is_fused or device_memory.default_device().platform != "cpu"


@functools.partial(
  jax.jit,
  static_argnames=("max_steps", "implementation", "stop_on_eos"),
  donate_argnames=("state",),
)
def decode_steps(
  model: Model,
  state: DecodeState,
  num_steps: int | jax.Array,
  sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
  *,
  max_steps: int,
  implementation: str = "reference",
  stop_on_eos: bool = True,
) -> tuple[DecodeState, jax.Array]:
  """Runs steps until all sequences have finished, as one device loop.

  Jitted; donates `state`. On a GPU the loop looks every few steps whether all
  have finished; those that it runs too many change nothing. If the choice is
  greedy and nothing else, an implementation may have a loop of its own.

  Args:
    model: the model.
    state: from `prefill` or an earlier step.
    num_steps: how many steps at most, traced; at most `max_steps`.
    sampling: how to choose; with the same options on as for `prefill`.
    max_steps: length of the output, static.
    implementation: what runs the steps.
    stop_on_eos: whether an eos token ends a sequence.

  Returns:
    The last state, and the new tokens `[B, max_steps]` int32, -1 where there
    is none.
  """
  greedy_steps = resolve(implementation, model, state.cache).greedy_steps
  if (
    greedy_steps is not None
    and sampling.greedy
    and not sampling.remembers
    and state.seen is None
  ):
    out = greedy_steps(
      model,
      state.token_ids,
      ~state.finished,
      state.cache,
      jnp.int32(num_steps),
      max_steps=max_steps,
      eos_token_ids=model.config.eos_token_ids if stop_on_eos else (),
    )
    state = dataclasses.replace(
      state, cache=out.cache, token_ids=out.token_ids, finished=~out.active
    )
    return state, out.emitted.T

  Carry = tuple[jax.Array, DecodeState, jax.Array]
  new_tokens = jnp.full(
    (state.token_ids.shape[0], max_steps), NO_TOKEN, jnp.int32
  )

  # Traced once, though it is in two loops.
  one_step = jax.jit(
    functools.partial(
      _step, implementation=implementation, stop_on_eos=stop_on_eos
    )
  )

  def step(carry: Carry) -> Carry:
    i, state, new_tokens = carry
    was_finished = state.finished
    state = one_step(model, state, sampling)
    emitted = jnp.where(was_finished, NO_TOKEN, state.token_ids)
    new_tokens = jax.lax.dynamic_update_slice_in_dim(
      new_tokens, emitted[:, None], i, axis=1
    )
    return i + 1, state, new_tokens

  def goes_on(steps: int, carry: Carry) -> jax.Array:
    i, state, _ = carry
    last = i + steps
    return (last <= num_steps) & (last <= max_steps) & ~jnp.all(state.finished)

  def steps(carry: Carry) -> Carry:
    # Once all have finished, a step changes nothing.
    return jax.lax.fori_loop(0, _STEPS_PER_LOOK, lambda _, c: step(c), carry)

  carry = (jnp.int32(0), state, new_tokens)
  if _looks_are_costly(implementation, model) and max_steps >= _STEPS_PER_LOOK:
    several = functools.partial(goes_on, _STEPS_PER_LOOK)
    carry = jax.lax.while_loop(several, steps, carry)
  _, state, new_tokens = jax.lax.while_loop(
    functools.partial(goes_on, 1), step, carry
  )
  return state, new_tokens
