"""Text that quantised models are scored on, and what they are calibrated with."""

from absl import app

from ffjax.params import Model

_SEQUENCE_TOKENS = 128


def texts_of(text: str, num_bytes: int) -> list[str]:
  """Returns the beginning, whole lines, as documents of about 2,000 bytes."""
  found, size = [""], 0
  for line in text.splitlines(keepends=True):
    size += len(line.encode())
    if size > num_bytes:
      break
    if len(found[-1]) > 2000:
      found.append("")
    found[-1] += line
  return found


def calibration(
  model: Model, text: str, scored_bytes: int, num_sequences: int
) -> list[list[int]]:
  """Returns the end of a text as sequences of tokens.

  Args:
    model: with the tokenizer.
    text: the whole text.
    scored_bytes: how much of its beginning is not for this.
    num_sequences: how many sequences.

  Raises:
    UsageError: if the text is too short.
  """
  count = num_sequences * _SEQUENCE_TOKENS
  assert model.tokenizer is not None
  # No token is longer than 16 bytes on average.
  end = text.encode()[max(scored_bytes, len(text.encode()) - 16 * count) :]
  ids = model.tokenizer.encode(end.decode(errors="ignore"))[-count:]
  if len(ids) < count:
    raise app.UsageError(f"--heldout has no {count} tokens after --bytes")
  starts = range(0, count, _SEQUENCE_TOKENS)
  return [ids[start : start + _SEQUENCE_TOKENS] for start in starts]
