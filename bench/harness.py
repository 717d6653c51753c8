"""Measures, checks and writes: the one schema of `bench/results/`.

A file is a `Result`: what was run where, and measurements. A measurement holds
all of its samples and the outcome of a check made in the same process; one
whose check failed cannot be written.
"""

import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from bench import environment

# Files of other kinds have no such key.
SCHEMA = 1

T = TypeVar("T")


class CheckFailedError(RuntimeError):
  """What was measured computes something else."""


@dataclasses.dataclass(frozen=True)
class Check:
  """How far a result is from one that is known to be right.

  Attributes:
    against: what it was compared with.
    metrics: the figures.
    limits: the most that each of them may be; there is at least one.
  """

  against: str
  metrics: Mapping[str, float]
  limits: Mapping[str, float]

  @property
  def passed(self) -> bool:
    """Whether all figures are finite and within their limits."""
    return (
      bool(self.limits)
      and all(math.isfinite(x) for x in self.metrics.values())
      and all(self.metrics[name] <= x for name, x in self.limits.items())
    )

  def counting(self, what: str, count: int, *, limited: bool = True) -> "Check":
    """Returns this check and how many of something there were.

    Args:
      what: the figure's name.
      count: how many.
      limited: whether there may be none.
    """
    limits = {what: 0.0} if limited else {}
    return dataclasses.replace(
      self,
      metrics={**self.metrics, what: float(count)},
      limits={**self.limits, **limits},
    )

  def require(self, name: str) -> None:
    """Raises if it failed.

    Args:
      name: what was checked.

    Raises:
      CheckFailedError: with the figures and their limits.
    """
    if not self.passed:
      raise CheckFailedError(
        f"{name} differs from {self.against}: {dict(self.metrics)}, allowed is"
        f" {dict(self.limits)}; nothing is written"
      )

  def to_json(self) -> dict[str, Any]:
    """Returns it with its outcome."""
    return dict(
      against=self.against,
      metrics=dict(self.metrics),
      limits=dict(self.limits),
      passed=self.passed,
    )


@dataclasses.dataclass(frozen=True)
class Samples(Generic[T]):
  """What interleaved calls returned.

  Attributes:
    first: the first call of each candidate, compilation included.
    warm_ups: calls of each that are not among the timed ones.
    timed: the others, in order.
    clocks: of the GPU, before and after the timed calls.
  """

  first: dict[str, T]
  warm_ups: int
  timed: dict[str, list[T]]
  clocks: dict[str, Any]


def interleave(
  candidates: Mapping[str, Callable[[], T]], warm_ups: int, repeats: int
) -> Samples[T]:
  """Calls candidates in turn, A B A B, so that drift meets all of them.

  Args:
    candidates: each returns what it measured.
    warm_ups: rounds before those that count, at least one.
    repeats: rounds that count.
  """
  if warm_ups < 1 or repeats < 1:
    raise ValueError(
      f"warm_ups={warm_ups} and repeats={repeats} are at least 1"
    )
  first = {name: call() for name, call in candidates.items()}
  for _ in range(warm_ups - 1):
    for call in candidates.values():
      call()
  before = environment.clocks()
  timed: dict[str, list[T]] = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, call in candidates.items():
      timed[name].append(call())
  return Samples(
    first=first,
    warm_ups=warm_ups,
    timed=timed,
    clocks=dict(before=before, after=environment.clocks()),
  )


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One figure.

  Attributes:
    name: what was measured.
    unit: of the samples: "ms" per step, or "GB/s".
    samples: all of them, in order.
    warm_ups: calls before them.
    check: of what was measured.
    clocks: of the GPU, before and after, see `interleave`.
    bytes_per_step: that a step must move, or None.
    ceiling_gbps: the rate that the device reached in this process, or None.
    details: what else says what it was: model, batch, context.
  """

  name: str
  unit: str
  samples: Sequence[float]
  warm_ups: int
  check: Check
  clocks: Mapping[str, Any]
  bytes_per_step: int | None = None
  ceiling_gbps: float | None = None
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def median(self) -> float:
    """Median of the samples."""
    return float(np.median(self.samples))

  def to_json(self) -> dict[str, Any]:
    """Returns it with what follows from its samples.

    Raises:
      CheckFailedError: if its check failed.
    """
    self.check.require(self.name)
    low, high = np.quantile(self.samples, [0.25, 0.75])
    gbps = None
    if self.unit == "ms" and self.bytes_per_step is not None:
      gbps = self.bytes_per_step / self.median / 1e6
    elif self.unit == "GB/s":
      gbps = self.median
    share = gbps and self.ceiling_gbps and gbps / self.ceiling_gbps
    return dict(
      name=self.name,
      unit=self.unit,
      median=self.median,
      min=float(min(self.samples)),
      max=float(max(self.samples)),
      interquartile=float(high - low),
      warm_ups=self.warm_ups,
      samples=[float(x) for x in self.samples],
      bytes_per_step=self.bytes_per_step,
      gbps=gbps,
      ceiling_gbps=self.ceiling_gbps,
      share_of_ceiling=share,
      clocks=dict(self.clocks),
      check=self.check.to_json(),
      details=dict(self.details),
    )


def step_measurements(
  step_ms: Mapping[str, Sequence[float]],
  samples: Samples[Any],
  check: Check,
  bytes_per_step: int,
  ceiling_gbps: float | None,
  details: Mapping[str, Any],
) -> list[Measurement]:
  """Returns the measurements of steps of one kind.

  Args:
    step_ms: milliseconds per step of each candidate.
    samples: the calls that they are from.
    check: of all of them.
    bytes_per_step: see `Measurement`.
    ceiling_gbps: likewise.
    details: likewise.
  """
  return [
    Measurement(
      name=name,
      unit="ms",
      samples=timed_ms,
      warm_ups=samples.warm_ups,
      check=check,
      clocks=samples.clocks,
      bytes_per_step=bytes_per_step,
      ceiling_gbps=ceiling_gbps,
      details=details,
    )
    for name, timed_ms in step_ms.items()
  ]


@dataclasses.dataclass(frozen=True)
class Result:
  """All that one process found out.

  Attributes:
    bench: the module that ran, for example "bench.decode".
    flags: its flags.
    device: kind, platform and number of SMs.
    commit: see `environment.commit`.
    data: distribution and seed of weights and prompt.
    measurements: the figures.
    ceilings: what the device can do at most, see `ceilings.measure`.
  """

  bench: str
  flags: Mapping[str, Any]
  device: Mapping[str, Any]
  commit: Mapping[str, Any]
  data: Mapping[str, Any]
  measurements: Sequence[Measurement]
  ceilings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    """Returns the object that is written.

    Raises:
      CheckFailedError: if a measurement's check failed.
    """
    now = datetime.datetime.now(datetime.UTC)
    return dict(
      schema=SCHEMA,
      bench=self.bench,
      date=now.isoformat(timespec="seconds"),
      commit=dict(self.commit),
      device=dict(self.device),
      versions=environment.versions(),
      flags=dict(self.flags),
      data=dict(self.data),
      ceilings=dict(self.ceilings),
      measurements=[m.to_json() for m in self.measurements],
    )

  def report(self, output: str | None) -> dict[str, Any]:
    """Prints a table and writes the file.

    Args:
      output: path of the JSON file, or None for none.

    Returns:
      The object that was written.

    Raises:
      CheckFailedError: if a measurement's check failed; nothing is written.
    """
    made = self.write(output)
    print(table(made["measurements"]))
    return made

  def write(self, output: str | None) -> dict[str, Any]:
    """Does what `report` does, without the table."""
    made = self.to_json()
    if output is not None:
      path = pathlib.Path(output)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(made, indent=1) + "\n", encoding="ascii")
    return made


def table(measurements: Sequence[Mapping[str, Any]]) -> str:
  """Formats measurements, as they are in a file, in Markdown."""
  lines = [
    "| what | median | min | interquartile | GB/s | of the ceiling | check |",
    "|---|---|---|---|---|---|---|",
  ]
  for m in measurements:
    gbps = "" if m["gbps"] is None else f"{m['gbps']:.0f}"
    share = m["share_of_ceiling"]
    # Of what was allowed, that of which most was used.
    metrics, limits = m["check"]["metrics"], m["check"]["limits"]
    name, limit = max(
      limits.items(), key=lambda x: metrics[x[0]] / x[1] if x[1] else 0
    )
    worst = f"{name} {metrics[name]:.3g} (at most {limit:.3g})"
    if len(limits) > 1:
      worst += f", {len(limits) - 1} more"
    what = m["name"]
    if m["details"].get("batch", 1) != 1:
      what += f", batch {m['details']['batch']}"
    if "prompt" in m["details"]:
      what += f", prompt {m['details']['prompt']}"
    lines.append(
      f"| {what} | {m['median']:.4f} {m['unit']} | {m['min']:.4f}"
      f" | {m['interquartile']:.4f} | {gbps}"
      f" | {'' if share is None else f'{share:.1%}'} | {worst} |"
    )
  return "\n".join(lines)


def load(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a result; None for a file without the schema."""
  read = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(read, dict) or read.get("schema") != SCHEMA:
    return None
  return read
