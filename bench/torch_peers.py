"""Times PyTorch's decode steps on the same shapes as ours, in turn.

  python -m bench.torch_peers --preset=llama-3.2-1b --output=FILE.json

Needs `torch` and `transformers`; the compiler takes a minute or more. The check
is against the same model in float32, all positions at once and without a cache.
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app
from absl import flags as absl_flags

import ffjax
from bench import checks, flags, harness, loops
from bench.loops import SEED, LoopRun
from bench.models import ALL
from ffjax import params as params_lib
from ffjax.cache import rounded_capacity

try:
  import torch

  from bench import torch_step
except ImportError as e:
  sys.exit(f"bench.torch_peers needs torch and transformers: {e}")

PEERS = ("transformers", "cuda_graph", "cuda_graph_compiled")
_PEER = absl_flags.DEFINE_multi_enum("peer", PEERS, PEERS, "To time, in turn.")

_CHECKED_STEPS = 4
_PASSES = 20
_COLUMNS = 4096


def _device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def _describe() -> dict[str, Any]:
  if not torch.cuda.is_available():
    return dict(kind="cpu", platform="cpu", num_sms=None)
  found = torch.cuda.get_device_properties(0)
  return dict(
    kind=found.name, platform="gpu", num_sms=found.multi_processor_count
  )


def measure_ceilings(size_bytes: int, repeats: int = 5) -> dict[str, Any]:
  """Does what `bench.ceilings.measure` does, by PyTorch's reductions and copy."""
  rows = max(size_bytes // 2 // _COLUMNS, 1)
  generator = torch.Generator(_device()).manual_seed(SEED)
  x = torch.empty((rows, _COLUMNS), dtype=torch.bfloat16, device=_device())
  x.normal_(generator=generator)
  largest = x.amax(0).amax()
  target = torch.empty_like(x)
  kinds: dict[str, tuple[Callable[[], Any], int]] = {
    "read: bfloat16 maximum": (x.max, 1),
    "read: bfloat16 maximum by rows": (lambda: x.amax(1), 1),
    "copy: array to array": (lambda: target.copy_(x), 2),
  }

  def rate(call: Callable[[], Any], times: int) -> float:
    _wait()
    begin = time.perf_counter()
    for _ in range(_PASSES):
      call()
    _wait()
    moved_bytes = _PASSES * times * x.numel() * x.element_size()
    return moved_bytes / (time.perf_counter() - begin) / 1e9

  calls = {name: functools.partial(rate, *kind) for name, kind in kinds.items()}
  samples = harness.interleave(calls, warm_ups=2, repeats=repeats)
  made = []
  for name, (call, _) in kinds.items():
    same = torch.equal(call().max(), largest)
    if name.startswith("copy"):
      same = torch.equal(target, x)
    check = harness.Check(
      "its source, or the same by columns",
      {"differing": float(not same)},
      {"differing": 0.0},
    )
    made.append(
      harness.Measurement(
        name=name,
        unit="GB/s",
        samples=samples.timed[name],
        warm_ups=samples.warm_ups,
        check=check,
        clocks=samples.clocks,
      )
    )
  best = {
    kind: max(max(m.samples) for m in made if m.name.startswith(kind))
    for kind in ("read", "copy")
  }
  return dict(
    read_gbps=best["read"],
    copy_gbps=best["copy"],
    measurements=[m.to_json() for m in made],
  )


def bytes_per_step(config: ffjax.LlamaConfig, mean_length: float) -> int:
  """Returns what a step must read with bfloat16 weights, by our own count."""
  tree: dict[str, Any] = {}
  for leaf in params_lib.leaves(config):
    below = tree
    for key in leaf.path[:-1]:
      below = below.setdefault(key, {})
    below[leaf.path[-1]] = jax.ShapeDtypeStruct(leaf.shape, "bfloat16")
  model = ffjax.Model(params=tree, config=config)
  return model.bytes_per_step(1, mean_length)


def make_peer(
  name: str, config: ffjax.LlamaConfig, model: Any, capacity: int
) -> "torch_step.Peer":
  """Makes a peer by name."""
  if name == "transformers":
    return torch_step.Transformers(model, capacity)
  compiled = name == "cuda_graph_compiled"
  return torch_step.CudaGraph(config, model, capacity, compiled)


def check(
  peer: "torch_step.Peer",
  token_ids: "torch.Tensor",
  exact: np.ndarray,
  reference_error: float,
) -> harness.Check:
  """Compares a peer's last steps on a prompt with float32 logits of it."""
  peer.prefill(token_ids[: -len(exact)])
  logits = peer.logits(token_ids[-len(exact) :]).cpu().numpy()
  return harness.Check(
    against="transformers in float32, at the end of the prompt",
    metrics=dict(
      relative_logit_error=checks.relative_error(logits, exact),
      mean_kl=checks.mean_kl(logits, exact),
      reference_error=reference_error,
    ),
    limits=dict(
      relative_logit_error=checks.MOST_ERROR * reference_error,
      reference_error=checks.MOST_REFERENCE_ERROR,
    ),
  )


def time_loop(
  peer: "torch_step.Peer",
  token_ids: "torch.Tensor",
  num_steps: int,
  vocab_size: int,
) -> LoopRun:
  """Runs a prefill and a loop of a peer.

  Raises:
    CheckFailedError: if what was emitted are not that many token ids.
  """
  _wait()
  begin = time.perf_counter()
  peer.prefill(token_ids)
  _wait()
  middle = time.perf_counter()
  emitted = peer.run(num_steps).cpu().numpy()
  end = time.perf_counter()
  loops.check_tokens(emitted, (num_steps,), vocab_size)
  return LoopRun(middle - begin, end - middle, emitted)


def measure(
  config: ffjax.LlamaConfig,
  model: Any,
  names: list[str],
  length: int,
  num_steps: int,
  ceiling_gbps: float,
  warm_ups: int,
  repeats: int,
) -> list[harness.Measurement]:
  """Checks and times peers on one prompt."""
  ids = loops.prompt(config.vocab_size, 1, length)[0].astype(np.int64)
  token_ids = torch.from_numpy(ids).to(_device())
  capacity = rounded_capacity(length + num_steps)
  count = min(_CHECKED_STEPS, length - 1)
  exact = torch_step.float32_logits(model, token_ids, count).cpu().numpy()
  rounded = torch_step.last_logits(model, token_ids, count).cpu().numpy()
  reference_error = checks.relative_error(rounded, exact)
  checked, calls = {}, {}
  for name in names:
    peer = make_peer(name, config, model, capacity)
    checked[name] = check(peer, token_ids, exact, reference_error)
    checked[name].require(name)
    calls[name] = functools.partial(
      time_loop, peer, token_ids, num_steps, config.vocab_size
    )
  samples = harness.interleave(calls, warm_ups, repeats)
  step_bytes = bytes_per_step(config, length + num_steps / 2)
  shape = loops.Shape(1, length, num_steps, step_bytes)
  return loops.measurements(shape, samples, checked, ceiling_gbps, {})


def main(argv: list[str]) -> None:
  """Checks, times, prints and writes."""
  commit = flags.commit(argv)
  if flags.batches() != [1]:
    raise app.UsageError("peers run one sequence: --batch=1")
  # JAX only counts bytes here; the GPU's memory is PyTorch's.
  jax.config.update("jax_platforms", "cpu")
  config = ALL[flags.PRESET.value]
  rates = measure_ceilings(flags.CEILING_BYTES.value)
  model = torch_step.make_model(config, SEED, _device())
  measurements = []
  for length in flags.prompts():
    measurements += measure(
      config,
      model,
      _PEER.value,
      length,
      flags.STEPS.value,
      rates["read_gbps"],
      flags.WARM_UPS.value,
      flags.REPEATS.value,
    )
  harness.Result(
    bench="bench.torch_peers",
    flags=flags.values(
      flags.PRESET,
      flags.PROMPT,
      flags.STEPS,
      flags.WARM_UPS,
      flags.REPEATS,
      flags.CEILING_BYTES,
      _PEER,
    ),
    device=_describe(),
    commit=commit,
    data=loops.DATA,
    measurements=measurements,
    ceilings=rates,
  ).report(flags.OUTPUT.value)


if __name__ == "__main__":
  flags.run(main)
