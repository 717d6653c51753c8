"""Steps of the kernel alone, in one device loop, counting its time or not.

Nothing but the launch is in the loop: the position stays, so that the rope
table is made once, and no token is stored.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ffjax
from bench import checks, flags, harness, loops
from ffjax import packed, rope
from ffjax.cache import KVCache
from pallas_kernels import kernel, times
from pallas_kernels.plan import Plan, make_plan


def packed_model(config: ffjax.LlamaConfig) -> ffjax.Model:
  """Makes random weights, of what bits the flags say, and packs them."""
  return ffjax.pack(
    ffjax.random_model(
      config,
      loops.SEED,
      format_name=flags.FORMAT.value,
      head_format=flags.HEAD_FORMAT.value,
    )
  )


@functools.partial(
  jax.jit,
  static_argnames=("plan", "config", "timed", "steps", "with_logits"),
  donate_argnums=(2, 3),
)
def _run(
  params: packed.PackedParams,
  token_ids: jax.Array,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  plan: Any,
  config: Any,
  timed: bool,
  steps: int,
  with_logits: bool,
) -> Any:
  cos, sin = rope.cos_sin(config, positions)

  def step(_: Any, carry: Any) -> Any:
    token_ids, k, v, counted = carry
    ref = jax.new_ref(jnp.zeros_like(counted)) if timed else None
    logits, token_ids, k, v = kernel.step(
      plan,
      params.operands(),
      token_ids,
      positions,
      jnp.ones_like(positions, bool),
      cos,
      sin,
      k,
      v,
      ref,
      with_logits=with_logits,
    )
    if logits is not None:
      token_ids = jnp.argmax(logits, -1).astype(jnp.int32)
    if ref is not None:
      counted = counted + jax.freeze(ref)
    return token_ids, k, v, counted

  counted = jnp.zeros((plan.num_ctas, *times.SHAPE), jnp.int32)
  return jax.lax.fori_loop(0, steps, step, (token_ids, k, v, counted))


@dataclasses.dataclass(frozen=True)
class Run:
  """What a loop gave.

  Attributes:
    step_ms: by the host's clock, the mean.
    token_ids: `[B]`, those of the last step.
    counted: `[P, phases, kinds]`, the mean over steps; zeros if not asked for.
  """

  step_ms: float
  token_ids: np.ndarray
  counted: np.ndarray


@dataclasses.dataclass(frozen=True)
class KernelLoop:
  """A loop of `num_steps` launches; a call runs and times it.

  Attributes:
    model: packed.
    batch: sequences.
    position: of the new token of each; what is before it is random.
    capacity: of the cache.
    num_steps: launches.
    timed: whether the kernel counts its time, which costs some.
    in_flight: chunks that a CTA asks for at a time; None is the table's choice.
    compute_wgs: warpgroups of a CTA that compute; None is the table's choice.
    head_in_flight: chunks of the LM head; None is the table's choice.
    most_slots: of the ring; None is the table's choice.
    with_logits: whether tokens are the first choices of the step's logits, not
      those that the kernel makes itself.
  """

  model: ffjax.Model
  batch: int
  position: int
  capacity: int
  num_steps: int
  timed: bool
  in_flight: int | None = None
  compute_wgs: int | None = None
  head_in_flight: int | None = None
  most_slots: int | None = None
  with_logits: bool = False

  @property
  def plan(self) -> Plan:
    """With what is chosen here."""
    params = self.model.params
    assert isinstance(params, packed.PackedParams)
    plan = make_plan(
      packed.geometry_of(self.model.config),
      self.batch,
      self.capacity,
      params.num_ctas,
      jax.devices()[0].device_kind,
      params.chunk_format,
      head_format=params.head_chunk_format,
      compute_wgs=self.compute_wgs,
    )
    for name in ("in_flight", "head_in_flight", "most_slots"):
      chunks = getattr(self, name)
      if chunks is not None:
        plan = dataclasses.replace(plan, **{name: chunks})
    return plan

  def __call__(self) -> Run:
    """Runs."""
    params, config = self.model.params, self.model.config
    assert isinstance(params, packed.PackedParams)
    shape = jax.eval_shape(
      lambda: KVCache.create(config, self.batch, self.capacity, jnp.bfloat16)
    ).k.shape
    k, v = (
      jax.random.normal(jax.random.key(n), shape, jnp.bfloat16)
      for n in range(2)
    )
    token_ids = jnp.ones((self.batch,), jnp.int32)
    positions = jnp.full((self.batch,), self.position, jnp.int32)
    jax.block_until_ready((k, v, token_ids, positions))
    begin = time.perf_counter()
    token_ids, _, _, counted = jax.block_until_ready(
      _run(
        params,
        token_ids,
        k,
        v,
        positions,
        plan=self.plan,
        config=config,
        timed=self.timed,
        steps=self.num_steps,
        with_logits=self.with_logits,
      )
    )
    took_s = time.perf_counter() - begin
    return Run(
      step_ms=1e3 * took_s / self.num_steps,
      token_ids=np.asarray(token_ids),
      counted=np.asarray(counted, np.float64) / self.num_steps,
    )


def check(
  model: ffjax.Model,
  token_ids: np.ndarray,
  capacity: int,
  loop: KernelLoop,
  runs: Mapping[str, Sequence[Run]],
) -> harness.Check:
  """Checks what loops of the kernel ran.

  Its steps with logits are those of the model, as `bench.decode` checks them; and
  the last token of every run, each step's being the next one's input, is that of
  a loop in which such steps choose.

  Args:
    model: packed.
    token_ids: `[B, T]`, a prompt.
    capacity: of the cache.
    loop: one of those that ran.
    runs: of each kind; all of them from the same start.
  """
  made = checks.Checker(model, token_ids, capacity).implementation("fused")
  expected = dataclasses.replace(loop, timed=False, with_logits=True)()
  differing = sum(
    not np.array_equal(run.token_ids, expected.token_ids)
    for of_kind in runs.values()
    for run in of_kind
  )
  return made.counting("differing_runs", differing)
