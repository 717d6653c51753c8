"""Times whole decode steps of implementations on the device at hand.

A step is token ids in, embedding, all layers, final norm, LM head, choice of
the next token ids. Weights are random and of true shape; the prompt is random
tokens. The same process checks logits against float32 before it times anything, and
then every step of the loops (`bench.checks`); it measures what the device can read,
so that the figures can be judged. Several implementations and batches take turns,
loop by loop.

  python -m bench.decode --preset=llama-3.2-1b --implementation=fused,reference \
    --prompt=32,1024 --batch=1,8 --output=FILE.json
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
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
from ffjax.params import matrix_formats
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


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """What is timed after one batch of prompts; mappings go by implementation.

  Attributes:
    shape: of the loops.
    candidates: the loops.
    checked: their steps before they run.
    details: what else there is to say.
  """

  shape: loops.Shape
  candidates: dict[str, loops.Loop]
  checked: dict[str, harness.Check]
  details: dict[str, dict[str, Any]]


def _prepare(
  models: dict[str, ffjax.Model],
  token_ids: np.ndarray,
  num_steps: int,
  sampling: Sampling,
) -> _Prepared:
  """Runs a prompt `[B, T]` and checks implementations at its start and end."""
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
  mean_length = length + num_steps / 2
  shape = loops.Shape(
    batch, length, num_steps, first.bytes_per_step(batch, mean_length)
  )
  return _Prepared(shape, candidates, checked, details)


def _check_loops(
  prepared: _Prepared, first: Mapping[str, loops.LoopRun], greedy: bool
) -> dict[str, harness.Check]:
  """Checks every step of the loops.

  Raises:
    CheckFailedError: if one is not the model's.
  """
  checked, checkers = {}, {}
  model = next(iter(prepared.candidates.values())).model
  for name, loop in prepared.candidates.items():
    # Caches of one dtype begin alike.
    state = loop.start.state
    if id(state) not in checkers:
      checkers[id(state)] = checks.LoopChecker(
        model, state.token_ids, state.cache
      )
    checked[name] = checkers[id(state)].implementation(
      name,
      loop.model,
      first[name].token_ids,
      prepared.checked[name],
      greedy=greedy,
    )
    checked[name].require(name)
  return checked


def measure(
  models: dict[str, ffjax.Model],
  prompts: Sequence[np.ndarray],
  num_steps: int,
  sampling: Sampling,
  ceiling_gbps: float,
  warm_ups: int,
  repeats: int,
) -> list[harness.Measurement]:
  """Checks and times implementations, in turn, on prompts of several batches.

  Raises:
    CheckFailedError: before anything is timed, if one is not the model, or
      after it, if its loop is not.
  """
  prepared = [_prepare(models, x, num_steps, sampling) for x in prompts]
  candidates = {
    f"{i}: {name}": loop
    for i, one in enumerate(prepared)
    for name, loop in one.candidates.items()
  }
  samples = harness.interleave(candidates, warm_ups, repeats)
  measurements = []
  for i, one in enumerate(prepared):
    mine = dataclasses.replace(
      samples,
      first={x: samples.first[f"{i}: {x}"] for x in one.candidates},
      timed={x: samples.timed[f"{i}: {x}"] for x in one.candidates},
    )
    measurements += loops.measurements(
      one.shape,
      mine,
      _check_loops(one, mine.first, sampling.greedy),
      ceiling_gbps,
      one.details,
      repeatable=["fused"],
    )
  return measurements


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
  # What cannot run is said before anything is measured.
  for name in names:
    resolve(name)
  formats = flags.FORMAT.value, flags.HEAD_FORMAT.value
  if formats != (None, None):
    matrix_formats(config, *formats)
  device_memory.join_pieces()
  measured = ceilings.measure(flags.CEILING_BYTES.value)
  spare = spare_bytes(
    config, sum(flags.batches()), max(flags.prompts()), flags.STEPS.value
  )
  models, took = make_models(
    config,
    names,
    _DTYPE.value,
    flags.FORMAT.value,
    flags.HEAD_FORMAT.value,
    spare,
  )
  result = harness.Result(
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
    measurements=[],
    ceilings=measured,
  )
  for length in flags.prompts():
    measurements = measure(
      models,
      [loops.prompt(config.vocab_size, b, length) for b in flags.batches()],
      flags.STEPS.value,
      sampling,
      measured["read_gbps"],
      flags.WARM_UPS.value,
      flags.REPEATS.value,
    )
    # What the next prompt may fail with loses nothing.
    result = dataclasses.replace(
      result, measurements=[*result.measurements, *measurements]
    )
    result.write(flags.OUTPUT.value)
  print(harness.table(result.to_json()["measurements"]))


if __name__ == "__main__":
  flags.run(main)
