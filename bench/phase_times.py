"""What the kernel's counters say: a table and a picture of one step."""

import dataclasses

import numpy as np

from bench.svg import Drawing
from pallas_kernels import times

PHASES = ("qkv", "attention", "o", "gate_up", "down", "lm_head")
# What is said of every phase and CTA, and its colour. `times.KINDS` counts
# waits for chunks within multiplying; here they are apart.
SPENT = {
  "waiting for CTAs": "#fdae6b",
  "computing": "#2171b5",
  "ring empty": "#9ecae1",
  "finishing": "#74c476",
  "ring full": "#bdbdbd",
}
_COMPUTE = ("waiting for CTAs", "computing", "ring empty", "finishing")


@dataclasses.dataclass(frozen=True)
class Spread:
  """Of something over CTAs, in microseconds."""

  min: float
  mean: float
  max: float


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Where the time of a step went, all layers of a phase together.

  Attributes:
    step_us: from the first instruction of a CTA to its last, the longest.
    cycles_per_us: of the SMs.
    phases: by phase and what it was spent on, over the CTAs that have a part in
      it and in the layers: others wait for the LM head all the time.
    num_ctas: by phase, how many these are.
    all_phases: by what it was spent on, over the CTAs that have a part in the
      layers.
    ctas: by what it was spent on, microseconds of each CTA, all phases.
    sms: the SM of each CTA.
    reading: share of the step in which rings are not full, so that memory is
      busy; the mean over the CTAs that have a part in the layers.
  """

  step_us: float
  cycles_per_us: float
  phases: dict[str, dict[str, Spread]]
  num_ctas: dict[str, int]
  all_phases: dict[str, Spread]
  ctas: dict[str, list[float]]
  sms: list[int]
  reading: float


def _column(counted: np.ndarray, kind: str) -> np.ndarray:
  return counted[:, :, times.KINDS.index(kind)]


def timeline(counted: np.ndarray) -> Timeline:
  """Reads counters.

  Args:
    counted: `[P, phases, kinds]`, cycles of a step, and nanoseconds where
      `times.KINDS` says so.
  """
  cycles = _column(counted, "step").sum(1)
  step_ns = _column(counted, "step_ns").sum(1)
  cycles_per_us = float((1e3 * cycles / step_ns).mean())
  empty = _column(counted, "ring_empty")
  spent = {
    "waiting for CTAs": _column(counted, "fill"),
    "computing": _column(counted, "multiply") - empty,
    "ring empty": empty,
    "finishing": _column(counted, "finish"),
    "ring full": _column(counted, "ring_full"),
  }
  spent = {what: x / cycles_per_us for what, x in spent.items()}
  has_part = _column(counted, "multiply") > 0
  in_layers = has_part[:, : PHASES.index("lm_head")].any(1)
  phases, num_ctas = {}, {}
  for p, phase in enumerate(PHASES):
    took_part = has_part[:, p] & in_layers
    if not took_part.any():
      continue
    num_ctas[phase] = int(took_part.sum())
    phases[phase] = {
      what: _spread(x[took_part, p]) for what, x in spent.items()
    }
  full_us = spent["ring full"].sum(1)
  return Timeline(
    step_us=float(step_ns.max() / 1e3),
    cycles_per_us=cycles_per_us,
    phases=phases,
    num_ctas=num_ctas,
    all_phases={
      what: _spread(x[in_layers].sum(1)) for what, x in spent.items()
    },
    ctas={what: x.sum(1).round(2).tolist() for what, x in spent.items()},
    sms=_column(counted, "sm").sum(1).round().astype(int).tolist(),
    reading=float(1 - (1e3 * full_us / step_ns)[in_layers].mean()),
  )


def _spread(x: np.ndarray) -> Spread:
  return Spread(*(round(float(y), 2) for y in (x.min(), x.mean(), x.max())))


def table(found: Timeline) -> str:
  """Formats the phases in Markdown: mean (min to max over CTAs), in us."""
  lines = [
    "| phase | " + " | ".join(SPENT) + " | CTAs |",
    "|" + "---|" * (len(SPENT) + 2),
  ]
  rows = {
    **{x: (s, found.num_ctas[x]) for x, s in found.phases.items()},
    "all": (found.all_phases, max(found.num_ctas.values())),
  }
  for phase, (spent, num_ctas) in rows.items():
    cells = [
      f"{s.mean:.1f} ({s.min:.1f} to {s.max:.1f})" for s in spent.values()
    ]
    lines.append(f"| {phase} | " + " | ".join(cells) + f" | {num_ctas} |")
  return "\n".join(lines)


_LEFT, _WIDTH, _BAR = 110, 640, 18


def draw(found: Timeline, title: str) -> Drawing:
  """Draws phases as bars, and below them CTAs side by side."""
  picture = Drawing(title)
  picture.text(16, 24, title, size=15, bold=True)
  picture.legend(16, 46, SPENT)
  totals = {
    phase: sum(spent[what].mean for what in _COMPUTE)
    for phase, spent in found.phases.items()
  }
  longest = max(
    sum(spent[what].max for what in _COMPUTE) for spent in found.phases.values()
  )
  scale = _WIDTH / longest
  picture.text(
    16,
    74,
    "Per phase, microseconds of a step over all layers, mean over CTAs; line:"
    " from the least to the most of waiting, and of the ring full",
    size=11,
  )
  y = 84.0
  for phase, spent in found.phases.items():
    picture.text(_LEFT - 8, y + 13, phase, anchor="end")
    x = float(_LEFT)
    for what in _COMPUTE:
      width = spent[what].mean * scale
      picture.rectangle(x, y, width, _BAR, SPENT[what])
      x += width
    waited = spent["waiting for CTAs"]
    middle = y + _BAR / 2
    picture.line(
      _LEFT + waited.min * scale, middle, _LEFT + waited.max * scale, middle
    )
    # Beside the bar and the line, whichever is longer.
    end = max(x, _LEFT + waited.max * scale)
    picture.text(end + 6, y + 13, f"{totals[phase]:.1f}")
    full = spent["ring full"]
    width = full.mean * scale
    y += _BAR
    picture.rectangle(_LEFT, y, width, 5, SPENT["ring full"])
    picture.line(
      _LEFT + full.min * scale, y + 2.5, _LEFT + full.max * scale, y + 2.5
    )
    y += 14
  y += 24
  _draw_ctas(picture, found, y)
  return picture


def _draw_ctas(picture: Drawing, found: Timeline, y: float) -> None:
  """Draws a column for each CTA, by SM, as high as its step is long."""
  height = 160
  picture.text(
    16,
    y,
    f"Per CTA, by the number of its SM; the step takes {found.step_us:.1f} us,"
    f" and rings are not full in {found.reading:.0%} of it",
    size=11,
  )
  y += 10
  totals = np.sum([found.ctas[what] for what in _COMPUTE], axis=0)
  top = max(float(totals.max()), found.step_us)
  width = _WIDTH / len(totals)
  for column, cta in enumerate(np.argsort(found.sms, kind="stable")):
    base = y + height
    for what in _COMPUTE:
      tall = found.ctas[what][cta] / top * height
      base -= tall
      x = _LEFT + column * width
      picture.rectangle(x, base, 0.9 * width, tall, SPENT[what])
  for label, at in ((f"{top:.0f} us", y), ("0", y + height)):
    picture.line(_LEFT - 4, at, _LEFT, at)
    picture.text(_LEFT - 8, at + 4, label, anchor="end", size=11)
