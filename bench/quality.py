"""What quantising costs: bits per byte of held-out text for each format.

  python -m bench.quality --checkpoint=checkpoints/tiny_llama \
    --output=bench/results/cpu/quality/tiny_llama.json

The text's beginning is scored; GPTQ calibrates with its end. The reference runs
the models, so any machine will do.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags as absl_flags

import ffjax
from bench import environment, flags, harness, heldout
from ffjax import checkpoint, scoring
from ffjax.errors import RequestError
from ffjax.model_flags import CHECKPOINT
from ffjax.params import Model
from ffjax.quantized import FORMATS

_HELDOUT = absl_flags.DEFINE_string(
  "heldout", "checkpoints/tiny_llama/heldout.txt", "Text that is scored."
)
_BYTES = absl_flags.DEFINE_integer(
  "bytes", 32_000, "How much of the text's beginning.", lower_bound=1
)
_WINDOW = absl_flags.DEFINE_integer("window", 512, "Tokens seen together.")
_SEQUENCES = absl_flags.DEFINE_integer(
  "sequences", 4, "Sequences of 128 tokens that GPTQ calibrates with."
)
_ONLY = absl_flags.DEFINE_list("only", list(FORMATS), "Formats to try.")

# More than this, in bits per byte, would be a fault and no rounding.
_MOST_LOST = 0.3


def _variants(
  model: Model, sequences: list[list[int]]
) -> Iterator[tuple[str, Model]]:
  """Quantises the model in one way after another."""
  for name in _ONLY.value:
    try:
      yield name, ffjax.quantize(model, name)
    except RequestError as e:  # Its columns are no whole groups.
      print(e)
      continue
    if FORMATS[name].bits == 4:
      made = ffjax.quantize(model, name, method="gptq", calibration=sequences)
      yield f"{name}, GPTQ", made
    elif name == "int8":
      made = ffjax.quantize(model, name, head_format="int8")
      yield "int8, embedding and LM head too", made


def main(argv: list[str]) -> None:
  """Quantises, scores, prints and writes."""
  commit = flags.commit(argv)
  text = pathlib.Path(_HELDOUT.value).read_text(encoding="utf-8")
  texts = heldout.texts_of(text, _BYTES.value)

  def score(model: Model) -> float:
    return scoring.bits_per_byte(model, texts, _WINDOW.value)

  path = CHECKPOINT.value
  assert path is not None  # A required flag.
  opened = checkpoint.open_checkpoint(path)
  baseline = score(opened.load("float32", keep_quantized=False))
  model = opened.load("bfloat16", keep_quantized=False)
  measured: list[harness.Measurement] = []

  def measure(name: str, scored: Model) -> None:
    bits = score(scored)
    jax.clear_caches()  # Every variant compiles anew; keep none of them.
    print(f"{name}: {bits:.4f}", flush=True)
    check = harness.Check(
      against="the model in float32",
      metrics=dict(more_bits_per_byte=bits - baseline),
      limits=dict(more_bits_per_byte=_MOST_LOST),
    )
    details: dict[str, Any] = dict(
      formats=sorted(format.name for format in scored.formats)
    )
    measured.append(
      harness.Measurement(
        name=name,
        unit="bits/byte",
        samples=[bits],
        warm_ups=0,
        check=check,
        clocks={},
        bytes_per_step=scored.weight_bytes_per_step(),
        details=details,
      )
    )

  measure("bfloat16", model)
  own = opened.load("bfloat16", keep_quantized=True)
  if own.formats:
    measure("the file's own bits", own)
  del own
  sequences = heldout.calibration(model, text, _BYTES.value, _SEQUENCES.value)
  for name, made in _variants(model, sequences):
    measure(name, made)
  harness.Result(
    bench="bench.quality",
    flags=flags.values(
      CHECKPOINT, _HELDOUT, _BYTES, _WINDOW, _SEQUENCES, _ONLY
    ),
    device=environment.jax_device(),
    commit=commit,
    data=dict(scored_bytes=sum(len(x.encode()) for x in texts)),
    measurements=measured,
  ).report(flags.OUTPUT.value)


if __name__ == "__main__":
  absl_flags.mark_flag_as_required("checkpoint")
  flags.run(main)
