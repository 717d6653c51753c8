"""The benchmark suite on the CPU: what it writes, and what it refuses."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app

import ffjax
from bench import (
  ceilings,
  chart,
  checks,
  environment,
  harness,
  heldout,
  loops,
  phase_times,
  published,
  trace,
  xla_loops,
  xla_step,
)
from ffjax import decode, stepping
from ffjax.cache import rounded_capacity
from pallas_kernels import mosaic, times

_ROOT = pathlib.Path(__file__).parents[1]
_PASSED = harness.Check("the truth", {"error": 1.0}, {"error": 1.0})
_FAILED = harness.Check("the truth", {"error": 1.1}, {"error": 1.0})
_CLOCKS = {"before": None, "after": None}


def _measurement(**fields):
  made = harness.Measurement(
    name="fused",
    unit="ms",
    samples=[3.0, 1.0, 2.0, 10.0],
    warm_ups=2,
    check=_PASSED,
    clocks=_CLOCKS,
    bytes_per_step=5 * 10**9,
    ceiling_gbps=4000.0,
    details=dict(batch=1, prompt=32),
  )
  return dataclasses.replace(made, **fields)


def _result(*measurements, **flags):
  return harness.Result(
    bench="bench.decode",
    flags={"preset": "llama-3.2-1b", **flags},
    device=dict(kind="NVIDIA H100 80GB HBM3", platform="gpu", num_sms=132),
    commit=dict(hash="0" * 40, dirty=False),
    data=loops.DATA,
    measurements=measurements,
    ceilings=dict(read_gbps=4000.0, copy_gbps=3000.0, measurements=[]),
  )


@pytest.mark.parametrize(
  ("metrics", "limits", "passed"),
  [
    ({"error": 1.0}, {"error": 1.0}, True),
    ({"error": 1.1}, {"error": 1.0}, False),
    ({"error": 0.0, "kl": float("nan")}, {"error": 1.0}, False),
    ({"error": float("nan")}, {"error": 1.0}, False),
    ({"error": 0.0}, {}, False),
  ],
)
def test_check(metrics, limits, passed):
  assert harness.Check("x", metrics, limits).passed == passed


def test_a_wrong_kernel_posts_no_number(tmp_path, capsys):
  path = tmp_path / "result.json"
  result = _result(_measurement(), _measurement(name="wrong", check=_FAILED))
  with pytest.raises(harness.CheckFailedError, match="wrong differs from the"):
    result.report(str(path))
  assert not path.exists()
  assert "ms" not in capsys.readouterr().out


def test_a_result_says_all(tmp_path):
  path = tmp_path / "folder" / "result.json"
  _result(_measurement()).report(str(path))
  read = harness.load(path)
  assert read.keys() == {
    "schema",
    "bench",
    "date",
    "commit",
    "device",
    "versions",
    "flags",
    "data",
    "ceilings",
    "measurements",
  }
  assert read["versions"]["jax"] == jax.__version__
  (m,) = read["measurements"]
  assert m["samples"] == [3.0, 1.0, 2.0, 10.0]
  assert (m["median"], m["min"], m["max"]) == (2.5, 1.0, 10.0)
  assert m["interquartile"] == 4.75 - 1.75
  assert m["gbps"] == pytest.approx(2000)
  assert m["share_of_ceiling"] == pytest.approx(0.5)
  assert m["check"] == {**dataclasses.asdict(_PASSED), "passed": True}
  assert m["clocks"] == _CLOCKS
  assert m["warm_ups"] == 2


def test_candidates_take_turns():
  calls = []

  def candidate(name):
    def call():
      calls.append(name)
      return len(calls)

    return call

  samples = harness.interleave(
    {"a": candidate("a"), "b": candidate("b")}, warm_ups=2, repeats=3
  )
  assert calls == ["a", "b"] * 5
  assert samples.first == {"a": 1, "b": 2}
  assert samples.timed == {"a": [5, 7, 9], "b": [6, 8, 10]}


def test_a_commit_can_be_given():
  found = environment.commit("abc")
  assert (found["hash"], found["dirty"]) == ("abc", None)


def test_other_sources_have_another_hash(tmp_path, monkeypatch):
  monkeypatch.setattr(environment, "_ROOT", tmp_path)
  found = {environment.sources_sha256()}
  (tmp_path / "ffjax").mkdir()
  for text in ("x = 1\n", "x = 2\n"):
    (tmp_path / "ffjax/a.py").write_text(text, encoding="utf-8")
    found.add(environment.sources_sha256())
  (tmp_path / "ffjax/a.py").rename(tmp_path / "ffjax/b.py")
  found.add(environment.sources_sha256())
  assert len(found) == 4


@pytest.mark.parametrize("new_name", [True, False])
def test_clocks_of_new_and_old_drivers(monkeypatch, new_name):
  def said(command, query, *_):
    assert command == "nvidia-smi"
    if new_name != ("clocks_event_reasons" in query):
      return None
    return "1980, 2619, 41, [N/A], 0x0000000000000004\n1, 2, 3, 4, 0x0\n"

  monkeypatch.setattr(environment, "_output", said)
  assert environment.clocks() == dict(
    sm_mhz=1980.0,
    memory_mhz=2619.0,
    temperature_c=41.0,
    power_w=None,
    throttle_reasons="0x0000000000000004",
  )


def test_ceilings_are_the_best_of_what_was_measured():
  found = ceilings.measure(10**6, repeats=2)
  for kind in ("read", "copy"):
    rates = [
      rate
      for m in found["measurements"]
      for rate in m["samples"]
      if m["name"].startswith(kind)
    ]
    assert len(rates) >= 4
    assert found[f"{kind}_gbps"] == max(rates) > 0


def test_a_reduction_that_reads_less_is_refused(monkeypatch):
  monkeypatch.setattr(
    ceilings,
    "_sum",
    lambda x, passes, axis: jnp.sum(x[: len(x) // (1 if axis == 0 else 2)]),
  )
  with pytest.raises(harness.CheckFailedError, match="uint32 sum"):
    ceilings.measure(10**6, repeats=1)


@pytest.fixture(scope="module")
def model(make_config):
  config = make_config(rope_scaling=ffjax.RopeScaling("llama3", 8.0))
  return ffjax.random_model(config, seed=3)


@pytest.fixture(scope="module")
def checker(model):
  ids = loops.prompt(model.config.vocab_size, 1, 9)
  return checks.Checker(model, ids, capacity=rounded_capacity(32))


def test_reference_passes_its_own_check(checker):
  found = checker.implementation("reference")
  assert found.passed
  assert 0 < found.metrics["relative_logit_error"] < 0.02
  assert found.metrics["relative_logit_error"] == checker.reference_error


def test_other_logits_fail_the_check(model, checker):
  right = checks.implementation_steps(model, "reference")

  def wrong(cache, token_ids):
    logits = right(cache, token_ids).copy()
    logits[-1, 0, 0] += 0.1 * np.abs(logits).max()
    return logits

  assert checker.steps(right).passed
  assert not checker.steps(wrong).passed


def test_a_cache_of_the_prompt_saves_a_prefill_and_tells_no_more(
  model, checker, monkeypatch
):
  ids = checker.token_ids
  start = loops.Start.after(
    model, "reference", ids, checker.capacity, decode.Sampling()
  )
  given = checks.Checker(model, ids, checker.capacity, start.state.cache)
  ours, theirs = given._context, checker._context
  monkeypatch.setattr(stepping, "forward", None)
  assert ours.lengths.tolist() == theirs.lengths.tolist() == [5]
  for x, y in ((ours.k, theirs.k), (ours.v, theirs.v)):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    np.testing.assert_allclose(x, y, rtol=2e-2, atol=1e-3)
    # What a step should have written, and did not, is not there.
    assert np.abs(x[:, :, :, :5]).max() > 0.1
    assert not x[:, :, :, 5:].any()
  assert given.implementation("reference").passed
  assert not start.state.cache.k.is_deleted()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_loops_begin_from_the_same_prompt(model, monkeypatch, temperature):
  sampling = decode.Sampling(temperature=temperature)
  ids = loops.prompt(model.config.vocab_size, 2, 9)
  start = loops.Start.after(model, "reference", ids, 64, sampling)
  assert start.prefill_s > 0
  assert start.compile_s > 0
  emitted = []
  check_tokens = loops.check_tokens

  def watched(tokens, *args):
    emitted.append(np.asarray(tokens).tolist())
    check_tokens(tokens, *args)

  monkeypatch.setattr(loops, "check_tokens", watched)
  loop = loops.Loop(model, "reference", start, 6, sampling)
  for _ in range(2):
    times = loop()
    assert times.loop_s > 0
    assert times.prefill_s is None
  static = dict(stop_on_eos=False)
  state = stepping.prefill(
    model, ids, np.full(2, 9, np.int32), sampling, capacity=64, **static
  )
  _, expected = stepping.decode_steps(
    model, state, 6, sampling, max_steps=6, **static
  )
  assert emitted == [np.asarray(expected).tolist()] * 2


def test_a_count_is_none_where_it_is_limited():
  assert _PASSED.counting("faults", 0).passed
  assert not _PASSED.counting("faults", 1).passed
  told = _PASSED.counting("faults", 1, limited=False)
  assert told.passed
  assert told.metrics == {"error": 1.0, "faults": 1.0}


@pytest.fixture(scope="module")
def loop_run(model):
  """A loop of the reference, and a checker of loops from the same start."""
  ids = loops.prompt(model.config.vocab_size, 2, 9)
  start = loops.Start.after(model, "reference", ids, 64, decode.Sampling())
  run = loops.Loop(model, "reference", start, 6, decode.Sampling())()
  state = start.state
  return run, checks.LoopChecker(model, state.token_ids, state.cache)


def test_every_step_of_a_right_loop_passes(model, loop_run):
  run, of_loop = loop_run
  found = of_loop.implementation("reference", model, run.token_ids, _PASSED)
  assert found.passed
  assert found.metrics["unlike_steps"] == 0
  assert 0 < found.metrics["worst_step_error"] < 0.05
  assert found.metrics["error"] == 1.0
  assert not of_loop.cache.k.is_deleted()


def test_tokens_that_the_steps_would_not_choose_are_counted(
  model, loop_run, monkeypatch
):
  run, of_loop = loop_run
  # The last one of a sequence, after which nothing is run.
  emitted = run.token_ids.copy()
  emitted[1, -1] = (emitted[1, -1] + 1) % model.config.vocab_size
  made = of_loop.implementation("reference", model, emitted, _PASSED)
  assert made.passed
  assert made.metrics["unlike_steps"] == 1
  # It is only told of the reference, and forbids a fused figure.
  right = checks.implementation_steps
  monkeypatch.setattr(
    checks,
    "implementation_steps",
    lambda model, name: right(model, name.replace("fused", "reference")),
  )
  made = of_loop.implementation("fused", model, run.token_ids, _PASSED)
  assert made.passed
  assert not of_loop.implementation("fused", model, emitted, _PASSED).passed
  sampled = of_loop.implementation(
    "fused", model, emitted, _PASSED, greedy=False
  )
  assert sampled.passed


@pytest.mark.parametrize("no_number", [False, True])
def test_one_wrong_step_of_one_sequence_fails_a_loop(
  model, loop_run, monkeypatch, no_number
):
  run, of_loop = loop_run
  right = checks.implementation_steps

  def wrong(model, name):
    def steps(cache, token_ids):
      logits = right(model, "reference")(cache, token_ids)
      if name == "fused":
        # The choice stays.
        smallest = logits[4, 1].argmin()
        logits[4, 1, smallest] -= 0.1 * np.linalg.norm(logits[4, 1])
        if no_number:
          logits[4, 1] = np.nan
      return logits

    return right(model, name) if name == checks.BASELINE else steps

  monkeypatch.setattr(checks, "implementation_steps", wrong)
  found = of_loop.implementation("fused", model, run.token_ids, _PASSED)
  assert no_number or found.metrics["unlike_steps"] == 0
  assert np.isnan(found.metrics["worst_step_error"]) == no_number
  assert not found.passed


def test_a_loop_that_gives_other_tokens_once_is_refused():
  def run(*ids):
    return loops.LoopRun(None, 1.0, np.array([ids]))

  timed = [run(1, 2), run(1, 2), run(1, 3)]
  assert loops.differing_runs(timed) == 1
  samples = harness.Samples({"fused": timed[0]}, 1, {"fused": timed}, {})
  shape = loops.Shape(1, 8, 2, 100)
  given = (shape, samples, {"fused": _PASSED}, None, {})
  (told,) = loops.measurements(*given)
  assert told.check.passed
  assert told.check.metrics["differing_runs"] == 1
  (limited,) = loops.measurements(*given, repeatable=["fused"])
  assert not limited.check.passed


# In a process of its own: its flags are not those of `ffjax.generate`.
_CHOICES = """
import numpy as np
import ffjax
from bench import kernel_steps
from bench.models import ALL
from pallas_kernels import times

def run(*args, plan, with_logits, **kwargs):
  assert not with_logits
  print(plan.in_flight, plan.head_in_flight, plan.compute_wgs, plan.num_slots)
  return *args[1:4], np.zeros((plan.num_ctas, *times.SHAPE), np.int32)

kernel_steps._run = run
model = ffjax.pack(ffjax.random_model(ALL["tiny-llama"], seed=0), num_ctas=3)
for choice in (
  {},
  {"in_flight": 5},
  {"head_in_flight": 7},
  {"compute_wgs": 2},
  {"most_slots": 6},
):
  kernel_steps.KernelLoop(model, 1, 5, 64, 2, False, **choice)()
"""


def test_a_loop_of_the_kernel_takes_what_is_chosen():
  if mosaic.missing():
    pytest.skip(mosaic.missing())
  command = [sys.executable, "-c", _CHOICES]
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, cwd=_ROOT
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    *("2 4 1 13", "5 4 1 13", "2 7 1 13", "2 4 2 13", "2 4 1 6"),
  ]


def test_early_end_of_a_loop_is_refused():
  loops.check_tokens(np.array([[0, 9]]), (1, 2), 10)
  for bad in ([[0, decode.NO_TOKEN]], [[0, 10]], [[0]]):
    with pytest.raises(harness.CheckFailedError, match="a timed loop"):
      loops.check_tokens(np.array(bad), (1, 2), 10)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("product", ["sum", "dot"])
def test_plain_jax_peer_is_the_reference(model, checker, product, joined):
  variant = xla_step.Variant(product, joined)
  weights = xla_step.split(model, joined)
  found = checker.steps(xla_loops.steps(model.config, variant, weights))
  assert found.passed, found


def test_plain_jax_loops_agree(model):
  config, steps = model.config, 6
  ids = loops.prompt(config.vocab_size, 1, 5)
  variant = xla_step.Variant("sum", joined=True)
  weights = xla_step.split(model, joined=True)
  emitted = []
  for loop in (xla_loops.device_loop, xla_loops.host_loop):
    state = stepping.prefill(model, ids, np.array([5], np.int32), capacity=64)
    state = xla_step.state_of(state.cache, state.token_ids[0])
    state, tokens = loop(config, variant, weights, state, steps)
    assert int(state.position) == 5 + steps
    emitted.append(np.asarray(tokens).tolist())
  assert emitted[0] == emitted[1]
  assert len(emitted[0]) == steps


# PyTorch's compiler, imported, warns of PyTorch.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pytorch_peers_are_transformers(make_config):
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from bench import torch_step

  config = make_config(rope_scaling=ffjax.RopeScaling("llama3", 8.0))
  theirs = torch_step.make_model(config, 3, "cpu")
  ids = torch.from_numpy(loops.prompt(config.vocab_size, 1, 9)[0]).long()
  exact = torch_step.float32_logits(theirs, ids, 3).numpy()
  rounded = torch_step.last_logits(theirs, ids, 3).numpy()
  most = 1.5 * checks.relative_error(rounded, exact)
  for peer in (
    torch_step.Transformers(theirs, 64, compiler=lambda step: step),
    torch_step.CudaGraph(config, theirs, 64, compiled=False),
  ):
    peer.prefill(ids[:-3])
    logits = peer.logits(ids[-3:])
    assert 0 < checks.relative_error(logits.numpy(), exact) <= most
    peer.prefill(ids)
    emitted = peer.run(4)
    # Starting over forgets all, and what a loop chose is what the logits say.
    peer.prefill(ids[:-3])
    given = torch.cat([ids[-3:], logits[-1:].argmax(-1), emitted])
    again = peer.logits(given)
    assert torch.equal(again[:3], logits)
    assert again[3:-1].argmax(-1).tolist() == emitted.tolist()


def _run(*args, cwd=_ROOT):
  return subprocess.run(
    [sys.executable, "-m", *args],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
  )


def test_decode_from_end_to_end(tmp_path):
  path = tmp_path / "tiny.json"
  done = _run(
    "bench.decode",
    "--preset=tiny-llama",
    "--implementation=reference",
    "--head_format=int8",
    "--prompt=8,12",
    "--batch=1,3",
    "--steps=3",
    "--repeats=2",
    "--ceiling_bytes=100000",
    "--commit=abc",
    f"--output={path}",
  )
  assert done.returncode == 0, done.stderr
  read = harness.load(path)
  assert read["commit"] == {
    "hash": "abc",
    "dirty": None,
    "sources_sha256": environment.sources_sha256(),
  }
  assert read["flags"]["ceiling_bytes"] == 100000
  assert read["flags"]["implementation"] == ["reference"]
  assert read["flags"]["head_format"] == "int8"
  shapes = [
    (m["details"]["prompt"], m["details"]["batch"])
    for m in read["measurements"]
  ]
  assert shapes == [(8, 1), (8, 3), (12, 1), (12, 3)]
  for m in read["measurements"]:
    assert len(m["samples"]) == 2
    assert m["check"]["passed"]
    assert m["check"]["metrics"]["worst_step_error"] > 0
    assert m["check"]["metrics"]["differing_runs"] == 0
  m = read["measurements"][0]
  assert m["ceiling_gbps"] == read["ceilings"]["read_gbps"]
  assert m["details"]["prompt"] == 8
  assert m["details"]["first_call_s"]["loop_s"] > 0
  (prefill_ms,) = m["details"]["prefill_ms"]
  assert prefill_ms > 0
  assert "| reference, prompt 8 |" in done.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["decode", "--format=int5"], "error: format='int5' does not exist"),
    (["decode", "--batch=1,1"], "flag --batch"),
    (["phases", "--prompt=32,64"], "--prompt: this script takes one"),
    (["tune", "--batch=1,8"], "--batch: this script takes one"),
  ],
)
def test_bad_flags_are_one_line(arguments, message):
  done = _run(f"bench.{arguments[0]}", *arguments[1:])
  assert done.returncode != 0
  assert message in done.stdout + done.stderr
  assert "Traceback" not in done.stderr


def test_a_peer_that_fails_leaves_the_file_of_before(tmp_path):
  before = tmp_path / "2-xla.json"
  before.write_text("what was found before", encoding="utf-8")
  program = (
    "from bench import flags, peers\n"
    "peers.RUNS['2-xla'] = 'bench.that_is_not_there'\n"
    "flags.run(peers.main)\n"
  )
  flags = ["--run=2-xla", "--commit=abc", f"--folder={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-c", program, *flags],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0
  assert "failed: 2-xla" in done.stderr
  assert before.read_text(encoding="utf-8") == "what was found before"
  assert [path.name for path in tmp_path.iterdir()] == ["2-xla.json"]


def test_quality_from_end_to_end(tmp_path):
  path = tmp_path / "quality.json"
  done = _run(
    "bench.quality",
    "--checkpoint=checkpoints/tiny_llama",
    "--bytes=400",
    "--window=64",
    "--sequences=1",
    "--only=int8,int4_g128",
    "--commit=abc",
    f"--output={path}",
  )
  assert done.returncode == 0, done.stderr
  read = harness.load(path)
  assert read["data"]["scored_bytes"] <= 400
  found = {m["name"]: m for m in read["measurements"]}
  assert list(found) == [
    "bfloat16",
    "int8",
    "int8, embedding and LM head too",
    "int4_g128",
    "int4_g128, GPTQ",
  ]
  bits = {name: m["median"] for name, m in found.items()}
  assert 0.5 < bits["bfloat16"] < 4
  assert abs(bits["int8"] - bits["bfloat16"]) < 0.02
  assert bits["bfloat16"] < bits["int4_g128"] < bits["bfloat16"] + 0.2
  sizes = [m["bytes_per_step"] for m in found.values()]
  assert sizes[0] > sizes[1] > sizes[2] > sizes[3] == sizes[4]
  for m in found.values():
    assert m["check"]["passed"]


def test_quality_calibrates_with_what_it_does_not_score():
  model = ffjax.load(_ROOT / "checkpoints/tiny_llama")
  text = "".join(f"line {i}\n" for i in range(400))
  scored = heldout.texts_of(text, 2500)
  joined = "".join(scored)
  assert len(scored) == 2
  assert text.startswith(joined)
  assert 2490 < len(joined) <= 2500
  calibration = heldout.calibration(model, text, 2500, num_sequences=5)
  ids = [token_id for row in calibration for token_id in row]
  assert [len(row) for row in calibration] == [128] * 5
  end = model.tokenizer.decode(ids)
  assert text.endswith(end)
  with pytest.raises(app.UsageError, match="no 2048 tokens after"):
    heldout.calibration(model, text, 2500, num_sequences=16)


def test_a_file_without_a_commit_is_refused_at_once(tmp_path):
  code = (
    "from bench import environment, flags\n"
    "from absl import flags as absl_flags\n"
    "environment._output = lambda *_: None\n"
    "absl_flags.FLAGS(['x', '--output=y'])\n"
    "flags.commit(['x'])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0
  assert "--commit" in done.stderr.splitlines()[-1]


def _write(folder, name, result):
  (folder / name).write_text(json.dumps(result.to_json()))


def test_plot_draws_ours_peers_and_published(tmp_path):
  folder = tmp_path / "h100"
  (folder / "peers").mkdir(parents=True)
  _write(folder, "1.json", _result(_measurement()))
  # Between peers, and so not what is drawn.
  _write(folder / "peers", "1.json", _result(_measurement(samples=[2.6])))
  _write(
    folder / "peers",
    "2.json",
    _result(
      _measurement(name="xla: sum", samples=[5.0]),
      _measurement(name="xla: dot", samples=[4.0]),
    ),
  )
  _write(
    folder, "3.json", _result(_measurement(samples=[0.1]), temperature=1.0)
  )
  for i, (ms, flags) in enumerate(
    [
      (2.25, dict(format="int4_g128", head_format=None)),
      (2.0, dict(format="int4_g128", head_format="int8")),
      (2.4, dict(format=None, head_format="int8")),
    ]
  ):
    _write(folder, f"few{i}.json", _result(_measurement(samples=[ms]), **flags))
  phases = _result(_measurement(name="kernel", samples=[0.1]))
  _write(folder, "4.json", dataclasses.replace(phases, bench="bench.phases"))
  (folder / "old.json").write_text('{"step_ms": 1.0}')
  (folder / "list.json").write_text("[]")
  groups = chart.bars(chart.read(folder), folder.name)
  assert list(groups) == [("llama-3.2-1b", 32)]
  bars = groups["llama-3.2-1b", 32]
  measured = {b.label: b.step_ms for b in bars if b.kind != "published"}
  assert measured == {
    "ffjax, fused": 2.5,
    "ffjax, fused, int4_g128": 2.25,
    "ffjax, fused, int4_g128, int8 head": 2.0,
    "ffjax, fused, int8 head": 2.4,
    "plain JAX, unrolled": 4.0,
  }
  others = [b for b in bars if b.kind == "published"]
  assert len(others) == len(published.of("h100", "llama-3.2-1b")) > 0
  assert {b.note for b in others} == {
    *("published", "measured by us"),
    *("measured by us, context 1024", "measured by us, context 4096"),
  }
  assert [b.step_ms for b in bars] == sorted(b.step_ms for b in bars)
  text = chart.draw(groups, "h100").to_text()
  root = xml.etree.ElementTree.fromstring(text)
  words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
  assert "2.500 ms, 50%" in words
  assert any("published, not in this run" in word for word in words)


def test_peers_stand_beside_what_is_published():
  ours = _result(_measurement()).to_json()
  text = published.table({"1-ours": ours, "4-ours-again": ours}, "llama-3.2-1b")
  lines = text.splitlines()
  others = published.of("h100", "llama-3.2-1b")
  assert len(lines) == 2 + 2 + len(others)
  assert lines[2].startswith("| fused (1-ours), prompt 32 | 2.5000 ms |")
  assert all("not in this run: " in line for line in lines[4:])
  assert {line.count("|") for line in lines} == {8}
  assert published.device_folder("NVIDIA H200") == "h200"


def test_published_figures_name_their_source():
  assert all(f.source and f.kind for f in published.FIGURES)
  assert {f.device for f in published.FIGURES} == {"h100", "h200"}


def _counted():
  counted = np.zeros((3, *times.SHAPE))
  for kind, value in dict(
    fill=10, multiply=30, ring_empty=20, finish=5, ring_full=40
  ).items():
    counted[:, :, times.KINDS.index(kind)] = 1000.0 * value
  counted[1, :, times.KINDS.index("fill")] *= 2
  # Attention has one CTA.
  counted[1:, phase_times.PHASES.index("attention")] = 0
  for kind, value in dict(step=800e3, step_ns=400e3).items():
    counted[:, 0, times.KINDS.index(kind)] = value
  counted[:, 0, times.KINDS.index("sm")] = [2, 0, 1]
  return counted


def test_who_has_no_part_in_the_layers_is_not_in_the_means():
  counted = _counted()
  in_layers = slice(phase_times.PHASES.index("lm_head"))
  counted[2, in_layers, times.KINDS.index("multiply")] = 0
  counted[2, :, times.KINDS.index("fill")] *= 50
  found = phase_times.timeline(counted)
  assert found.num_ctas["lm_head"] == found.num_ctas["qkv"] == 2
  assert found.phases["lm_head"]["waiting for CTAs"].max == 10
  assert found.all_phases["waiting for CTAs"].max == 50
  assert found.reading == pytest.approx(1 - 110 / 400)
  assert len(found.ctas["computing"]) == 3


def test_timeline_says_the_skew():
  found = phase_times.timeline(_counted())
  assert found.cycles_per_us == 2000
  assert found.step_us == 400
  assert found.sms == [2, 0, 1]
  assert found.num_ctas["attention"] == 1
  waiting = found.phases["qkv"]["waiting for CTAs"]
  assert (waiting.min, waiting.max) == (5, 10)
  assert waiting.mean == pytest.approx(20 / 3, abs=0.01)
  assert found.phases["qkv"]["computing"].mean == 5
  assert found.phases["qkv"]["ring empty"].mean == 10
  assert found.ctas["finishing"] == [15, 12.5, 12.5]
  # Full for 6, 5 and 5 times 20 of 400 us.
  assert found.reading == pytest.approx(1 - 320 / 3 / 400)
  assert found.all_phases["finishing"].max == 15
  lines = phase_times.table(found).splitlines()
  assert len(lines) == 2 + len(phase_times.PHASES) + 1
  assert "| 6.7 (5.0 to 10.0) |" in lines[2]
  picture = phase_times.draw(found, "A step").to_text()
  xml.etree.ElementTree.fromstring(picture)


def _trace(num_steps):
  def meta(name, pid, tid, value):
    return dict(ph="M", name=name, pid=pid, tid=tid, args={"name": value})

  events = [
    meta("process_name", 1, 0, "/device:GPU:0"),
    meta("process_name", 2, 0, "/host:CPU"),
    meta("thread_name", 1, 7, "Stream #7(Compute)"),
    meta("thread_name", 1, 8, "XLA Ops"),
    meta("thread_name", 2, 7, "Stream #7(Compute)"),
    dict(ph="X", pid=1, tid=7, name="start", ts=0.0, dur=1.0),
  ]
  for i in range(num_steps):
    for pid, tid in ((1, 7), (1, 8), (2, 7)):
      at = dict(ph="X", pid=pid, tid=tid)
      events.append(dict(at, name="fused", ts=10.0 + 100 * i, dur=90.0))
      events.append(dict(at, name="pad", ts=102.0 + 100 * i, dur=3.0))
  return {"traceEvents": events}


def test_launches_are_counted_on_streams_only():
  few, many = (trace.events_of(_trace(n)) for n in (4, 8))
  # The host looked before the last one.
  many[-2:] = [
    dataclasses.replace(e, begin_us=e.begin_us + 70) for e in many[-2:]
  ]
  assert len(few) == 1 + 2 * 4
  found = trace.launches(few, many, 4)
  assert found.per_step == 2
  assert (found.longest, found.longest_us, found.gap_us) == ("fused", 90, 10)
  # Of the four steps that are more, one with the look.
  assert found.mean_gap_us == 27.5
  assert found.us_per_step == {"start": 0, "fused": 90, "pad": 3}
  assert trace.launches([], [], 4) is None


def test_profiler_sees_no_gpu_on_the_cpu():
  if jax.default_backend() != "cpu":
    pytest.skip("this is about the CPU")
  assert trace.record(lambda: jnp.ones(3)) == []


def test_committed_results_have_the_schema_and_passed():
  folder = pathlib.Path(__file__).parents[1] / "bench" / "results"
  paths = [
    path for path in folder.rglob("*.json") if "check_fused" not in path.parts
  ]
  assert paths
  for path in paths:
    result = harness.load(path)
    assert result is not None, path
    assert all(m["check"]["passed"] for m in result["measurements"]), path
