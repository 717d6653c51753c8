"""Flags that several scripts share; absl takes each name only once."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from bench import environment, harness
from bench.models import ALL
from ffjax.errors import FfjaxError

PRESET = flags.DEFINE_enum("preset", "llama-3.2-1b", list(ALL), "Model.")
BATCH = flags.DEFINE_list("batch", ["1"], "Sequences.")
PROMPT = flags.DEFINE_list("prompt", ["32"], "Prompt tokens of each.")
FORMAT = flags.DEFINE_string(
  "format", None, "What the layers' matrices are quantised to, if to anything."
)
HEAD_FORMAT = flags.DEFINE_string(
  "head_format", None, "Likewise embedding and LM head, of 8-bit integers."
)
STEPS = flags.DEFINE_integer(
  "steps", 128, "Steps in one timed loop.", lower_bound=1
)
WARM_UPS = flags.DEFINE_integer(
  "warm_ups", 2, "Loops of each before the timed ones.", lower_bound=1
)
REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Timed loops of each; all are kept.", lower_bound=1
)
CEILING_BYTES = flags.DEFINE_integer(
  "ceiling_bytes", 4 * 10**9, "Bytes that the ceilings are measured with."
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
COMMIT = flags.DEFINE_string(
  "commit", None, "Commit of this tree, where it is a copy without .git."
)

# What a loop of steps is made of, and what it is judged by.
LOOP = (PRESET, BATCH, PROMPT, STEPS, WARM_UPS, REPEATS, CEILING_BYTES)

flags.register_validator(
  PROMPT,
  lambda lengths: all(x.isdecimal() and int(x) > 1 for x in lengths),
  "takes whole numbers of at least 2, with commas between them",
)
flags.register_validator(
  BATCH,
  lambda batches: (
    all(x.isdecimal() and int(x) > 0 for x in batches)
    and len({int(x) for x in batches}) == len(batches) > 0
  ),
  "takes whole numbers of at least 1, with commas between them, each once",
)


def prompts() -> list[int]:
  """Returns the lengths of prompts to run."""
  return [int(length) for length in PROMPT.value]


def batches() -> list[int]:
  """Returns the numbers of sequences to run."""
  return [int(batch) for batch in BATCH.value]


def only(holder: flags.FlagHolder, values: list[int]) -> int:
  """Returns the one value of a flag where scripts take no more.

  Args:
    holder: the flag.
    values: of it.

  Raises:
    UsageError: if there are several.
  """
  if len(values) != 1:
    raise app.UsageError(f"--{holder.name}: this script takes one")
  return values[0]


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a script; what it refuses is one line."""

  def checked(argv: list[str]) -> None:
    try:
      main(argv)
    except (FfjaxError, harness.CheckFailedError) as e:
      sys.exit(f"error: {e}")

  app.run(checked)


def commit(argv: list[str], output: str | None = None) -> dict[str, Any]:
  """Returns the commit, having looked at the command line.

  Args:
    argv: what is left of it.
    output: where results go, if not to --output.

  Raises:
    UsageError: if an argument is not a flag, or if a file is asked for and
      nobody knows the commit.
  """
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  return environment.commit_for(output or OUTPUT.value, COMMIT.value)


def values(*holders: flags.FlagHolder) -> dict[str, Any]:
  """Returns flags by name."""
  return {holder.name: holder.value for holder in holders}
