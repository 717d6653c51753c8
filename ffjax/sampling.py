"""Logits to token ids: greedy, or sampled by a seed.

Up the flow: an implementation's logits; down the flow: the decode loop. The
filters act in the order, and with the meaning, of Hugging Face transformers'
`generate`: repetition penalty, temperature, top-k, top-p, min-p.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ffjax.errors import RequestError

_OFF = -jnp.inf


@struct.dataclass
class Sampling:
  """How the next token is chosen; the default is greedy.

  A pytree: which options are on is static, their values are traced, so that
  another temperature or seed compiles nothing.

  Attributes:
    temperature: divides the logits; None or 0 takes the most likely token.
    top_k: keep the k most likely tokens, and ties with the last of them.
    top_p: keep the most likely tokens whose probabilities first reach p.
    min_p: keep tokens at least this fraction as likely as the most likely.
    repetition_penalty: divides positive and multiplies negative logits of
      tokens that the prompt or the output already has (Keskar et al. 2019).
    seed: the same seed, prompt and position in the batch give the same tokens.

  Raises:
    RequestError: naming the option that is out of range.
  """

  temperature: float | jax.Array | None = None
  top_k: int | jax.Array | None = None
  top_p: float | jax.Array | None = None
  min_p: float | jax.Array | None = None
  repetition_penalty: float | jax.Array | None = None
  seed: int | jax.Array = 0

  def __post_init__(self) -> None:
    for name, number, accepts, wanted in (
      # The least normal float32: smaller ones are zero on the device.
      (
        "temperature",
        float,
        lambda x: x == 0 or 1.2e-38 < x < 3e38,
        "0 or a positive float32",
      ),
      ("top_k", int, lambda x: 1 <= x < 2**31, "an integer from 1"),
      ("top_p", float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
      ("min_p", float, lambda x: 0 <= x <= 1, "from 0 to 1"),
      (
        "repetition_penalty",
        float,
        lambda x: 1.2e-38 < x < 3e38,
        "a positive float32",
      ),
      ("seed", int, lambda x: 0 <= x < 2**31, "from 0 to 2**31 - 1"),
    ):
      value = _concrete(getattr(self, name))
      if isinstance(value, str | bytes | bool | list | tuple | dict):
        raise RequestError(f"{name}={value!r} must be a number")
      if not isinstance(value, int | float):
        continue  # None, a tracer, or what JAX puts in its place.
      if not accepts(value) or number(value) != value:
        raise RequestError(f"{name}={value} must be {wanted}")
      # One type for each, so that 1 and 1.0 share a compilation.
      object.__setattr__(self, name, number(value))
    if isinstance(self.temperature, float) and self.temperature == 0:
      object.__setattr__(self, "temperature", None)

  @property
  def greedy(self) -> bool:
    """Whether no random number is drawn."""
    return self.temperature is None

  @property
  def remembers(self) -> bool:
    """Whether the choice depends on the tokens so far."""
    return self.repetition_penalty is not None

  def keys(self, batch: int) -> jax.Array:
    """Returns one random key per sequence, `[B]`."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
      jax.random.key(self.seed), jnp.arange(batch, dtype=jnp.uint32)
    )


def _concrete(value: Any) -> Any:
  """Returns the Python number in a NumPy or JAX scalar, if it is known."""
  if isinstance(value, jax.core.Tracer):
    return value
  scalar = isinstance(value, np.generic | np.ndarray | jax.Array)
  return value.item() if scalar and value.ndim == 0 else value


def choose(
  logits: jax.Array,
  sampling: Sampling,
  keys: jax.Array,
  positions: jax.Array,
  seen: jax.Array | None,
  greedy_ids: jax.Array | None = None,
) -> jax.Array:
  """Chooses the next token of each sequence.

  Args:
    logits: `[B, V]` float32.
    sampling: what to choose by.
    keys: `[B]`, from `Sampling.keys`.
    positions: `[B]` int32, the position that the token will have; every
      position draws its own random number, however it is reached.
    seen: `[B, V]` bool, tokens so far; needed if `sampling.remembers`.
    greedy_ids: `[B]` int32, where the largest logits are, the first of equals;
      None if the implementation did not say.

  Returns:
    Token ids `[B]` int32.
  """
  if sampling.repetition_penalty is not None:
    if seen is None:
      raise RequestError(
        "repetition_penalty needs the tokens so far: pass it to prefill too"
      )
    penalty = jnp.asarray(sampling.repetition_penalty, jnp.float32)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
  elif sampling.greedy and greedy_ids is not None:
    return greedy_ids
  if sampling.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / jnp.asarray(sampling.temperature, jnp.float32)
  draw_keys = jax.vmap(jax.random.fold_in)(keys, positions)
  if sampling.top_k is None and sampling.top_p is None:
    logits = _filter_min_p(logits, sampling)
    drawn = jax.vmap(jax.random.categorical)(draw_keys, logits)
    return drawn.astype(jnp.int32)
  # In order of likelihood every filter is a threshold.
  vocab = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
  falling, token_ids = jax.lax.sort(
    (-logits, jnp.broadcast_to(vocab, logits.shape)), num_keys=1
  )
  ranked = filter_ranked(-falling, sampling)
  rank = jax.vmap(jax.random.categorical)(draw_keys, ranked)
  return jnp.take_along_axis(token_ids, rank[:, None], axis=-1)[:, 0]


def filter_ranked(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """Switches off the tokens that top-k, top-p and min-p exclude.

  Args:
    logits: `[B, V]` float32, falling along V.
    sampling: the filters.

  Returns:
    `[B, V]`, with minus infinity for excluded tokens; the first stays.
  """
  if sampling.top_k is not None:
    last = jnp.minimum(sampling.top_k, logits.shape[-1]) - 1
    threshold = jax.lax.dynamic_slice_in_dim(logits, last, 1, axis=-1)
    logits = jnp.where(logits >= threshold, logits, _OFF)
  if sampling.top_p is not None:
    probs = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    logits = jnp.where(before < sampling.top_p, logits, _OFF)
  return _filter_min_p(logits, sampling)


def _filter_min_p(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """Switches off what min-p excludes; logits `[B, V]` in any order."""
  if sampling.min_p is None:
    return logits
  likeliest = jnp.max(logits, axis=-1, keepdims=True)
  kept = jnp.exp(logits - likeliest) >= sampling.min_p
  return jnp.where(kept, logits, _OFF)
