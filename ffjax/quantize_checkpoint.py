"""Quantises a checkpoint and saves it in the form of compressed-tensors.

  python -m ffjax.quantize_checkpoint --checkpoint=DIR --save_to=DIR \
    --weights=int4_g128

What is saved, `ffjax.load` and tools that know compressed-tensors read.
"""

import pathlib
import sys

from absl import app, flags, logging

from ffjax import checkpoint, quantizing, saving
from ffjax.errors import FfjaxError, RequestError
from ffjax.model_flags import CHECKPOINT, DTYPE
from ffjax.quantized import FORMATS

_SAVE_TO = flags.DEFINE_string("save_to", None, "Directory to make.")
_WEIGHTS = flags.DEFINE_enum(
  "weights", "int4_g128", list(FORMATS), "Format of the layers' matrices."
)
_METHOD = flags.DEFINE_enum(
  "method", "nearest", quantizing.METHODS, "How weights are rounded."
)
_CALIBRATION = flags.DEFINE_string(
  "calibration",
  None,
  "Text file whose paragraphs GPTQ calibrates with; a few hundred tokens of"
  " what the model will see are enough.",
)


def _calibration_texts(path: str) -> list[str]:
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise RequestError(f"--calibration={path}: cannot be read: {e}") from e
  texts = [part for part in text.split("\n\n") if part.strip()]
  if not texts:
    raise RequestError(f"--calibration={path}: there is no text")
  return texts


def main(argv: list[str]) -> int:
  """Runs the command line; bad input is one line on standard error."""
  try:
    if len(argv) > 1:
      raise RequestError(f"unexpected argument {argv[1]!r}")
    path, output = CHECKPOINT.value, _SAVE_TO.value
    assert path is not None  # Required flags.
    assert output is not None
    # All that can be wrong with the request, before the weights are read.
    saving.check_unused(output)
    texts = None
    if _CALIBRATION.value is not None:
      texts = _calibration_texts(_CALIBRATION.value)
    model = checkpoint.load(path, DTYPE.value, keep_quantized=False)
    before = model.weight_bytes_per_step()
    made = quantizing.quantize(
      model, _WEIGHTS.value, method=_METHOD.value, calibration=texts
    )
    saving.save(made, output)
  except FfjaxError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  after = made.weight_bytes_per_step()
  print(f"{output}: {before / 1e9:.3f} GB a step became {after / 1e9:.3f} GB")
  return 0


if __name__ == "__main__":
  flags.mark_flags_as_required(["checkpoint", "save_to"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
