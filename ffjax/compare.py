"""Runs two implementations on the same input and says how they differ."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ffjax import prompts as prompts_lib
from ffjax import stepping
from ffjax.cache import KVCache, check_fits, rounded_capacity
from ffjax.errors import RequestError
from ffjax.implementation import resolve
from ffjax.params import Model, check_model


@dataclasses.dataclass(frozen=True)
class Divergence:
  """Where two greedy continuations of a prompt part.

  Attributes:
    index: index of the first differing new token.
    baseline_token: what the first implementation chose.
    other_token: what the second one chose.
    margin: by how much the baseline preferred its choice, in logits; a margin
      at rounding level is a tie, not an error.
  """

  index: int
  baseline_token: int
  other_token: int
  margin: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Differences of the second implementation from the first, the baseline.

  The first seven are over all positions of the prompts, where both were fed
  the same tokens; NLL is of the prompts' own next tokens, in nats.

  Attributes:
    implementations: names of baseline and other.
    num_positions: positions compared.
    max_logit_error: largest absolute difference of a logit.
    relative_logit_error: root mean square difference of the logits over the
      root mean square of the baseline's.
    mean_kl: mean Kullback-Leibler divergence from the baseline, in nats.
    max_kl: the largest.
    mean_abs_delta_nll: mean absolute difference of a token's NLL.
    mean_delta_nll: mean difference, other minus baseline.
    baseline_nll: mean NLL by the baseline.
    divergences: for each prompt, where the greedy continuations part; None
      where they do not.
  """

  implementations: tuple[str, str]
  num_positions: int
  max_logit_error: float
  relative_logit_error: float
  mean_kl: float
  max_kl: float
  mean_abs_delta_nll: float
  mean_delta_nll: float
  baseline_nll: float
  divergences: tuple[Divergence | None, ...]


@functools.partial(
  jax.jit, static_argnames=("implementation",), donate_argnames=("cache",)
)
def _step(
  model: Model,
  token_ids: jax.Array,
  active: jax.Array,
  cache: KVCache,
  *,
  implementation: str,
) -> tuple[jax.Array, KVCache]:
  step = resolve(implementation, model, cache).step
  out = step(model, token_ids, active, cache)
  return out.logits, out.cache


@jax.jit
def _differences(
  baseline: jax.Array, other: jax.Array, targets: jax.Array
) -> dict[str, jax.Array]:
  """Compares logits `[B, V]` given the tokens `[B]` that follow; `[B]` each."""
  p = jax.nn.log_softmax(baseline, axis=-1)
  q = jax.nn.log_softmax(other, axis=-1)
  rows = jnp.arange(targets.shape[0], dtype=jnp.int32)
  return dict(
    max_error=jnp.max(jnp.abs(other - baseline), axis=-1),
    square_error=jnp.mean(jnp.square(other - baseline), axis=-1),
    square=jnp.mean(jnp.square(baseline), axis=-1),
    kl=jnp.sum(jnp.exp(p) * (p - q), axis=-1),
    baseline_nll=-p[rows, targets],
    delta_nll=p[rows, targets] - q[rows, targets],
  )


def compare(
  model: Model,
  prompts: prompts_lib.Prompts,
  implementations: tuple[str, str] = ("reference_float32", "reference"),
  max_new_tokens: int = 32,
) -> Comparison:
  """Runs two implementations on the same input and reports how they differ.

  Every token of the prompts goes through both as a decode step, so that it is
  the step that is compared; then both continue each prompt greedily.

  Args:
    model: the model.
    prompts: texts or token ids, at least two tokens long.
    implementations: the baseline and the other.
    max_new_tokens: length of the continuations; 0 for none.

  Raises:
    RequestError: if an implementation cannot run here or a prompt is too short
      or out of range.
  """
  check_model(model)
  if isinstance(implementations, str) or len(implementations) != 2:
    raise RequestError(f"implementations={implementations!r} must be two names")
  prompts_lib.check_count("max_new_tokens", max_new_tokens, at_least=0)
  dtypes = [resolve(name, model).dtype(model) for name in implementations]
  encoded = prompts_lib.encode(model, prompts)
  for i, prompt in enumerate(encoded):
    if len(prompt) < 2:
      raise RequestError(f"prompt {i} has one token; comparing takes two")
  prompts_lib.check_lengths(model.config, encoded, max_new_tokens)
  token_ids, lengths = prompts_lib.pad(encoded)
  batch = len(encoded)
  capacity = rounded_capacity(int(lengths.max()) + max_new_tokens)
  names, caches = [], []
  for name, dtype in zip(implementations, dtypes, strict=True):
    check_fits(model.config, batch, capacity, dtype)
    cache = KVCache.create(model.config, batch, capacity, dtype)
    names.append(resolve(name, model, cache).name)
    caches.append(cache)

  rows: list[dict[str, np.ndarray]] = []
  for t in range(int(lengths.max()) - 1):
    active = t < lengths - 1
    logits = []
    for i, name in enumerate(names):
      one, caches[i] = _step(
        model,
        token_ids[:, t],
        active,
        caches[i],
        implementation=name,
      )
      logits.append(one)
    found = _differences(*logits, token_ids[:, t + 1])
    rows.append({k: np.asarray(v)[active] for k, v in found.items()})
  joined = {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}
  caches.clear()
  return Comparison(
    implementations=(names[0], names[1]),
    num_positions=len(joined["kl"]),
    max_logit_error=float(joined["max_error"].max()),
    relative_logit_error=float(
      np.sqrt(joined["square_error"].mean() / joined["square"].mean())
    ),
    mean_kl=float(joined["kl"].mean()),
    max_kl=float(joined["kl"].max()),
    mean_abs_delta_nll=float(np.abs(joined["delta_nll"]).mean()),
    mean_delta_nll=float(joined["delta_nll"].mean()),
    baseline_nll=float(joined["baseline_nll"].mean()),
    divergences=_divergences(model, encoded, capacity, names, max_new_tokens),
  )


def _divergences(
  model: Model,
  encoded: Sequence[list[int]],
  capacity: int,
  names: Sequence[str],
  max_new_tokens: int,
) -> tuple[Divergence | None, ...]:
  if max_new_tokens == 0:
    return (None,) * len(encoded)
  token_ids, lengths = prompts_lib.pad(encoded)
  continued = []
  for name in names:
    state = stepping.prefill(
      model, token_ids, lengths, capacity=capacity, implementation=name
    )
    first = np.asarray(state.token_ids)[:, None]
    _, rest = stepping.decode_steps(
      model,
      state,
      max_new_tokens - 1,
      max_steps=rounded_capacity(max_new_tokens),
      implementation=name,
    )
    continued.append(np.concatenate([first, np.asarray(rest)], axis=1))
  found: list[Divergence | None] = []
  for prompt, a, b in zip(encoded, *continued, strict=True):
    differs = np.flatnonzero(a != b)
    if not len(differs):
      found.append(None)
      continue
    index = int(differs[0])
    margin = _margin(
      model, prompt + a[:index].tolist(), int(a[index]), capacity, names[0]
    )
    found.append(Divergence(index, int(a[index]), int(b[index]), margin))
  return tuple(found)


def _margin(
  model: Model, tokens: list[int], choice: int, capacity: int, name: str
) -> float:
  """Returns how far the baseline's choice after `tokens` leads the next."""
  dtype = resolve(name, model).dtype(model)
  cache = KVCache.create(model.config, 1, capacity, dtype)
  for token_id in tokens:
    logits, cache = _step(
      model,
      np.asarray([token_id], np.int32),
      np.asarray([True]),
      cache,
      implementation=name,
    )
  values = np.asarray(logits)[0]
  return float(values[choice] - np.delete(values, choice).max())
