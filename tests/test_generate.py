"""The command line: text, progress, timings, and errors without traceback."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from ffjax import generate

_ROOT = pathlib.Path(__file__).parents[1]
_CHECKPOINT = str(_ROOT / "checkpoints" / "tiny_llama")


def run_process(*arguments, **options):
  return subprocess.run(
    [sys.executable, "-m", "ffjax.generate", *arguments],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    timeout=300,
    **options,
  )


def run_main(capsys, **values):
  """Runs `main` in this process; returns exit code, stdout and stderr."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["generate"])
  with flagsaver.flagsaver(**values):
    code = generate.main(["generate"])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_streams_text_and_ends_with_timings():
  done = run_process(
    f"--checkpoint={_CHECKPOINT}",
    "--prompt=And the LORD said unto Moses, ",
    "--max_new_tokens=40",
    "--implementation=reference",
    "--dtype=float32",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == (
    "And the LORD said unto Moses, Go and serve the LORD God of Israel.\nAnd\n"
  )
  loading, timings = done.stderr.splitlines()[-2:]
  assert re.search(r"loading \[#{30}\] 0\.01 / 0\.01 GB$", loading)
  assert re.fullmatch(
    r"load [\d.]+ s \| compile [\d.]+ s \| prefill 31 tokens [\d.]+ ms \|"
    r" [\d.]+ ms/token, [\d.]+ tokens/s, [\d.]+ GB/s over 39 steps \| .+",
    timings,
  )
  # Nothing else is there, such as what JAX logs about devices it looks for.
  assert all(
    line.startswith("loading [") for line in done.stderr.splitlines()[1:-1]
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--checkpoint=nowhere", "--prompt=x"], "error: nowhere: no such file"),
    (["--checkpoint=README.md", "--prompt=x"], "error: README.md: expected a"),
    (
      [f"--checkpoint={_CHECKPOINT}", "--prompt=x", "--implementation=y"],
      "should be one of",
    ),
    (["--prompt=x"], "--checkpoint must have a value"),
    ([f"--checkpoint={_CHECKPOINT}", "--prompt=x", "y"], "argument 'y'"),
  ],
)
def test_errors_are_one_message_and_no_traceback(arguments, message):
  done = run_process(*arguments)
  assert done.returncode == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert done.stdout == ""


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"temperature": -1.0}, "temperature=-1.0 must be"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"max_new_tokens": 9999}, "more than max_position_embeddings=1024"),
    ({"implementation": "fused"}, "implementation='fused' cannot run"),
    ({"chat": True}, "no chat template"),
    ({"system": "x"}, "--system needs --chat"),
    ({"prompt": "\udcff"}, "not valid Unicode"),
  ],
)
def test_bad_flags_are_named(capsys, values, message):
  code, out, err = run_main(
    capsys, **{"checkpoint": _CHECKPOINT, "prompt": "x", **values}
  )
  assert code == 1
  # One line: nothing was loaded before the error was found.
  assert err.startswith("error: ")
  assert len(err.splitlines()) == 1
  assert message in err
  assert out == ""


def test_sampling_flags_reach_the_sampler(capsys):
  values = dict(
    checkpoint=_CHECKPOINT, prompt="And", max_new_tokens=40, temperature=2.0
  )
  texts = {
    name: run_main(capsys, **values, **changes)[1]
    for name, changes in (
      ("plain", {}),
      ("again", {}),
      ("seed", {"seed": 1}),
      ("top_k", {"top_k": 1}),
      ("top_p", {"top_p": 1e-6}),
      ("min_p", {"min_p": 1.0}),
      ("penalty", {"repetition_penalty": 50.0}),
    )
  }
  greedy = run_main(capsys, **{**values, "temperature": 0.0})[1]
  assert texts["plain"] == texts["again"]
  assert len({texts[name] for name in ("plain", "seed", "penalty")}) == 3
  assert texts["top_k"] == texts["top_p"] == texts["min_p"] == greedy


@pytest.mark.parametrize(
  ("data", "environment", "message"),
  [
    (b"\xff", {}, "error: --prompt=-: standard input is not UTF-8"),
    (b"x", {"JAX_PLATFORMS": "none_such"}, "error: JAX finds no device"),
  ],
)
def test_surroundings_give_no_traceback(data, environment, message):
  done = subprocess.run(
    [sys.executable, "-m", "ffjax.generate", "--prompt=-"]
    + [f"--checkpoint={_CHECKPOINT}"],
    input=data,
    capture_output=True,
    cwd=_ROOT,
    env={**os.environ, **environment},
    timeout=300,
  )
  assert done.returncode == 1
  assert message in done.stderr.decode()
  assert "Traceback" not in done.stderr.decode()


def test_prompt_from_standard_input():
  done = run_process(
    f"--checkpoint={_CHECKPOINT}",
    "--prompt=-",
    "--max_new_tokens=5",
    input="And the LORD",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("And the LORD")
  assert len(done.stdout) == len("And the LORD") + 6
