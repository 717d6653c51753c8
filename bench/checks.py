"""Says whether what is timed is the model: logits against float32.

Three places count: the start of a sequence, by `decode.compare`; the end of the
prompt, in a cache of the size that is timed; and every step that is timed, fed with
the tokens that the timed loop gave. The limit is relative: what rounds to bfloat16
may err 1.5 times as much as the bfloat16 reference does.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import ffjax
from bench.harness import Check
from ffjax import decode, stepping
from ffjax.cache import KVCache
from ffjax.implementation import resolve

# Of the bfloat16 reference's own error.
MOST_ERROR = 1.5
# What the bfloat16 reference itself may err; where weights are random, it errs by
# 2 to 3% after 16 to 32 layers. At the start, with few keys, it errs more: by 12%
# after 80 layers; and the worst step more than the mean.
MOST_REFERENCE_ERROR = 0.1
_MOST_REFERENCE_ERROR_AT_START = 0.15
_MOST_REFERENCE_ERROR_OF_STEP = 0.2
_COMPARED_TOKENS = 16
_STEPS = 4
BASELINE = "reference_float32"

# From a cache and `[B, T]` tokens, fed one by one, to logits `[T, B, V]`. The
# cache stays as it is.
Steps = Callable[[KVCache, np.ndarray], np.ndarray]


@functools.partial(
  jax.jit, static_argnames=("implementation",), donate_argnames=("cache",)
)
def _step(
  model: ffjax.Model,
  token_ids: jax.Array,
  cache: KVCache,
  *,
  implementation: str,
) -> tuple[jax.Array, KVCache]:
  active = jnp.ones_like(token_ids, bool)
  step = resolve(implementation, model, cache).step
  out = step(model, token_ids, active, cache)
  return out.logits, out.cache


def implementation_steps(model: ffjax.Model, name: str) -> Steps:
  """Returns the steps of an implementation that users can name."""

  def steps(cache: KVCache, token_ids: np.ndarray) -> np.ndarray:
    dtype = resolve(name, model).dtype(model)
    # Copies, since the step overwrites its cache.
    cache = KVCache(
      k=jnp.array(cache.k, dtype, copy=True),
      v=jnp.array(cache.v, dtype, copy=True),
      lengths=jnp.array(cache.lengths, copy=True),
    )
    logits = []
    for ids in token_ids.T:
      one, cache = _step(model, jnp.asarray(ids), cache, implementation=name)
      logits.append(np.asarray(one))
    return np.stack(logits)

  return steps


def relative_error(logits: np.ndarray, baseline: np.ndarray) -> float:
  """Returns the root mean square difference over the baseline's."""
  exact = np.asarray(baseline, np.float64)
  difference = np.asarray(logits, np.float64) - exact
  return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def worst_error(logits: np.ndarray, baseline: np.ndarray) -> float:
  """Returns the largest `relative_error` of any step and sequence.

  Args:
    logits: `[T, B, V]`.
    baseline: likewise.
  """
  # Row by row, since a copy in float64 is large. NumPy's maximum, since Python's may
  # pass over what is no number.
  errors = [
    relative_error(row, exact)
    for rows, exact_rows in zip(logits, baseline, strict=True)
    for row, exact in zip(rows, exact_rows, strict=True)
  ]
  return float(np.max(errors))


def mean_kl(logits: np.ndarray, baseline: np.ndarray) -> float:
  """Returns the mean Kullback-Leibler divergence from the baseline, in nats."""
  p = _log_softmax(baseline)
  return float((np.exp(p) * (p - _log_softmax(logits))).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  x = np.asarray(logits, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclasses.dataclass
class Checker:
  """Checks candidates on one model; computes what they share only once.

  Attributes:
    model: whose steps the float32 and bfloat16 references run.
    token_ids: `[B, T]`, the prompt of the timed run.
    capacity: of the timed run's cache.
    prompt_cache: keys and values of the prompt, of the reference in the model's
      dtype, where they are there already.
  """

  model: ffjax.Model
  token_ids: np.ndarray
  capacity: int
  prompt_cache: KVCache | None = None

  @property
  def _taken(self) -> int:
    """How many tokens of the prompt are in the cache before the steps."""
    length = self.token_ids.shape[1]
    return length - min(_STEPS, length - 1)

  @functools.cached_property
  def _context(self) -> KVCache:
    """The prompt's keys and values but for the last few, by the reference."""
    lengths = np.full(len(self.token_ids), self._taken, np.int32)
    if self.prompt_cache is not None:
      # Without what the steps have to write themselves.
      k, v = (
        x.at[:, :, :, self._taken :].set(0)
        for x in (self.prompt_cache.k, self.prompt_cache.v)
      )
      return KVCache(k=k, v=v, lengths=jnp.asarray(lengths))
    cache = KVCache.create(
      self.model.config, len(lengths), self.capacity, self.model.dtype
    )
    forward = jax.jit(stepping.forward, donate_argnums=3)
    ids = self.token_ids[:, : self._taken]
    return forward(self.model, ids, lengths, cache)[1]

  def _logits(self, steps: Steps) -> np.ndarray:
    return steps(self._context, self.token_ids[:, self._taken :])

  @functools.cached_property
  def _baseline(self) -> np.ndarray:
    return self._logits(implementation_steps(self.model, BASELINE))

  @functools.cached_property
  def reference_error(self) -> float:
    """What the bfloat16 reference errs at the end of the prompt."""
    steps = implementation_steps(self.model, "reference")
    return relative_error(self._logits(steps), self._baseline)

  @functools.cached_property
  def _reference_error_at_start(self) -> float:
    return self._compare("reference", self.model).relative_logit_error

  def _compare(self, name: str, model: ffjax.Model) -> decode.Comparison:
    prompts = self.token_ids[:, :_COMPARED_TOKENS].tolist()
    return decode.compare(model, prompts, (BASELINE, name), max_new_tokens=0)

  def steps(self, steps: Steps) -> Check:
    """Checks steps at the end of the prompt."""
    logits = self._logits(steps)
    return Check(
      against=f"{BASELINE}, at the end of the prompt",
      metrics=dict(
        relative_logit_error=relative_error(logits, self._baseline),
        mean_kl=mean_kl(logits, self._baseline),
        reference_error=self.reference_error,
      ),
      limits=dict(
        relative_logit_error=MOST_ERROR * self.reference_error,
        reference_error=MOST_REFERENCE_ERROR,
      ),
    )

  def implementation(
    self, name: str, model: ffjax.Model | None = None
  ) -> Check:
    """Checks an implementation at both places.

    Args:
      name: the implementation.
      model: what it runs, of the same weights; None is the checker's own.
    """
    model = self.model if model is None else model
    end = self.steps(implementation_steps(model, name))
    start = self._compare(name, model)
    return Check(
      against=f"{BASELINE}, at the start and at the end of the prompt",
      metrics={
        **end.metrics,
        "relative_logit_error_at_start": start.relative_logit_error,
        "mean_kl_at_start": start.mean_kl,
        "reference_error_at_start": self._reference_error_at_start,
      },
      limits={
        **end.limits,
        "relative_logit_error_at_start": (
          MOST_ERROR * self._reference_error_at_start
        ),
        "reference_error_at_start": _MOST_REFERENCE_ERROR_AT_START,
      },
    )


@dataclasses.dataclass
class LoopChecker:
  """Checks all steps of timed loops, and the tokens that these gave.

  A loop's tokens are fed, one by one, to steps of the candidate and of both
  references, each on a cache of its own that begins as the loop's did: a greedy
  loop may run other code than the steps whose logits can be looked at.

  Attributes:
    model: whose steps the float32 and bfloat16 references run.
    token_ids: `[B]`, the newest before the loop.
    cache: of what is before those; it stays as it is.
  """

  model: ffjax.Model
  token_ids: jax.Array
  cache: KVCache
  _references: dict[bytes, tuple[np.ndarray, float]] = dataclasses.field(
    default_factory=dict, init=False
  )

  def _logits(
    self, name: str, model: ffjax.Model, emitted: np.ndarray
  ) -> np.ndarray:
    first = np.asarray(self.token_ids)[:, None]
    fed = np.concatenate([first, emitted[:, :-1]], axis=1)
    return implementation_steps(model, name)(self.cache, fed)

  def _reference(self, emitted: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns float32 logits and the bfloat16 reference's worst error."""
    key = emitted.tobytes()
    if key not in self._references:
      exact = self._logits(BASELINE, self.model, emitted)
      rounded = self._logits("reference", self.model, emitted)
      self._references[key] = exact, worst_error(rounded, exact)
    return self._references[key]

  def implementation(
    self,
    name: str,
    model: ffjax.Model,
    emitted: np.ndarray,
    check: Check,
    *,
    greedy: bool = True,
  ) -> Check:
    """Returns a check and what the steps of a loop add to it.

    Args:
      name: the implementation.
      model: what it runs, of the same weights.
      emitted: `[B, T]`, the loop's tokens.
      check: of the implementation elsewhere.
      greedy: whether the tokens are to be the steps' first choices.
    """
    exact, reference_error = self._reference(emitted)
    logits = self._logits(name, model, emitted)
    made = dataclasses.replace(
      check,
      against=f"{check.against}, and at every timed step",
      metrics={
        **check.metrics,
        "worst_step_error": worst_error(logits, exact),
        "worst_reference_step_error": reference_error,
      },
      limits={
        **check.limits,
        "worst_step_error": MOST_ERROR * reference_error,
        "worst_reference_step_error": _MOST_REFERENCE_ERROR_OF_STEP,
      },
    )
    if not greedy:
      return made
    # Of what one kernel does in both, not a token may differ. What XLA makes of the
    # reference in a loop may round otherwise than in a step.
    unlike = int((logits.argmax(-1).T != emitted).sum())
    return made.counting("unlike_steps", unlike, limited=name == "fused")
