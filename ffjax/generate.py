"""The command line: `python -m ffjax.generate --checkpoint=DIR --prompt=TEXT`.

Text streams to standard output; the progress bar and the closing line of
timings go to standard error, so that the text alone can be piped on.
"""

import io
import os
import sys
import time
from typing import Any, TextIO

import jax
from absl import app, flags, logging

from ffjax import checkpoint, decode, implementation, packing
from ffjax import prompts as prompts_lib
from ffjax.errors import FfjaxError, RequestError
from ffjax.model_flags import CHECKPOINT, DTYPE
from ffjax.params import Model
from ffjax.text import StreamDecoder, Tokenizer

_PROMPT = flags.DEFINE_string(
  "prompt", None, "Text to continue, or '-' for stdin."
)
_CHAT = flags.DEFINE_bool(
  "chat", False, "Put the prompt into the checkpoint's chat template."
)
_SYSTEM = flags.DEFINE_string("system", None, "System message, with --chat.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 64, "Stop after so many tokens."
)
_IMPLEMENTATION = flags.DEFINE_enum(
  "implementation", "auto", implementation.NAMES, "What runs the steps."
)
_KEEP_QUANTIZED = flags.DEFINE_bool(
  "keep_quantized",
  None,
  "Keep quantised matrices in their own bits; default: not those of GGUF.",
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Keep this much probability.")
_MIN_P = flags.DEFINE_float(
  "min_p", None, "Keep tokens this likely, relative to the likeliest."
)
_REPETITION_PENALTY = flags.DEFINE_float(
  "repetition_penalty", None, "Above 1 disfavours tokens already there."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_STOP_ON_EOS = flags.DEFINE_bool("stop_on_eos", True, "Stop at the end token.")


class _ProgressBar:
  """A bar that is redrawn in place, at most ten times a second."""

  _WIDTH = 30

  def __init__(self, label: str, file: TextIO):
    self._label = label
    self._file = file
    self._drawn_at = float("-inf")

  def __call__(self, done_bytes: int, total_bytes: int) -> None:
    now = time.monotonic()
    if done_bytes < total_bytes and now - self._drawn_at < 0.1:
      return
    self._drawn_at = now
    filled = self._WIDTH * done_bytes // total_bytes
    bar = "#" * filled + "." * (self._WIDTH - filled)
    end = "\n" if done_bytes >= total_bytes else ""
    self._file.write(
      f"\r{self._label} [{bar}] {done_bytes / 1e9:.2f} /"
      f" {total_bytes / 1e9:.2f} GB{end}"
    )
    self._file.flush()


def _prompt_text() -> str:
  prompt = _PROMPT.value
  assert prompt is not None  # A required flag.
  if prompt != "-":
    return prompt
  if sys.stdin is None:
    raise RequestError("--prompt=-: standard input is closed")
  try:
    return sys.stdin.buffer.read().decode("utf-8")
  except UnicodeDecodeError as e:
    raise RequestError(f"--prompt=-: standard input is not UTF-8: {e}") from e


def _prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
  if not _CHAT.value:
    if _SYSTEM.value is not None:
      raise RequestError("--system needs --chat")
    return tokenizer.encode(prompt)
  messages: list[dict[str, str]] = [{"role": "user", "content": prompt}]
  if _SYSTEM.value is not None:
    messages.insert(0, {"role": "system", "content": _SYSTEM.value})
  rendered = tokenizer.render_chat(messages)
  return tokenizer.encode(rendered, add_special_tokens=False)


def _timings(
  model: Model, prompt_length: int, times_s: list[float], **seconds: float
) -> str:
  """Formats the closing line.

  Args:
    model: what ran.
    prompt_length: tokens in the prompt.
    times_s: when prefill began, and when each new token was there.
    **seconds: other durations, by name.
  """
  parts = [f"{name} {value:.2f} s" for name, value in seconds.items()]
  parts.append(
    f"prefill {prompt_length} tokens {1e3 * (times_s[1] - times_s[0]):.1f} ms"
  )
  num_steps = len(times_s) - 2
  if num_steps > 0:
    step_s = (times_s[-1] - times_s[1]) / num_steps
    step_bytes = model.bytes_per_step(1, prompt_length + num_steps / 2)
    parts.append(
      f"{1e3 * step_s:.2f} ms/token, {1 / step_s:.1f} tokens/s,"
      f" {step_bytes / step_s / 1e9:.1f} GB/s over {num_steps} steps"
    )
  (device,) = jax.tree.leaves(model.params)[0].devices()
  parts.append(device.device_kind)
  return " | ".join(parts)


def _run() -> None:
  sampling = decode.Sampling(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    repetition_penalty=_REPETITION_PENALTY.value,
    seed=_SEED.value,
  )
  prompts_lib.check_count("max_new_tokens", _MAX_NEW_TOKENS.value, at_least=1)
  path = CHECKPOINT.value
  assert path is not None  # A required flag.
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:
    raise RequestError(f"JAX finds no device: {e}") from e
  implementation.resolve(_IMPLEMENTATION.value)
  shown = _prompt_text()
  # All that can be wrong with the request, before the weights are read.
  begin = time.perf_counter()
  opened = checkpoint.open_checkpoint(path)
  tokenizer = opened.tokenizer
  if tokenizer is None:
    raise RequestError(f"{path}: there is no tokenizer for text")
  prompt = _prompt_ids(shown, tokenizer)
  prompts_lib.check_lengths(opened.config, [prompt], _MAX_NEW_TOKENS.value)
  shapes = opened.shapes(DTYPE.value, _KEEP_QUANTIZED.value)
  pack = implementation.wants_packed(_IMPLEMENTATION.value, shapes)

  model = opened.load(
    dtype=DTYPE.value,
    progress=_ProgressBar("loading", sys.stderr),
    keep_quantized=_KEEP_QUANTIZED.value,
  )
  if pack:
    model = packing.pack(model)
  jax.block_until_ready(model.params)
  loaded = time.perf_counter()
  options: dict[str, Any] = dict(
    implementation=_IMPLEMENTATION.value,
    sampling=sampling,
    stop_on_eos=_STOP_ON_EOS.value,
  )
  arguments = (model, [prompt], _MAX_NEW_TOKENS.value)
  decode.warm_up(*arguments, **options)
  compiled = time.perf_counter()

  if not _CHAT.value:
    print(shown, end="", flush=True)
  text = StreamDecoder(tokenizer)
  times_s = [time.perf_counter()]
  for token_ids in decode.stream(*arguments, **options):
    times_s.append(time.perf_counter())
    print(text.push(int(token_ids[0])), end="", flush=True)
  print(text.flush(), flush=True)
  print(
    _timings(
      model,
      len(prompt),
      times_s,
      load=loaded - begin,
      compile=compiled - loaded,
    ),
    file=sys.stderr,
  )


def main(argv: list[str]) -> int:
  """Runs the command line; bad input is one line on standard error."""
  # What is closed is None in Python; nobody listens, so write to nowhere.
  sys.stdout = sys.stdout or open(os.devnull, "w")
  sys.stderr = sys.stderr or open(os.devnull, "w")
  try:
    for stream in (sys.stdout, sys.stderr):
      if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # Of a terminal that is not UTF-8.
    if len(argv) > 1:
      raise RequestError(f"unexpected argument {argv[1]!r}")
    _run()
  except FfjaxError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    # XLA's allocator reports a full device this way.
    if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
      print(f"error: out of memory: {str(e).splitlines()[0]}", file=sys.stderr)
      return 1
    raise
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    # The reader has what it wanted; keep Python from flushing into the pipe.
    sys.stdout = None
    return 0
  except OSError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.stdout = None
    return 1
  return 0


def _early(argv: list[str]) -> list[str]:
  # Before JAX looks for devices and logs about those it does not find.
  logging.set_verbosity(logging.WARNING)
  return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
  flags.mark_flags_as_required(["checkpoint", "prompt"])
  app.run(main, flags_parser=_early)
