"""Measures what a fused step costs outside of the kernel.

Three loops take turns: whole steps of `ffjax.decode`'s loop, launches of the
kernel with nothing between them, and launches of a kernel that counts the
nanoseconds from its first instruction to its last. Where the profiler sees the
device, it says how many launches a step takes, and the gap between two kernels.

  python -m bench.phases --preset=llama-3.2-1b --output=FILE.json
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import ffjax
from bench import (
  ceilings,
  checks,
  environment,
  flags,
  harness,
  kernel_steps,
  loops,
  phase_times,
  trace,
)
from bench.models import ALL
from ffjax import stepping
from ffjax.cache import rounded_capacity
from ffjax.sampling import Sampling
from pallas_kernels.steps import LAUNCHES_PER_LOOK

# Whole blocks, so that each has the host's look that it comes with.
_TRACED_STEPS = LAUNCHES_PER_LOOK


def traced(
  model: ffjax.Model, token_ids: np.ndarray, implementation: str, num_steps: int
) -> trace.Launches | None:
  """Counts what a step launches, by two loops under the profiler.

  Returns:
    None if the profiler does not see the device.
  """
  batch, length = token_ids.shape
  static: dict[str, Any] = dict(
    implementation=implementation, stop_on_eos=False
  )

  def loop(steps: int) -> list[trace.Event]:
    state = stepping.prefill(
      model,
      token_ids,
      np.full(batch, length, np.int32),
      capacity=rounded_capacity(length + 2 * num_steps),
      **static,
    )
    jax.block_until_ready(state)
    return trace.record(
      lambda: stepping.decode_steps(
        model, state, steps, max_steps=2 * num_steps, **static
      )
    )

  loop(num_steps)  # Compiles.
  return trace.launches(loop(num_steps), loop(2 * num_steps), num_steps)


def main(argv: list[str]) -> None:
  """Checks, times, prints and writes."""
  commit = flags.commit(argv)
  config = ALL[flags.PRESET.value]
  length = flags.only(flags.PROMPT, flags.prompts())
  batch = flags.only(flags.BATCH, flags.batches())
  num_steps = flags.STEPS.value
  measured = ceilings.measure(flags.CEILING_BYTES.value)
  model = kernel_steps.packed_model(config)
  token_ids = loops.prompt(config.vocab_size, batch, length)
  capacity = rounded_capacity(length + num_steps)
  start = loops.Start.after(model, "fused", token_ids, capacity, Sampling())
  whole = loops.Loop(model, "fused", start, num_steps, Sampling())
  middle = length + num_steps // 2
  bare, counting = (
    kernel_steps.KernelLoop(model, batch, middle, capacity, num_steps, timed)
    for timed in (False, True)
  )
  candidates: dict[str, Callable[[], Any]] = {
    "whole step": whole,
    "kernel": bare,
    "kernel, counting": counting,
  }
  samples = harness.interleave(
    candidates, flags.WARM_UPS.value, flags.REPEATS.value
  )
  steps = samples.timed["whole step"]
  kernels = {
    name: runs for name, runs in samples.timed.items() if name != "whole step"
  }
  checked = kernel_steps.check(model, token_ids, capacity, bare, kernels)
  of_loop = checks.LoopChecker(model, start.state.token_ids, start.state.cache)
  checked = of_loop.implementation("fused", model, steps[0].token_ids, checked)
  checked = checked.counting(
    "differing_loops",
    loops.differing_runs([samples.first["whole step"], *steps]),
  )
  # The profiler is for what is right.
  checked.require("fused")
  timed_ms = {
    "whole step": [1e3 * run.loop_s / num_steps for run in steps],
    **{name: [run.step_ms for run in runs] for name, runs in kernels.items()},
    "kernel, counting, by its own clock": [
      phase_times.timeline(run.counted).step_us / 1e3
      for run in kernels["kernel, counting"]
    ],
  }
  try:
    found = traced(model, token_ids, "fused", _TRACED_STEPS)
  except Exception as e:
    # Nothing that a profiler does is worth losing what has been measured.
    print(f"the profiler failed: {e!r}")
    found = None
  launched = found and dataclasses.asdict(found)
  measurements = harness.step_measurements(
    timed_ms,
    samples,
    checked,
    model.bytes_per_step(batch, length + num_steps / 2),
    measured["read_gbps"],
    dict(batch=batch, prompt=length, steps=num_steps),
  )
  # What was counted is the whole step's.
  measurements[0] = dataclasses.replace(
    measurements[0],
    details={**measurements[0].details, "launches": launched},
  )
  harness.Result(
    bench="bench.phases",
    flags=flags.values(*flags.LOOP, flags.FORMAT, flags.HEAD_FORMAT),
    device=environment.jax_device(),
    commit=commit,
    data=loops.DATA,
    measurements=measurements,
    ceilings=measured,
  ).report(flags.OUTPUT.value)
  whole_ms, bare_ms = (
    float(np.median(timed_ms[name])) for name in ("whole step", "kernel")
  )
  print(f"outside of the kernel: {1e3 * (whole_ms - bare_ms):.1f} us per step")
  if found is None:
    print("the profiler does not see the device: no count of launches")
  else:
    print(
      f"{found.per_step:.1f} launches per step; {found.longest} takes"
      f" {found.longest_us:.1f} us, {found.gap_us:.1f} us to the next, with the"
      f" host's looks {found.mean_gap_us:.1f} us in the mean,"
      f" {found.mean_gap_us / whole_ms / 10:.2f}% of a step"
    )


if __name__ == "__main__":
  flags.run(main)
