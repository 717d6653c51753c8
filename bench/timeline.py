"""Says where the time of a fused step goes, phase by phase.

Runs steps of a kernel that counts cycles (`pallas_kernels.times`), and prints,
for each phase, the mean over CTAs that have a part in it of the microseconds
per step: waiting for results and loading them, multiplying (waits for chunks
included), those waits alone, finishing and sending, and, of the memory
warpgroup, waiting for a free slot. A ring that is never full is never waited
for by compute; time with the ring full is time in which memory is idle.

  python -m bench.timeline --preset=llama-3.2-1b --position=96 --output=FILE
"""

import datetime
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import ffjax
from ffjax import packed, rope
from ffjax.cache import KVCache, rounded_capacity
from ffjax.presets import PRESETS
from pallas_kernels import kernel, times
from pallas_kernels.plan import make_plan

_PRESET = flags.DEFINE_enum("preset", "llama-3.2-1b", list(PRESETS), "Model.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.")
_POSITION = flags.DEFINE_integer("position", 96, "Of the new token.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps, of which the mean is taken.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")

# What is said of every phase.
_SPENT = times.KINDS[: times.KINDS.index("step")]
_PHASES = ("qkv", "attention", "o", "gate_up", "down", "lm_head")


@functools.partial(
  jax.jit,
  static_argnames=("plan", "config", "timed", "steps"),
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
) -> Any:
  cos, sin = rope.cos_sin(config, positions)

  def step(_: Any, carry: Any) -> Any:
    token_ids, k, v, counted = carry
    ref = jax.new_ref(jnp.zeros_like(counted)) if timed else None
    _, token_ids, k, v = kernel.step(
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
    )
    if timed:
      counted = counted + jax.freeze(ref)
    return token_ids, k, v, counted

  counted = jnp.zeros((plan.num_ctas, *times.SHAPE), jnp.int32)
  return jax.lax.fori_loop(0, steps, step, (token_ids, k, v, counted))


def main(argv: list[str]) -> None:
  """Runs, prints and writes."""
  del argv
  config = ffjax.preset(_PRESET.value)
  model = ffjax.pack(ffjax.random_model(config, seed=0))
  batch, steps = _BATCH.value, _STEPS.value
  capacity = rounded_capacity(_POSITION.value + 1)
  params = model.params
  plan = make_plan(packed.geometry_of(config), batch, capacity, params.num_ctas)
  shape = KVCache.create(config, batch, capacity, jnp.bfloat16).k.shape
  positions = jnp.full((batch,), _POSITION.value, jnp.int32)
  took_us = {}
  counted = None
  for timed in (False, True):
    run = functools.partial(
      _run, plan=plan, config=config, timed=timed, steps=steps
    )
    for _ in range(3):
      k, v = (
        jax.random.normal(jax.random.key(n), shape, jnp.bfloat16)
        for n in range(2)
      )
      token_ids = jnp.ones((batch,), jnp.int32)
      jax.block_until_ready((k, v))
      begin = time.perf_counter()
      out = jax.block_until_ready(run(params, token_ids, k, v, positions))
      took_us[timed] = 1e6 * (time.perf_counter() - begin) / steps
    counted = np.asarray(out[-1], np.float64)
  assert counted is not None
  counted /= steps
  of_all = counted[:, 0, len(_SPENT) :]
  step_us = of_all[:, 1].max() / 1e3
  cycles_per_us = (1e3 * of_all[:, 0] / of_all[:, 1]).mean()
  counted /= cycles_per_us
  print(
    f"step {took_us[False]:.1f} us, counting cycles {took_us[True]:.1f} us, of"
    f" these in the kernel {step_us:.1f}; {cycles_per_us:.0f} cycles per us"
  )
  table = {}
  print("| phase | " + " | ".join(_SPENT) + " | CTAs |")
  for p, phase in enumerate(_PHASES):
    took_part = counted[:, p, 1] > 0
    if not took_part.any():
      continue
    mean = counted[took_part, p, : len(_SPENT)].mean(0)
    spread = counted[took_part, p, : len(_SPENT)].max(0)
    table[phase] = dict(zip(_SPENT, mean.round(2).tolist(), strict=True))
    cells = [f"{m:.1f} ({s:.1f})" for m, s in zip(mean, spread, strict=True)]
    print(f"| {phase} | " + " | ".join(cells) + f" | {took_part.sum()} |")
  total = counted[:, :, : len(_SPENT)].sum(1).mean(0)
  print("| all | " + " | ".join(f"{x:.1f}" for x in total) + " | |")
  if _OUTPUT.value is not None:
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = dict(
      date=datetime.date.today().isoformat(),
      device=jax.devices()[0].device_kind,
      jax=jax.__version__,
      preset=_PRESET.value,
      batch=batch,
      position=_POSITION.value,
      step_us=took_us[False],
      step_counting_us=took_us[True],
      kernel_counting_us=step_us,
      cycles_per_us=cycles_per_us,
      phases_us=table,
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
  app.run(main)
