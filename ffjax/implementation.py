"""The implementations of a decode step, and which of them can run here.

An implementation maps one new token per sequence and the cache to logits and
the extended cache; it may also have a loop of its own over steps that choose
greedily. All share the cache's layout, so that one can take over from another in
the middle of a sequence; prompts always go through the reference. Which one runs
depends on nothing that is traced.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffjax import device_memory, packed, packing, quantized_model, rope
from ffjax.cache import KVCache
from ffjax.errors import RequestError
from ffjax.model import Llama
from ffjax.packed import PackedParams
from ffjax.params import Model
from pallas_kernels import geometry, steps
from pallas_kernels.plan import Plan, make_plan


class StepOutput(NamedTuple):
  """What a step returns; what it says of inactive sequences has no meaning.

  Attributes:
    logits: `[B, V]` float32.
    cache: the cache, longer by one token where active.
    greedy_ids: `[B]` int32, where the largest logits are, the first of equals;
      None if the step does not look for them.
  """

  logits: jax.Array
  cache: KVCache
  greedy_ids: jax.Array | None = None


class StepsOutput(NamedTuple):
  """What several steps return.

  Attributes:
    token_ids: `[B]` int32, the newest token of each sequence.
    active: `[B]` bool.
    cache: the cache, longer by what has been emitted.
    emitted: `[T, B]` int32, new tokens, -1 where there is none.
  """

  token_ids: jax.Array
  active: jax.Array
  cache: KVCache
  emitted: jax.Array


Step = Callable[[Model, jax.Array, jax.Array, KVCache], StepOutput]
GreedySteps = Callable[..., StepsOutput]
Missing = Callable[[Model | None, KVCache | None], str | None]


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to run a decode step.

  Attributes:
    name: what users pass as `implementation`.
    dtype: dtype of activations and cache for a model.
    missing: `missing(model, cache)` says what this machine, the model or the
      cache lacks to run it, or None if nothing. It looks at shapes and dtypes
      only; None for either leaves that out.
    step: `step(model, token_ids, active, cache)` with token ids `[B]` int32
      and `active` `[B]` bool.
    greedy_steps: `greedy_steps(model, token_ids, active, cache, num_steps, *,
      max_steps, eos_token_ids)`, so many steps, each of which takes the most
      likely tokens, or as many as it takes until all sequences have ended;
      `max_steps` is T and static. None if that is best made of single steps.
  """

  name: str
  dtype: Callable[[Model], np.dtype]
  missing: Missing
  step: Step
  greedy_steps: GreedySteps | None = None


def reference_hidden(
  model: Model,
  token_ids: jax.Array,
  num_tokens: jax.Array,
  cache: KVCache,
) -> tuple[jax.Array, KVCache]:
  """Runs the reference layers in the cache's dtype; see `Llama.__call__`."""
  if isinstance(model.params, PackedParams):
    return packed.hidden_states(
      model.params, model.config, token_ids, num_tokens, cache
    )
  if quantized_model.any_quantized(model.params):
    return quantized_model.hidden_states(
      model.params, model.config, token_ids, num_tokens, cache
    )
  llama = Llama(model.config, cache.k.dtype)
  variables = {"params": model.params}
  hidden, extended = llama.apply(variables, token_ids, num_tokens, cache)
  assert isinstance(extended, KVCache)
  return jnp.asarray(hidden), extended


def reference_logits(model: Model, hidden: jax.Array) -> jax.Array:
  """Maps hidden states `[..., D]` to float32 logits `[..., V]`."""
  if isinstance(model.params, PackedParams):
    return packed.logits(model.params, model.config, hidden)
  if quantized_model.any_quantized(model.params):
    return quantized_model.logits(model.params, model.config, hidden)
  llama = Llama(model.config, hidden.dtype)
  logits = llama.apply({"params": model.params}, hidden, method="logits")
  return jnp.asarray(logits)


def _reference_step(
  model: Model, token_ids: jax.Array, active: jax.Array, cache: KVCache
) -> StepOutput:
  hidden, cache = reference_hidden(
    model, token_ids[:, None], active.astype(jnp.int32), cache
  )
  return StepOutput(reference_logits(model, hidden[:, 0]), cache)


def _fused_plan(model: Model, cache: KVCache) -> tuple[Plan, PackedParams]:
  params = model.params
  assert isinstance(params, PackedParams)  # `resolve` has seen to it.
  _, batch, _, capacity, _ = cache.k.shape
  plan = make_plan(
    packed.geometry_of(model.config),
    batch,
    capacity,
    params.num_ctas,
    device_memory.default_device().device_kind,
    params.chunk_format,
    head_format=params.head_chunk_format,
  )
  return plan, params


def _fused_step(
  model: Model, token_ids: jax.Array, active: jax.Array, cache: KVCache
) -> StepOutput:
  # Not above: older versions of JAX lack what it imports.
  from pallas_kernels import kernel

  plan, params = _fused_plan(model, cache)
  cos, sin = rope.cos_sin(model.config, cache.lengths)
  logits, greedy_ids, k, v = kernel.step(
    plan,
    params.operands(),
    token_ids,
    cache.lengths,
    active,
    cos,
    sin,
    cache.k,
    cache.v,
  )
  assert logits is not None
  lengths = cache.lengths + active.astype(jnp.int32)
  return StepOutput(logits, KVCache(k=k, v=v, lengths=lengths), greedy_ids)


def _fused_greedy_steps(
  model: Model,
  token_ids: jax.Array,
  active: jax.Array,
  cache: KVCache,
  num_steps: jax.Array,
  *,
  max_steps: int,
  eos_token_ids: tuple[int, ...],
) -> StepsOutput:
  from pallas_kernels import kernel

  plan, params = _fused_plan(model, cache)
  steps_on = jnp.arange(max_steps, dtype=jnp.int32)[:, None]
  cos, sin = rope.cos_sin(model.config, cache.lengths[None] + steps_on)
  operands = steps.operands(
    plan,
    params.operands(),
    token_ids,
    cache.lengths,
    active,
    cos,
    sin,
    jnp.minimum(num_steps, max_steps),
    cache.k,
    cache.v,
  )
  launch = functools.partial(
    kernel.launch, plan, eos_token_ids=eos_token_ids, with_logits=False
  )
  last = steps.run(launch, plan.batch, operands)
  emitted = last["emitted"][:, : plan.batch]
  num_emitted = jnp.sum(emitted >= 0, axis=0, dtype=jnp.int32)
  token_ids_after, _, active_after, _ = last["progress"][:, : plan.batch]
  return StepsOutput(
    token_ids=jnp.where(active, token_ids_after, token_ids),
    active=active_after > 0,
    cache=KVCache(
      k=last["k_cache"],
      v=last["v_cache"],
      lengths=cache.lengths + num_emitted,
    ),
    emitted=emitted,
  )


def _machine_lacks() -> str | None:
  """Says what this machine lacks to run the kernel, or None."""
  device = device_memory.default_device()
  capability = getattr(device, "compute_capability", None)
  if device.platform != "gpu" or capability != "9.0":
    return (
      "it needs a GPU of compute capability 9.0 (Hopper), and JAX's default"
      f" device is {device.device_kind}"
    )
  try:
    from pallas_kernels import mosaic
  except ImportError as e:
    return f"this JAX, {jax.__version__}, cannot import what it needs: {e}"
  return mosaic.missing()


def _model_lacks(model: Model) -> str | None:
  """Says why the kernel cannot run a model as it is, or None."""
  reason = packing.why_not_model(model)
  if reason is not None:
    return reason
  if not isinstance(model.params, PackedParams):
    return "pack the model first: model = ffjax.pack(model)"
  num_ctas = model.params.num_ctas
  device = device_memory.default_device()
  if device.platform == "gpu" and num_ctas > device.core_count:
    return (
      f"the model is packed for {num_ctas} CTAs, and {device} has"
      f" {device.core_count} SMs: unpack it, and pack it here"
    )
  return None


def _cache_lacks(model: Model, cache: KVCache) -> str | None:
  """Says why the kernel cannot extend a cache, or None."""
  assert isinstance(model.params, PackedParams)
  _, batch, _, capacity, _ = cache.k.shape
  sizes = packed.geometry_of(model.config)
  try:
    geometry.check(sizes, batch)
    make_plan(
      sizes,
      batch,
      capacity,
      model.params.num_ctas,
      layer_format=model.params.chunk_format,
      head_format=model.params.head_chunk_format,
    )
  except geometry.UnsupportedError as e:
    return f"the kernel does not take {e}"
  if capacity % geometry.TILE:
    return (
      f"the kernel does not take a cache of capacity {capacity} (it takes"
      f" multiples of {geometry.TILE})"
    )
  if cache.k.dtype != jnp.bfloat16:
    return (
      f"the kernel does not take a cache in {cache.k.dtype} (it takes bfloat16)"
    )
  return None


def _fused_missing(model: Model | None, cache: KVCache | None) -> str | None:
  reasons = [_machine_lacks()]
  if model is not None:
    of_model = _model_lacks(model)
    reasons.append(of_model)
    if cache is not None and of_model is None:
      reasons.append(_cache_lacks(model, cache))
  return "; ".join(reason for reason in reasons if reason is not None) or None


def _nothing_missing(model: Model | None, cache: KVCache | None) -> None:
  del model, cache


_IMPLEMENTATIONS = {
  implementation.name: implementation
  for implementation in (
    Implementation(
      name="reference",
      dtype=lambda model: model.dtype,
      missing=_nothing_missing,
      step=_reference_step,
    ),
    # The same in float32, whatever the weights: what errors are measured from.
    Implementation(
      name="reference_float32",
      dtype=lambda model: np.dtype(np.float32),
      missing=_nothing_missing,
      step=_reference_step,
    ),
    Implementation(
      name="fused",
      dtype=lambda model: model.dtype,
      missing=_fused_missing,
      step=_fused_step,
      greedy_steps=_fused_greedy_steps,
    ),
  )
}
# What "auto" tries, fastest first.
_PREFERENCE = ("fused", "reference")

NAMES = ("auto", *_IMPLEMENTATIONS)


def resolve(
  name: str, model: Model | None = None, cache: KVCache | None = None
) -> Implementation:
  """Returns the implementation of that name; `"auto"` is the fastest one.

  Args:
    name: one of `NAMES`.
    model: what it will run, or None to ask about the machine only.
    cache: what it will extend, arrays or only their shapes; None if unknown.

  Raises:
    RequestError: if there is none, or if it cannot run here; the message says
      what is missing. A named implementation is never replaced by another.
  """
  if name == "auto":
    return next(
      _IMPLEMENTATIONS[candidate]
      for candidate in _PREFERENCE
      if _IMPLEMENTATIONS[candidate].missing(model, cache) is None
    )
  if not isinstance(name, str) or name not in _IMPLEMENTATIONS:
    raise RequestError(
      f"implementation={name!r} does not exist (there are: {', '.join(NAMES)})"
    )
  missing = _IMPLEMENTATIONS[name].missing(model, cache)
  if missing is not None:
    raise RequestError(f"implementation={name!r} cannot run: {missing}")
  return _IMPLEMENTATIONS[name]


def wants_packed(name: str, model: Model) -> bool:
  """Returns whether a model that is about to be loaded should be packed.

  Args:
    name: the implementation that will run it.
    model: what will be loaded; shapes and dtypes are enough.

  Raises:
    RequestError: if the name is `"fused"`, and it cannot run here or not with
      such a model.
  """
  if resolve(name).name != "fused":
    return False
  reason = packing.why_not_model(model)
  if name == "fused" and reason is not None:
    raise RequestError(f"implementation={name!r} cannot run: {reason}")
  return reason is None
