"""The picture of a device's results: ms per step, share of the read ceiling.

One group of bars for each model and context, from all files below the folder
that have the schema; the newest figure where there are several of one thing, of
ours the newest that is not from between peers. The dark part of a bar is the time
in which the device reads as many bytes at its ceiling. What others published, or
we measured on another day, has an outline and no ceiling.
"""

import dataclasses
import pathlib
from typing import Any

from bench import harness, published
from bench.svg import WHITE, Drawing

# Full and dark, by who made it.
_COLORS = {
  "ours": ("#9ecae1", "#2171b5"),
  "in the same run": ("#d9d9d9", "#737373"),
  "published": (WHITE, WHITE),
}
_OURS = ("fused", "reference")
_WHOLE_STEPS = ("bench.decode", "bench.xla_peer", "bench.torch_peers")
_LABELS = {
  "fused": "ffjax, fused",
  "reference": "ffjax, reference",
  "xla": "plain JAX, unrolled",
  "transformers": "transformers, compiled",
  "cuda_graph": "PyTorch, CUDA graph",
  "cuda_graph_compiled": "PyTorch, compiled, CUDA graph",
}
_LEFT, _WIDTH, _BAR, _GAP = 240, 420, 15, 6


@dataclasses.dataclass(frozen=True)
class Bar:
  """One bar.

  Attributes:
    label: beside it.
    kind: whose it is, a key of the colours.
    step_ms: its length.
    share: of the ceiling, or None.
    note: behind the figures.
  """

  label: str
  kind: str
  step_ms: float
  share: float | None
  note: str = ""


# Preset and tokens of the prompt.
Group = tuple[str, int]


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Reads all results below a folder that have the schema.

  Returns:
    Oldest first, but all of folders of peers before all others.
  """
  found = []
  for path in sorted(folder.rglob("*.json")):
    result = harness.load(path)
    if result is not None:
      alone = "peers" not in path.relative_to(folder).parts
      found.append((alone, result["date"], result))
  return [result for *_, result in sorted(found, key=lambda x: x[:2])]


def bars(results: list[dict[str, Any]], device: str) -> dict[Group, list[Bar]]:
  """Picks what is comparable: one sequence, greedy, whole steps.

  Args:
    results: in the order in which a later figure replaces an earlier one.
    device: the folder's name, which published figures go by.

  Returns:
    Bars of each group, the shortest first.
  """
  newest: dict[Group, dict[str, dict[str, Any]]] = {}
  for result in results:
    if result["bench"] not in _WHOLE_STEPS or result["flags"].get(
      "temperature"
    ):
      continue
    for m in result["measurements"]:
      if m["unit"] != "ms" or m["details"].get("batch") != 1:
        continue
      group = (result["flags"]["preset"], m["details"]["prompt"])
      # Weights of few bits are another system.
      given = result["flags"]
      stored = stored_as(given.get("format"), given.get("head_format"))
      name, *variant = m["name"].split(":")
      name = ", ".join([name, *stored])
      newest.setdefault(group, {})[":".join([name, *variant])] = m
  drawn = {}
  for group, measurements in sorted(newest.items()):
    fastest: dict[str, dict[str, Any]] = {}
    for name, m in measurements.items():
      # Variants of one thing are told apart behind a colon.
      system = name.split(":")[0]
      best = fastest.get(system)
      if best is None or m["median"] < best["median"]:
        fastest[system] = m
    made = [
      Bar(
        label=_label(system),
        kind="ours"
        if system.partition(", ")[0] in _OURS
        else "in the same run",
        step_ms=m["median"],
        share=m["share_of_ceiling"],
      )
      for system, m in fastest.items()
    ]
    made += _published(device, group, sorted(newest))
    drawn[group] = sorted(made, key=lambda bar: bar.step_ms)
  return drawn


def stored_as(format: str | None, head_format: str | None) -> list[str]:
  """Says what is quantised, for the name of what is timed or compiled."""
  head = head_format and f"{head_format} head"
  return [name for name in (format, head) if name]


def _label(system: str) -> str:
  name, *format = system.split(", ", 1)
  return ", ".join([_LABELS.get(name, name), *format])


def _published(device: str, group: Group, groups: list[Group]) -> list[Bar]:
  """Lists what others say of a group.

  A context that we did not time goes to the model's shortest, and says so.
  """
  preset, prompt = group
  prompts = [length for name, length in groups if name == preset]
  made = []
  for f in published.of(device, preset):
    shown_at = f.context if f.context in prompts else min(prompts)
    if shown_at == prompt:
      other = "" if f.context == prompt else f", context {f.context}"
      made.append(
        Bar(f.system, "published", f.step_ms, None, f"{f.kind}{other}")
      )
  return made


def draw(groups: dict[Group, list[Bar]], device: str) -> Drawing:
  """Draws the groups below each other, each to its own scale."""
  title = f"ms per decode step, batch 1, {device.upper()}"
  picture = Drawing(title)
  picture.text(16, 24, title, size=15, bold=True)
  light, dark = _COLORS["ours"]
  entries = {
    "ours": light,
    "peers": _COLORS["in the same run"][0],
    "dark: reading at the ceiling": dark,
    "not in this run": _COLORS["published"][0],
  }
  picture.legend(16, 44, entries)
  y = 72.0
  for (preset, prompt), made in groups.items():
    picture.text(16, y, f"{preset}, prompt {prompt}", size=13, bold=True)
    y += 10
    scale = _WIDTH / max(bar.step_ms for bar in made)
    for bar in made:
      light, dark = _COLORS[bar.kind]
      length = bar.step_ms * scale
      picture.text(_LEFT - 8, y + 12, bar.label, anchor="end")
      picture.rectangle(_LEFT, y, length, _BAR, light)
      figures = f"{bar.step_ms:.3f} ms"
      if bar.share is not None:
        picture.rectangle(_LEFT, y, length * min(bar.share, 1), _BAR, dark)
        figures += f", {bar.share:.0%}"
      if bar.note:
        figures += f" ({bar.note}, not in this run)"
      picture.text(_LEFT + length + 6, y + 12, figures)
      y += _BAR + _GAP
    y += 24
  return picture
