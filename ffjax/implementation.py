"""The implementations of a decode step, and which of them can run here.

An implementation maps one new token per sequence and the cache to logits and
the extended cache. All share the cache's layout, so that one can take over
from another in the middle of a sequence; prompts always go through the
reference.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.cache import KVCache
from ffjax.errors import RequestError
from ffjax.model import Llama
from ffjax.params import Model

Step = Callable[
  [Model, jax.Array, jax.Array, KVCache], tuple[jax.Array, KVCache]
]


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to run a decode step.

  Attributes:
    name: what users pass as `implementation`.
    dtype: dtype of activations and cache for a model.
    missing: says what this machine lacks to run it, or None if nothing.
    step: `step(model, token_ids, active, cache)` with token ids `[B]` and
      `active` `[B]` bool returns float32 logits `[B, V]` and the cache, longer
      by one token where active; what it says of the other sequences has no
      meaning.
  """

  name: str
  dtype: Callable[[Model], np.dtype]
  missing: Callable[[], str | None]
  step: Step


def reference_hidden(
  model: Model,
  token_ids: jax.Array,
  num_tokens: jax.Array,
  cache: KVCache,
) -> tuple[jax.Array, KVCache]:
  """Runs the reference layers in the cache's dtype; see `Llama.__call__`."""
  llama = Llama(model.config, cache.k.dtype)
  variables = {"params": model.params}
  hidden, extended = llama.apply(variables, token_ids, num_tokens, cache)
  assert isinstance(extended, KVCache)
  return jnp.asarray(hidden), extended


def reference_logits(model: Model, hidden: jax.Array) -> jax.Array:
  """Maps hidden states `[B, D]` to float32 logits `[B, V]`."""
  llama = Llama(model.config, hidden.dtype)
  logits = llama.apply({"params": model.params}, hidden, method="logits")
  return jnp.asarray(logits)


def _reference_step(
  model: Model, token_ids: jax.Array, active: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  hidden, cache = reference_hidden(
    model, token_ids[:, None], active.astype(jnp.int32), cache
  )
  return reference_logits(model, hidden[:, 0]), cache


def _fused_step(
  model: Model, token_ids: jax.Array, active: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  raise NotImplementedError  # `resolve` refuses before this.


_IMPLEMENTATIONS = {
  implementation.name: implementation
  for implementation in (
    Implementation(
      name="reference",
      dtype=lambda model: model.dtype,
      missing=lambda: None,
      step=_reference_step,
    ),
    # The same in float32, whatever the weights: what errors are measured from.
    Implementation(
      name="reference_float32",
      dtype=lambda model: np.dtype(np.float32),
      missing=lambda: None,
      step=_reference_step,
    ),
    Implementation(
      name="fused",
      dtype=lambda model: model.dtype,
      missing=lambda: "this version of ffjax does not have the kernel yet",
      step=_fused_step,
    ),
  )
}
# What "auto" tries, fastest first.
_PREFERENCE = ("fused", "reference")

NAMES = ("auto", *_IMPLEMENTATIONS)


@functools.cache
def resolve(name: str) -> Implementation:
  """Returns the implementation of that name; `"auto"` is the fastest one.

  Raises:
    RequestError: if there is none, or if it cannot run here; the message says
      what is missing. A named implementation is never replaced by another.
  """
  if name == "auto":
    return next(
      _IMPLEMENTATIONS[candidate]
      for candidate in _PREFERENCE
      if _IMPLEMENTATIONS[candidate].missing() is None
    )
  if not isinstance(name, str) or name not in _IMPLEMENTATIONS:
    raise RequestError(
      f"implementation={name!r} does not exist (there are: {', '.join(NAMES)})"
    )
  missing = _IMPLEMENTATIONS[name].missing()
  if missing is not None:
    raise RequestError(f"implementation={name!r} cannot run: {missing}")
  return _IMPLEMENTATIONS[name]
