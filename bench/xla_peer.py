"""Times our model in plain JAX at its best, in several variants, in turn.

`bench.xla_step` is the step; the reference runs the prompt.

python -m bench.xla_peer --preset=llama-3.2-1b --output=FILE.json
"""

import functools

from absl import app
from absl import flags as absl_flags

import ffjax
from bench import (
  ceilings,
  checks,
  environment,
  flags,
  harness,
  loops,
  xla_loops,
  xla_step,
)
from bench.loops import SEED
from bench.models import ALL
from bench.xla_loops import VARIANTS
from ffjax.cache import rounded_capacity

_VARIANT = absl_flags.DEFINE_multi_enum(
  "variant", list(VARIANTS), list(VARIANTS), "To time, in turn."
)


def measure(
  model: ffjax.Model,
  names: list[str],
  length: int,
  num_steps: int,
  ceiling_gbps: float,
  warm_ups: int,
  repeats: int,
) -> list[harness.Measurement]:
  """Checks and times variants on one prompt."""
  config = model.config
  token_ids = loops.prompt(config.vocab_size, 1, length)
  capacity = rounded_capacity(length + num_steps)
  checker = checks.Checker(model, token_ids, capacity)
  weights = {
    joined: xla_step.split(model, joined)
    for joined in {VARIANTS[name][0].joined for name in names}
  }
  checked, calls = {}, {}
  for name in names:
    variant, _ = VARIANTS[name]
    mine = weights[variant.joined]
    checked[name] = checker.steps(xla_loops.steps(config, variant, mine))
    checked[name].require(name)
    calls[name] = functools.partial(
      xla_loops.time_loop, name, model, mine, token_ids, num_steps, capacity
    )
  samples = harness.interleave(calls, warm_ups, repeats)
  shape = loops.Shape(
    1, length, num_steps, model.bytes_per_step(1, length + num_steps / 2)
  )
  return loops.measurements(shape, samples, checked, ceiling_gbps, {})


def main(argv: list[str]) -> None:
  """Checks, times, prints and writes."""
  commit = flags.commit(argv)
  if flags.batches() != [1]:
    raise app.UsageError("peers run one sequence: --batch=1")
  measured = ceilings.measure(flags.CEILING_BYTES.value)
  model = ffjax.random_model(ALL[flags.PRESET.value], SEED)
  measurements = []
  for length in flags.prompts():
    measurements += measure(
      model,
      _VARIANT.value,
      length,
      flags.STEPS.value,
      measured["read_gbps"],
      flags.WARM_UPS.value,
      flags.REPEATS.value,
    )
  harness.Result(
    bench="bench.xla_peer",
    flags=flags.values(
      flags.PRESET,
      flags.PROMPT,
      flags.STEPS,
      flags.WARM_UPS,
      flags.REPEATS,
      flags.CEILING_BYTES,
      _VARIANT,
    ),
    device=environment.jax_device(),
    commit=commit,
    data=loops.DATA,
    measurements=measurements,
    ceilings=measured,
  ).report(flags.OUTPUT.value)


if __name__ == "__main__":
  flags.run(main)
