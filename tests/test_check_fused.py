"""`bench.check_fused` itself, with the reference in the place of the fused step.

In a process of its own: its flags are not those of the command line.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PROGRAM = """
import dataclasses, sys
from absl import flags
import ffjax
from bench import check_fused

flags.FLAGS(["check_fused", *sys.argv[2:]])
real = check_fused._step

def step(model, token_ids, cache, *, name):
  if name != "fused":
    return real(model, token_ids, cache, name=name)
  if sys.argv[1] == "another token":
    token_ids = token_ids + 1
  if sys.argv[1] == "no number":
    logits, after, ids = real(model, token_ids, cache, name="reference")
    return logits / 0 * 0, after, ids
  if sys.argv[1] == "what is not live":
    cache = dataclasses.replace(cache, lengths=cache.lengths + 1)
  logits, after, ids = real(model, token_ids, cache, name="reference")
  if sys.argv[1] == "what is not live":
    after = dataclasses.replace(after, lengths=after.lengths - 1)
  return logits, after, ids

check_fused._step = step
model = ffjax.load("checkpoints/tiny_llama", dtype="bfloat16")
for row in check_fused.check_steps("tiny", model, {2: (128, [(3, 70)])}):
  print(row.passed, row.found)
"""
_TEXT = ["--checkpoint=checkpoints/tiny_llama"]


def _python(*arguments):
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    cwd=_ROOT,
    check=False,
  )


def _run(fault, *flags):
  return _python("-c", _PROGRAM, fault, *flags)


@pytest.mark.parametrize(
  ("fault", "flag", "passes"),
  [
    ("none", [], [True, True]),
    ("none", _TEXT, [True, True]),
    ("another token", _TEXT, [False, True]),
    ("what is not live", _TEXT, [False, False]),
    ("no number", _TEXT, [False, False]),
  ],
)
def test_steps_are_checked(fault, flag, passes):
  done = _run(fault, *flag)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert [line.startswith("True") for line in lines] == passes, done.stdout
  same = "at most 1.00, of the worst 1.00, keys and values 1.00" in lines[0]
  assert same == (fault == "none")
  assert ("by sequence [" in lines[0]) == (not passes[0])


_JUDGED_PROGRAM = """
import sys
import ffjax
from absl import flags
from bench import check_fused

flags.FLAGS(["check_fused", *sys.argv[3:]])
ours = iter(float(x) for x in sys.argv[1:3])
theirs = iter((0.5, 2.0))
real = check_fused._errors

def errors(*outs):
  return dict(real(*outs), ours=next(ours), theirs=next(theirs))

check_fused._errors = errors
model = ffjax.load("checkpoints/tiny_llama", dtype="bfloat16")
step = check_fused._step
check_fused._step = lambda *args, name: step(
  *args, name=name.replace("fused", "reference")
)
for row in check_fused.check_steps("tiny", model, {1: (128, [(3,), (70,)])}):
  print(row.passed)
"""


@pytest.mark.parametrize(
  ("ours", "flag", "passes"),
  [
    # Judged by each step, and with a text by the worst of all.
    (("0.7", "2.9"), [], True),
    (("0.8", "1"), [], False),
    (("0.8", "1"), _TEXT, True),
    (("0.5", "3.1"), _TEXT, False),
  ],
)
def test_a_step_s_error_is_judged_by_bfloat16_s(ours, flag, passes):
  done = _python("-c", _JUDGED_PROGRAM, *ours, *flag)
  assert done.stdout.split() == [str(passes), "True"], done.stderr


_RATIOS_PROGRAM = """
import sys
from bench import check_fused

ours = [float(x) for x in sys.argv[1:]]
errors = [dict(a=x, b=y) for x, y in zip(ours, (0.5, 2.0), strict=True)]
print(*check_fused.ratios(errors, "a", "b"))
"""


@pytest.mark.parametrize(
  ("ours", "found"),
  [
    (("2", "1"), "4.0 1.0\n"),
    (("1", "4"), "2.0 2.0\n"),
    (("nan", "1"), "nan nan\n"),
    (("1", "nan"), "nan nan\n"),
  ],
)
def test_ratios_are_of_one_step_and_of_the_worst(ours, found):
  done = _python("-c", _RATIOS_PROGRAM, *ours)
  assert done.stdout == found, done.stdout + done.stderr


_PACKING_PROGRAM = """
import sys
import jax, jax.numpy as jnp
from absl import flags
import ffjax
from bench import check_fused

flags.FLAGS(["check_fused"])
format, fault = sys.argv[1:]
model = ffjax.load("checkpoints/tiny_llama", dtype="bfloat16")
if format != "bfloat16":
  model = ffjax.quantize(model, format)
before = check_fused.digests(model)
real = check_fused.packing.tensor

def tensor(model, path, layer):
  found = real(model, path, layer)
  if fault == "two rows" and path[-2:] == ("down_proj", "weight") and layer == 2:
    return jax.tree.map(lambda x: x.at[:2].set(x[1::-1]), found)
  if fault == "a sign" and path[0] == "norm":
    return found.at[0].multiply(-1)
  return found

check_fused.packing.tensor = tensor
row = check_fused.packing_row("tiny", before, ffjax.pack(model, num_ctas=3))
print(row.passed, row.found)
"""


@pytest.mark.parametrize(
  ("format", "fault", "found"),
  [
    ("bfloat16", "none", "True 0 of 38"),
    ("int4_g128", "none", "True 0 of 38"),
    ("bfloat16", "two rows", "False 1 of 38"),
    ("int4_g128", "two rows", "False 1 of 38"),
    ("bfloat16", "a sign", "False 1 of 38"),
  ],
)
def test_a_bit_that_packing_lost_is_found(format, fault, found):
  done = _python("-c", _PACKING_PROGRAM, format, fault)
  assert done.stdout.startswith(found), done.stdout + done.stderr


_LOOPS_PROGRAM = """
import dataclasses, sys
from absl import flags
import ffjax
from bench import check_fused, loops
from ffjax import stepping

flags.FLAGS(["check_fused", "--launches=9"])
check_fused._LOOP_STEPS = 3
after, decode_steps = loops.Start.after, stepping.decode_steps
emitted = []

def other_after(model, implementation, *args):
  return after(model, "reference", *args)

def other_steps(*args, implementation, **static):
  state, token_ids = decode_steps(*args, implementation="reference", **static)
  emitted.append(token_ids)
  if len(emitted) == 3 and sys.argv[1] == "a token":
    token_ids = token_ids.at[1, 2].add(1)
  if len(emitted) == 3 and sys.argv[1] == "a value":
    v = state.cache.v.at[1, 1, 0, 33, 5].add(1)
    state = dataclasses.replace(
      state, cache=dataclasses.replace(state.cache, v=v)
    )
  return state, token_ids

loops.Start.after, stepping.decode_steps = other_after, other_steps
model = ffjax.load("checkpoints/tiny_llama", dtype="bfloat16")
row = check_fused.loops_row("tiny", model, 2)
print(row.passed, row.found, row.check, emitted[0].shape)
"""


@pytest.mark.parametrize(
  ("fault", "found"),
  [("none", "True 0"), ("a token", "False 1"), ("a value", "False 1")],
)
def test_a_loop_that_differs_is_found(fault, found):
  done = _python("-c", _LOOPS_PROGRAM, fault)
  expected = (
    f"{found} differ in a token, a key or a value batch 2, 3 more loops of 3"
    " steps (2, 3)\n"
  )
  assert done.stdout == expected, done.stdout + done.stderr


_GREEDY_PROGRAM = """
import sys
import numpy as np
from absl import flags
import ffjax
from bench import check_fused

flags.FLAGS(["check_fused"])
real = check_fused._step
model = ffjax.load("checkpoints/tiny_llama", dtype="bfloat16")
prompt = check_fused._prompt(model, 32)

def chosen(token_ids):
  cache = check_fused._cache_of(model, token_ids[:-1], 64)
  logits, *_ = real(model, token_ids[-1:], cache, name="reference")
  return np.asarray(logits[0]).argsort()

order = chosen(prompt)

def go_on(model, prompt, num_tokens, name):
  # Two that part at the first new token.
  at = -1 if name == "reference" or sys.argv[1] == "the same" else 0
  return np.append(prompt, order[at])

def step(model, token_ids, cache, *, name):
  logits, *rest = real(model, token_ids, cache, name=name.replace(
    "fused", "reference"))
  if name == "fused" and sys.argv[1] == "garbage":
    logits = 50 * logits[:, ::-1]
  return logits, *rest

check_fused._continue, check_fused._step = go_on, step
(row,) = check_fused.check_greedy("tiny", model)
print(row.passed, row.found)
"""


@pytest.mark.parametrize(
  ("fault", "passes"),
  [("the same", True), ("another token", False), ("garbage", False)],
)
def test_who_errs_more_may_not_part_for_that(fault, passes):
  done = _python("-c", _GREEDY_PROGRAM, fault)
  assert done.stdout.startswith(str(passes)), done.stdout + done.stderr


def test_only_the_batches_that_are_asked_for_are_checked():
  done = _run("none", "--batch=3", "--batch=8")
  assert (done.returncode, done.stdout) == (0, "")


def test_a_text_that_is_too_short_is_an_error(tmp_path):
  short = tmp_path / "short.txt"
  short.write_text("And the LORD", encoding="utf-8")
  done = _run("none", f"--text={short}", *_TEXT)
  assert f"{short} has 13 tokens, not 71" in done.stderr


def test_what_was_found_before_a_failure_is_written(tmp_path):
  output = tmp_path / "rows.json"
  program = """
import sys
from absl import flags
from bench import check_fused

def stops(name):
  yield check_fused.Row(name, "the first", "as it should be", True)
  raise RuntimeError("and then the machine went")

flags.FLAGS(sys.argv)
check_fused._run_model = stops
check_fused.main(sys.argv[:1])
"""
  flags = ["--in_process", "--model=tiny-llama", f"--output={output}"]
  done = _python("-c", program, *flags, "--commit=abc123")
  assert "| tiny-llama | the first | as it should be | ok |" in done.stdout
  assert "the machine went" in done.stderr
  found = json.loads(output.read_text(encoding="utf-8"))
  assert [row["check"] for row in found["rows"]] == ["the first"]
  assert found["complete"] is False
  assert found["commit"]["hash"] == "abc123"


def test_a_checkpoint_has_its_own_layers():
  flags = ["--num_hidden_layers=1", "--checkpoint=checkpoints/tiny_llama"]
  done = _python("-m", "bench.check_fused", *flags)
  assert done.returncode != 0
  assert "--num_hidden_layers: a checkpoint has its own" in (
    done.stdout + done.stderr
  )


def test_who_is_asked_to_end_ends_what_it_began_and_keeps_its_rows(tmp_path):
  output = tmp_path / "rows.json"
  # The other process finds one row and then sleeps.
  program = """
import sys
from absl import flags
from bench import check_fused

other = '''
import json, os, pathlib, sys, time
row = dict(model="tiny-llama", check=str(os.getpid()), found="", passed=True)
rows = json.dumps(dict(device="theirs", rows=[row], complete=False))
pathlib.Path(sys.argv[1]).write_text(rows)
pathlib.Path(sys.argv[2]).touch()
time.sleep(600)
'''
begun = sys.argv.pop()
check_fused._command = lambda name, output: (
  [sys.executable, "-c", other, str(output), begun]
)
flags.FLAGS(sys.argv)
check_fused.main(sys.argv[:1])
"""
  begun = tmp_path / "begun"
  process = subprocess.Popen(
    [
      *(sys.executable, "-c", program, "--model=tiny-llama"),
      *("--model=group-1", "--jobs=1", "--commit=abc123"),
      *(f"--output={output}", str(begun)),
    ],
    cwd=_ROOT,
  )
  try:
    while not begun.exists():
      assert process.poll() is None
      time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
  finally:
    process.kill()
  found = json.loads(output.read_text(encoding="utf-8"))
  assert found["device"] == "theirs"
  pid, rest = (row["check"] for row in found["rows"])
  assert rest == "the rest"
  assert found["complete"] is False
  with pytest.raises(ProcessLookupError):
    os.kill(int(pid), 0)
