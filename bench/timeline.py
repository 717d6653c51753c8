"""Says where the time of a fused step goes, phase by phase and CTA by CTA.

Runs steps of a kernel that counts cycles (`pallas_kernels.times`). Of the
compute warpgroup, of two the first: waiting for other CTAs' results (and writing
them to x), computing, waiting for chunks with the ring empty, finishing and
sending. Of the memory warpgroup: waiting with the ring full, which is when memory
is idle. A phase's figures are means over the CTAs that have a part in it, and the
least and the most of them; CTAs that have none in the layers are only in the picture.

  python -m bench.timeline --preset=llama-3.2-1b --position=96 --output=FILE.json

The picture is written beside the file, as FILE.svg.
"""

import dataclasses
import pathlib

import numpy as np
from absl import flags as absl_flags

from bench import (
  ceilings,
  environment,
  flags,
  harness,
  kernel_steps,
  loops,
  phase_times,
)
from bench.models import ALL
from ffjax import device_memory
from ffjax.cache import rounded_capacity

_POSITION = absl_flags.DEFINE_integer(
  "position", 96, "Of the new token.", lower_bound=1
)
_LAUNCHES = absl_flags.DEFINE_integer(
  "launches", 128, "Launches in a loop, of which the mean is taken."
)


def main(argv: list[str]) -> None:
  """Runs, prints, writes and draws."""
  commit = flags.commit(argv)
  config = ALL[flags.PRESET.value]
  device_memory.join_pieces()
  measured = ceilings.measure(flags.CEILING_BYTES.value)
  model = kernel_steps.packed_model(config)
  batch = flags.only(flags.BATCH, flags.batches())
  position = _POSITION.value
  capacity = rounded_capacity(position + 1)
  kernels = {
    name: kernel_steps.KernelLoop(
      model, batch, position, capacity, _LAUNCHES.value, timed
    )
    for name, timed in (("kernel", False), ("kernel, counting", True))
  }
  samples = harness.interleave(
    kernels, flags.WARM_UPS.value, flags.REPEATS.value
  )
  token_ids = loops.prompt(config.vocab_size, batch, position + 1)
  checked = kernel_steps.check(
    model, token_ids, capacity, kernels["kernel"], samples.timed
  )
  counted = np.mean([r.counted for r in samples.timed["kernel, counting"]], 0)
  found = phase_times.timeline(counted)
  step_ms = {
    name: [run.step_ms for run in runs] for name, runs in samples.timed.items()
  }
  measurements = harness.step_measurements(
    step_ms,
    samples,
    checked,
    model.bytes_per_step(batch, position),
    measured["read_gbps"],
    dict(batch=batch, position=position, launches=_LAUNCHES.value),
  )
  # What was counted belongs to the kernel that counts.
  measurements[1] = dataclasses.replace(
    measurements[1],
    details={**measurements[1].details, "timeline": dataclasses.asdict(found)},
  )
  output = flags.OUTPUT.value
  made = harness.Result(
    bench="bench.timeline",
    flags=flags.values(
      flags.PRESET,
      flags.BATCH,
      flags.FORMAT,
      flags.HEAD_FORMAT,
      flags.WARM_UPS,
      flags.REPEATS,
      flags.CEILING_BYTES,
      _POSITION,
      _LAUNCHES,
    ),
    device=environment.jax_device(),
    commit=commit,
    data=loops.DATA | dict(cache="normal, seeds 0 and 1"),
    measurements=measurements,
    ceilings=measured,
  ).report(output)
  print(phase_times.table(found))
  if output is not None:
    title = (
      f"One step of {flags.PRESET.value}, position {position}, batch {batch},"
      f" {made['device']['kind']}"
    )
    picture = phase_times.draw(found, title)
    picture.write(pathlib.Path(output).with_suffix(".svg"))


if __name__ == "__main__":
  flags.run(main)
