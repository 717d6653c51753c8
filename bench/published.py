"""What others say of their systems, and what we measured of them elsewhere.

None of it comes from the run that it is shown beside, and every figure says so.
One sequence, bfloat16, ms per step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench import harness

# What the device's folder is called, by a part of its kind.
FOLDERS = ("h100", "h200")


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of another system.

  Attributes:
    system: its name.
    device: "h100" or "h200".
    preset: the model's shape, by our name.
    context: tokens in the cache when the loop begins.
    step_ms: milliseconds per step.
    kind: "published" by whoever the source names, or "measured by us" on
      another day than what it is shown beside.
    source: where the figure is from.
  """

  system: str
  device: str
  preset: str
  context: int
  step_ms: float
  kind: str
  source: str


_MEGAKERNELS = "Hazy Research megakernel"
_OTHERS = "msaroufim/megakernels-vs-cuda-graphs, 32 in, 128 out"
_OURS = "one run on 2026-11-21, torch 2.11, JAX 0.11.2, random weights"


def _published(
  system: str,
  device: str,
  preset: str,
  context: int,
  step_ms: float,
  source: str,
) -> Figure:
  return Figure(system, device, preset, context, step_ms, "published", source)


def _measured(
  system: str, device: str, preset: str, step_ms: float, context: int = 32
) -> Figure:
  kind = "measured by us"
  return Figure(system, device, preset, context, step_ms, kind, _OURS)


_H100_1B = ("h100", "llama-3.2-1b")
_H100_8B = ("h100", "llama-3.1-8b")
_H200_1B = ("h200", "llama-3.2-1b")
_KERNEL_ALONE = f"{_MEGAKERNELS}, kernel alone"
_GRAPH = "CUDA graph of tuned kernels"
_JAX = "plain JAX, best of 12"
_GPT_FAST = "gpt-fast, argmax"
_TRANSFORMERS = "transformers, compiled"

FIGURES = (
  _published("FlashFormer", *_H100_8B, 128, 5.43, "arXiv 2505.22758"),
  _published(_MEGAKERNELS, *_H100_1B, 32, 0.973, _OTHERS),
  _published(_MEGAKERNELS, *_H200_1B, 32, 0.760, _OTHERS),
  _published(_GRAPH, *_H100_1B, 32, 0.980, _OTHERS),
  _published(_GRAPH, *_H200_1B, 32, 0.795, _OTHERS),
  _measured(_MEGAKERNELS, *_H100_1B, 0.999),
  _measured(_MEGAKERNELS, *_H200_1B, 0.779),
  _measured(_KERNEL_ALONE, *_H100_1B, 1.377, 1024),
  _measured(_KERNEL_ALONE, *_H100_1B, 2.726, 4096),
  _measured(_KERNEL_ALONE, *_H200_1B, 1.161, 1024),
  _measured(_KERNEL_ALONE, *_H200_1B, 2.523, 4096),
  _measured(_JAX, *_H100_1B, 1.230),
  _measured(_JAX, *_H100_8B, 5.643),
  _measured(_GPT_FAST, *_H100_1B, 1.412),
  _measured(_GPT_FAST, *_H100_8B, 6.085),
  _measured(_TRANSFORMERS, *_H100_1B, 1.816),
  _measured(_TRANSFORMERS, *_H100_8B, 7.453),
)


def of(device: str, preset: str) -> list[Figure]:
  """Lists the figures for a device, by its folder's name, and a model."""
  return [f for f in FIGURES if (f.device, f.preset) == (device, preset)]


def device_folder(kind: str) -> str:
  """Returns what results of a kind of device are kept under."""
  for folder in FOLDERS:
    if folder in kind.lower():
      return folder
  return kind.lower().replace(" ", "-")


def table(results: Mapping[str, Mapping[str, Any]], preset: str) -> str:
  """Formats figures of runs, and what others say, in Markdown.

  Args:
    results: objects of files, by what their run is called.
    preset: the model.
  """
  measurements = [
    {**m, "name": f"{m['name']} ({run})"}
    for run, result in results.items()
    for m in result["measurements"]
  ]
  lines = [harness.table(measurements)]
  kinds = {result["device"]["kind"] for result in results.values()}
  for kind in sorted(kinds):
    lines += [
      f"| {f.system}, prompt {f.context} | {f.step_ms:.3f} ms | | | | |"
      f" {f.kind}, not in this run: {f.source} |"
      for f in of(device_folder(kind), preset)
    ]
  return "\n".join(lines)
