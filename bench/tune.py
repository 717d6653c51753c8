"""Measures what the table of `pallas_kernels.tuning` should hold for a device.

Launches of the kernel take turns, with from 1 to `--most` chunks in flight and
with one and two compute warpgroups, and, of these as the table has them, with 1 to
twice as many chunks of the LM head, and with fewer slots of the ring; the kernel as
the table has it must be right, and all must choose its tokens.

  python -m bench.tune --preset=llama-3.2-1b --output=FILE.json
"""

import itertools
from typing import Any

from absl import flags as absl_flags

from bench import (
  ceilings,
  environment,
  flags,
  harness,
  kernel_steps,
  loops,
)
from bench.models import ALL
from ffjax.cache import rounded_capacity
from pallas_kernels.plan import MIN_SLOTS

_MOST = absl_flags.DEFINE_integer("most", 5, "Chunks in flight.", lower_bound=1)


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

  def loop(**choices: Any) -> kernel_steps.KernelLoop:
    return kernel_steps.KernelLoop(
      model, batch, length, capacity, num_steps, False, **choices
    )

  candidates = {}
  for n, wgs in itertools.product(range(1, _MOST.value + 1), (1, 2)):
    name = f"in flight: {n}, compute warpgroups: {wgs}"
    candidates[name] = loop(in_flight=n, compute_wgs=wgs)
  for n in range(1, 2 * _MOST.value + 1):
    name = f"LM head in flight: {n}"
    candidates[name] = loop(head_in_flight=n)
  # What shared memory leaves is the most.
  for n in range(loop().plan.num_slots, MIN_SLOTS, -2):
    candidates[f"slots: {n}"] = loop(most_slots=n)
  samples = harness.interleave(
    candidates, flags.WARM_UPS.value, flags.REPEATS.value
  )
  checked = kernel_steps.check(
    model, token_ids, capacity, loop(), samples.timed
  )
  harness.Result(
    bench="bench.tune",
    flags=flags.values(*flags.LOOP, flags.FORMAT, flags.HEAD_FORMAT, _MOST),
    device=environment.jax_device(),
    commit=commit,
    data=loops.DATA,
    measurements=harness.step_measurements(
      {
        name: [run.step_ms for run in runs]
        for name, runs in samples.timed.items()
      },
      samples,
      checked,
      model.bytes_per_step(batch, length),
      measured["read_gbps"],
      dict(batch=batch, prompt=length, steps=num_steps),
    ),
    ceilings=measured,
  ).report(flags.OUTPUT.value)


if __name__ == "__main__":
  flags.run(main)
