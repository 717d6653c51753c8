"""Times whole decode steps of implementations on the device at hand.

A step is token ids in, embedding, all layers, final norm, LM head, choice of
the next token ids. Weights are random and of true shape; the prompt is random
tokens. The same process checks the logits against float32 (`bench.checks`)
before it times anything, and measures what the device can read, so that the
figures can be judged. Several implementations take turns, loop by loop.

  python -m bench.decode --preset=llama-3.2-1b --implementation=fused,reference \
    --prompt=32,1024 --output=FILE.json
"""

import time
from typing import Any

import jax
import numpy as np
from absl import app
from absl import flags as absl_flags

import ffjax
from bench import ceilings, checks, environment, flags, harness, loops
from bench.loops import SEED
from bench.models import ALL
from ffjax import device_memory
from ffjax.cache import rounded_capacity
from ffjax.errors import RequestError
from ffjax.implementation import resolve
from ffjax.packed import PackedParams
from ffjax.sampling import Sampling

_DTYPE = absl_flags.DEFINE_string("dtype", "bfloat16", "Dtype of the weights.")
_IMPLEMENTATION = absl_flags.DEFINE_list(
  "implementation", ["reference"], "To time, in turn."
)
_TEMPERATURE = absl_flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = absl_flags.DEFINE_integer("top_k", None, "Sampling's filter, or none.")
_TOP_P = absl_flags.DEFINE_float("top_p", None, "Sampling's filter, or none.")
_MIN_P = absl_flags.DEFINE_float("min_p", None, "Sampling's filter, or none.")


# What a run takes beside weights and caches: scores, a layer that is unpacked.
_SPARE_BYTES = 3 * 2**30


def spare_bytes(
  config: ffjax.LlamaConfig, batch: int, longest: int, num_steps: int
) -> int:
  """Returns how much memory checks and loops take beside the weights.

  There is a cache of the prompt and the check's context; beside them, while the
  float32 reference runs, one of twice the size.
  """
  capacity = rounded_capacity(longest + num_steps)
  return 4 * batch * capacity * config.kv_bytes_per_token(2) + _SPARE_BYTES


def make_models(
  config: ffjax.LlamaConfig,
  names: list[str],
  dtype: str,
  format: str | None,
  head_format: str | None = None,
  spare: int = 0,
) -> tuple[dict[str, ffjax.Model], dict[str, float]]:
  """Makes the model for each implementation, of the same weights.

  The kernel wants them packed and the others as they are; where memory does not
  hold both, all run on the packed ones.

  Args:
    config: the model.
    names: of the implementations.
    dtype: of what is not quantised.
    format: what the layers' matrices are quantised to, or None.
    head_format: likewise, embedding and LM head.
    spare: bytes that must stay free.

  Returns:
    Models by implementation, and the seconds that each part took.
  """

  def timed(make: Any, *args: Any) -> tuple[ffjax.Model, float]:
    begin = time.perf_counter()
    made = jax.block_until_ready(make(*args))
    return made, time.perf_counter() - begin

  given = (config, SEED, dtype, format, head_format)
  model, random_s = timed(ffjax.random_model, *given)
  took = dict(random_s=random_s)
  if "fused" not in names:
    return dict.fromkeys(names, model), took
  model, took["pack_s"] = timed(ffjax.pack, model)
  models = dict.fromkeys(names, model)
  others = [name for name in names if name != "fused"]
  if others:
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    try:
      device_memory.require(
        weights + spare, "the model once more, and what runs beside,"
      )
      plain = ffjax.random_model(*given)
      models |= dict.fromkeys(others, plain)
    except RequestError as e:
      print(f"{', '.join(others)} run on packed weights: {e}")
  return models, took


def measure(
  models: dict[str, ffjax.Model],
  token_ids: np.ndarray,
  num_steps: int,
  sampling: Sampling,
  ceiling_gbps: float,
  warm_ups: int,
  repeats: int,
) -> list[harness.Measurement]:
  """Checks and times implementations on one prompt.

  Raises:
    CheckFailedError: before anything is timed, if one is not the model.
  """
  batch, length = token_ids.shape
  capacity = rounded_capacity(length + num_steps)
  # All with caches of one dtype begin from one prefill, and so does the check.
  starts: dict[np.dtype, loops.Start] = {}
  for name, model in models.items():
    dtype = resolve(name, model).dtype(model)
    if dtype not in starts:
      starts[dtype] = loops.Start.after(
        model, name, token_ids, capacity, sampling
      )
  first = next(iter(models.values()))
  start = starts.get(first.dtype)
  checker = checks.Checker(
    first, token_ids, capacity, None if start is None else start.state.cache
  )
  checked, candidates, details = {}, {}, {}
  for name, model in models.items():
    checked[name] = checker.implementation(name, model)
    checked[name].require(name)
    start = starts[resolve(name, model).dtype(model)]
    candidates[name] = loops.Loop(model, name, start, num_steps, sampling)
    details[name] = dict(
      packed=isinstance(model.params, PackedParams),
      prefill_ms=[1e3 * start.prefill_s],
      prefill_compile_s=start.compile_s,
    )
  del checker
  samples = harness.interleave(candidates, warm_ups, repeats)
  for name, loop in candidates.items() if sampling.greedy else ():
    state = loop.start.state
    unlike = checks.unlike_steps(
      loop.model, name, state.token_ids, state.cache, loop.run()[0]
    )
    # Of what one kernel does in both, not a bit may differ. What XLA makes of the
    # reference in a loop may round otherwise than in a step.
    checked[name] = checked[name].counting(
      "unlike_steps", unlike, limited=name == "fused"
    )
    checked[name].require(name)
  model = next(iter(models.values()))
  shape = loops.Shape(
    batch,
    length,
    num_steps,
    model.bytes_per_step(batch, length + num_steps / 2),
  )
  return loops.measurements(shape, samples, checked, ceiling_gbps, details)


def main(argv: list[str]) -> None:
  """Checks, times, prints and writes."""
  commit = flags.commit(argv)
  config = ALL[flags.PRESET.value]
  names = _IMPLEMENTATION.value
  sampling = Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
  )
  device_memory.join_pieces()
  measured = ceilings.measure(flags.CEILING_BYTES.value)
  spare = spare_bytes(
    config, flags.BATCH.value, max(flags.prompts()), flags.STEPS.value
  )
  models, took = make_models(
    config,
    names,
    _DTYPE.value,
    flags.FORMAT.value,
    flags.HEAD_FORMAT.value,
    spare,
  )
  measurements = []
  for length in flags.prompts():
    measurements += measure(
      models,
      loops.prompt(config.vocab_size, flags.BATCH.value, length),
      flags.STEPS.value,
      sampling,
      measured["read_gbps"],
      flags.WARM_UPS.value,
      flags.REPEATS.value,
    )
  harness.Result(
    bench="bench.decode",
    flags=flags.values(
      *flags.LOOP,
      _DTYPE,
      flags.FORMAT,
      flags.HEAD_FORMAT,
      _IMPLEMENTATION,
      _TEMPERATURE,
      _TOP_K,
      _TOP_P,
      _MIN_P,
    ),
    device=environment.jax_device(),
    commit=commit,
    data={**loops.DATA, **took},
    measurements=measurements,
    ceilings=measured,
  ).report(flags.OUTPUT.value)


if __name__ == "__main__":
  app.run(main)
