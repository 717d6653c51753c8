"""Times whole decode steps of an implementation on the device at hand.

A step is token ids in, embedding, all layers, final norm, LM head, choice of
the next token ids. Weights are random and of true shape; the prompt is random
tokens, seed 0. The same run checks the result: logits against float32 over a
few steps (`decode.compare`), and measures the device's read ceiling, so that
the figures can be judged. The last line printed is one JSON object.

  python -m bench.decode --preset=llama-3.2-1b --output=FILE.json
"""

import datetime
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import ffjax
from ffjax import decode, stepping
from ffjax.cache import rounded_capacity
from ffjax.presets import PRESETS
from ffjax.sampling import Sampling

_PRESET = flags.DEFINE_enum("preset", "llama-3.2-1b", list(PRESETS), "Model.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Dtype of the weights.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", "reference", "To time.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.")
_PROMPT = flags.DEFINE_integer("prompt", 32, "Prompt tokens of each.")
_STEPS = flags.DEFINE_integer("steps", 128, "Steps in one timed loop.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed loops; all are kept.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Sampling's filter, or none.")
_TOP_P = flags.DEFINE_float("top_p", None, "Sampling's filter, or none.")
_MIN_P = flags.DEFINE_float("min_p", None, "Sampling's filter, or none.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")


def read_ceiling_gbps(
  size_bytes: int = 4 * 10**9, passes: int = 20, repeats: int = 5
) -> float:
  """Measures the best rate of max-reductions over a large array, in GB/s.

  The passes are one device loop, so that launches do not count.
  """
  x = jax.random.normal(jax.random.key(0), (size_bytes // 2,), jnp.bfloat16)

  @jax.jit
  def read(x: jax.Array) -> jax.Array:
    # Each pass depends on the one before, or XLA would do it only once.
    return jax.lax.fori_loop(
      0, passes, lambda _, y: jnp.max(x + y) * jnp.bfloat16(0), jnp.bfloat16(0)
    )

  read(x).block_until_ready()
  samples = []
  for _ in range(repeats):
    begin = time.perf_counter()
    read(x).block_until_ready()
    samples.append(time.perf_counter() - begin)
  return passes * x.nbytes / min(samples) / 1e9


def time_loop(
  model: ffjax.Model, token_ids: np.ndarray, capacity: int
) -> tuple[float, float]:
  """Returns the seconds of one prefill and of one loop of `--steps` steps."""
  static = dict(implementation=_IMPLEMENTATION.value, stop_on_eos=False)
  sampling = Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
  )
  lengths = np.full(len(token_ids), token_ids.shape[1], np.int32)
  begin = time.perf_counter()
  state = stepping.prefill(
    model, token_ids, lengths, sampling, capacity=capacity, **static
  )
  jax.block_until_ready(state)
  prefilled = time.perf_counter()
  _, new_tokens = stepping.decode_steps(
    model, state, _STEPS.value, sampling, max_steps=_STEPS.value, **static
  )
  emitted = np.asarray(new_tokens)
  end = time.perf_counter()
  if (emitted == decode.NO_TOKEN).any():
    raise RuntimeError("the loop ended early")
  return prefilled - begin, end - prefilled


def main(argv: list[str]) -> None:
  """Checks, times, prints and writes."""
  del argv
  config = ffjax.preset(_PRESET.value)
  ceiling_gbps = read_ceiling_gbps()
  model = ffjax.random_model(config, seed=0, dtype=_DTYPE.value)
  if _IMPLEMENTATION.value == "fused":
    model = ffjax.pack(model)
  rng = np.random.default_rng(0)
  shape = (_BATCH.value, _PROMPT.value)
  token_ids = rng.integers(0, config.vocab_size, shape, np.int32)
  checked = decode.compare(
    model,
    token_ids[:, :16].tolist(),
    ("reference_float32", _IMPLEMENTATION.value),
    max_new_tokens=0,
  )
  capacity = rounded_capacity(_PROMPT.value + _STEPS.value)
  compile_s = sum(time_loop(model, token_ids, capacity))
  samples = [
    time_loop(model, token_ids, capacity) for _ in range(_REPEATS.value)
  ]
  step_ms = [1e3 * loop_s / _STEPS.value for _, loop_s in samples]
  mean_length = _PROMPT.value + _STEPS.value / 2
  step_bytes = model.bytes_per_step(_BATCH.value, mean_length)
  median_ms = statistics.median(step_ms)
  result: dict[str, Any] = dict(
    date=datetime.date.today().isoformat(),
    device=jax.devices()[0].device_kind,
    jax=jax.__version__,
    ffjax=ffjax.__version__,
    flags={
      flag.name: flag.value
      for flag in (
        _PRESET,
        _DTYPE,
        _IMPLEMENTATION,
        _BATCH,
        _PROMPT,
        _STEPS,
        _REPEATS,
        _TEMPERATURE,
        _TOP_K,
        _TOP_P,
        _MIN_P,
      )
    },
    weights="random, seed 0",
    step_ms=round(median_ms, 4),
    step_ms_samples=[round(ms, 4) for ms in step_ms],
    prefill_ms_samples=[round(1e3 * s, 3) for s, _ in samples],
    first_call_s=round(compile_s, 2),
    step_bytes=step_bytes,
    achieved_gbps=round(step_bytes / median_ms / 1e6, 1),
    read_ceiling_gbps=round(ceiling_gbps, 1),
    share_of_ceiling=round(step_bytes / median_ms / 1e6 / ceiling_gbps, 4),
    check=dict(
      against="reference_float32",
      positions=checked.num_positions,
      relative_logit_error=checked.relative_logit_error,
      mean_kl=checked.mean_kl,
    ),
  )
  line = json.dumps(result)
  if _OUTPUT.value is not None:
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n", encoding="ascii")
  print(line)


if __name__ == "__main__":
  app.run(main)
