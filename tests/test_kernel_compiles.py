"""Tests that the kernel compiles for Hopper; they need no GPU."""

import dataclasses
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import ffjax
from ffjax import implementation, stepping
from ffjax.cache import KVCache
from ffjax.packed import PackedParams, geometry_of
from ffjax.sampling import Sampling
from pallas_kernels import steps
from pallas_kernels.formats import Format
from pallas_kernels.plan import make_plan, operand_shapes

aot = pytest.importorskip("pallas_kernels.aot", exc_type=ImportError)

if aot.missing():
  pytest.skip(aot.missing(), allow_module_level=True)

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = ffjax.LlamaConfig.from_json(
  _ROOT / "checkpoints" / "tiny_llama" / "config.json"
)
_MODELS = (
  "llama-3.2-1b",
  "llama-3.2-3b",
  "llama-3.1-8b",
  "smollm2-135m",
  "tiny-llama",
  "smollm2-360m",
  "smollm2-1.7b",
  "tinyllama-1.1b",
  "llama-2-7b",
  "llama-2-13b",
  "llama-3.1-70b",
)


def _run(*args):
  return subprocess.run(
    [sys.executable, "-m", "bench.compile_sm90a", *args],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_no_register_spills():
  # CI runs the command for all of them.
  done = _run("--model=tiny-llama", "--batch=1", "--batch=8")
  print(done.stdout)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 2
  assert all(" 0 + 0 bytes spilled" in line for line in lines)


def test_all_models_of_the_command_are_tested():
  done = _run("--model=none")
  assert all(model in done.stderr for model in _MODELS)
  assert done.stderr.count("|") == len(_MODELS) - 1


def _plan(num_layers):
  config = dataclasses.replace(_CONFIG, num_hidden_layers=num_layers)
  return make_plan(geometry_of(config), 1, 1024, aot.NUM_SMS)


def test_compile_time_does_not_grow_with_layers():
  few, many = (aot.compile_step(_plan(n)) for n in (2, 32))
  # Layers are a loop, not copies of the code: ten times as many, and machines
  # that are busy with other things now and then.
  assert many.compile_s < 3 * few.compile_s
  assert many.registers == few.registers


def test_a_kernel_that_counts_its_time_compiles():
  report = aot.compile_step(_plan(3), timed=True, with_logits=False)
  assert not report.spills


def test_no_register_spills_with_codes_in_the_head():
  # CI runs the command for a batch of 8, too.
  done = _run(
    "--model=llama-3.2-1b",
    "--batch=1",
    "--format=int4_g128",
    "--head_format=int8",
  )
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  assert "llama-3.2-1b, int4_g128, int8 head, batch 1 " in line
  assert " 0 + 0 bytes spilled" in line


# Of rows as long as 4,096, chunks are as wide as they get.
@pytest.mark.parametrize(
  ("layer_format", "batch", "hidden_size"),
  [
    (Format(4, group=128), 1, 4096),
    (Format(4, group=32, scale="float16", beside="zero"), 1, 256),
    (Format(8, scale="float32"), 1, 256),
    (Format(8, is_float=True), 1, 256),
    (Format(4, group=128), 8, 256),
  ],
  ids=str,
)
def test_no_register_spills_with_codes(layer_format, batch, hidden_size):
  geometry = geometry_of(dataclasses.replace(_CONFIG, hidden_size=hidden_size))
  plan = make_plan(
    geometry, batch, 1024, aot.NUM_SMS, layer_format=layer_format
  )
  report = aot.compile_step(plan)
  assert not report.spills, report


_BATCH, _CAPACITY = 2, 1024


def _loop(sampling):
  """Compiles the loop over steps; returns what XLA made, and a cache's shape."""
  plan = make_plan(geometry_of(_CONFIG), _BATCH, _CAPACITY, aot.NUM_SMS)
  target = aot.hopper()

  def shaped(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=target)

  operands = {k: shaped(*v) for k, v in operand_shapes(plan).items()}
  num_norms, segments, columns = operands["norms"].shape
  model = ffjax.Model(
    params=PackedParams(
      qkv=operands["w_qkv"],
      o=operands["w_o"],
      gate_up=operands["w_gate_up"],
      down=operands["w_down"],
      lm_head=operands["w_lm_head"],
      embedding=None,
      norms=shaped((num_norms, segments * columns), jnp.float32),
      norm_dtypes=("bfloat16",) * 3,
    ),
    config=dataclasses.replace(_CONFIG, eos_token_ids=(3, 7)),
  )
  cache = operands["k_cache"]
  key = jax.eval_shape(lambda k: jax.random.split(k, _BATCH), jax.random.key(0))
  state = stepping.DecodeState(
    cache=KVCache(k=cache, v=cache, lengths=shaped((_BATCH,), jnp.int32)),
    token_ids=shaped((_BATCH,), jnp.int32),
    finished=shaped((_BATCH,), jnp.bool_),
    keys=shaped(key.shape, key.dtype),
    seen=None,
  )
  compiled = stepping.decode_steps.lower(
    model,
    state,
    shaped((), jnp.int32),
    sampling,
    max_steps=64,
    implementation="fused",
  ).compile()
  return compiled, cache.shape


def _computations(hlo):
  """Returns the instructions of each computation: names, and their operations.

  Weights of the kernel's code in HLO's text, its attributes, are left out.
  """
  hlo = re.sub(r'"(?:[^"\\]|\\.)*"', '""', hlo)
  found = {}
  for text in hlo.split("\n\n"):
    lines = text.strip().splitlines()
    if len(lines) > 1 and lines[0].endswith("{"):
      name = re.match(r"(?:ENTRY )?%?(\S+)", lines[0])[1]
      # The operation is the first word after the shape, in front of a bracket.
      found[name] = [
        re.search(r"[)\]}] ([a-z-]+)\(", line.split(" = ", 1)[1])[1]
        for line in lines[1:]
        if " = " in line
      ]
  return found


@pytest.mark.parametrize(
  "sampling", [Sampling(), Sampling(temperature=0.5)], ids=["greedy", "sampled"]
)
def test_loop_launches_once_per_step_and_never_copies(sampling, monkeypatch):
  monkeypatch.setattr(implementation, "_machine_lacks", lambda: None)
  compiled, cache_shape = _loop(sampling)
  hlo = compiled.as_text()
  calls = re.findall(r'custom_call_target="(mosaic[^"]*)"', hlo)
  # Sampled, once in the loop over several steps at a time, and once in the other.
  num_calls = steps.LAUNCHES_PER_LOOK if sampling.greedy else 2
  assert calls == ["mosaic_gpu_v2"] * num_calls
  shape = f"bf16[{','.join(map(str, cache_shape))}]"
  copied = rf"= {re.escape(shape)}\S* copy"
  assert not re.search(copied, hlo)
  # It is the shape that a copy would have.
  assert shape in hlo
  memory = compiled.memory_analysis()
  cache_bytes = 2 * math.prod(cache_shape) * 2
  assert memory.alias_size_in_bytes >= cache_bytes
  assert memory.temp_size_in_bytes < cache_bytes


def test_between_greedy_launches_there_is_nothing(monkeypatch):
  monkeypatch.setattr(implementation, "_machine_lacks", lambda: None)
  compiled, _ = _loop(Sampling())
  hlo = compiled.as_text()
  (body,) = re.findall(r" while\(.*body=%?([^,\s]+)", hlo)
  operations = _computations(hlo)[body]
  # Names for what is there already.
  free = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
  assert set(operations) <= {*free, "custom-call"}
  assert operations.count("custom-call") == steps.LAUNCHES_PER_LOOK


def test_spills_are_seen(tmp_path):
  (tmp_path / "body_0.resources.txt").write_text(
    "Resources(smem_scratch_bytes=1024, barrier_counts=Counter({"
    "Barrier(arrival_count=2, num_barriers=10, orders_tensor_core=False): 2,"
    " Barrier(arrival_count=1, num_barriers=3, orders_tensor_core=False): 1}))"
  )
  (tmp_path / "body_0.ptxas").write_text(
    "ptxas warning : Registers are spilled to local memory in function 'body',"
    " 8 bytes spill stores, 4 bytes spill loads\n"
    "ptxas info    : Function properties for body\n"
    "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
    "ptxas info    : Used 255 registers, used 1 barriers\n"
  )
  digests = set()
  for line in (7, 9):
    (tmp_path / "body_0.ptx").write_text(
      f"//\n.visible .entry k()\n{{\n\t.loc\t1 {line} 0\n\tret;   // done\n}}\n"
      f'\t.file\t1 "k.py"\n.section .debug_{line}\n'
    )
    digests.add(aot._report(tmp_path, 1.5).ptx_sha256)
  (digest,) = digests
  report = aot._report(tmp_path, 1.5)
  assert report == aot.Report(
    registers=255,
    spill_store_bytes=8,
    spill_load_bytes=4,
    stack_bytes=16,
    smem_bytes=1024 + 8 * 23,
    ptx_sha256=digest,
    compile_s=1.5,
  )
  assert report.spills


def test_digests_tell_kernels_apart():
  plans = [
    make_plan(geometry_of(_CONFIG), b, 1024, aot.NUM_SMS) for b in (1, 2)
  ]
  assert len({aot.compile_step(plan).ptx_sha256 for plan in plans}) == 2


def test_nothing_to_report_is_an_error():
  with pytest.raises(RuntimeError, match="found 0"):
    aot.compile_for_hopper(lambda x: x, ((8,), "float32"))
