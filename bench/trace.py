"""Reads what the profiler saw the device do: launches, and gaps between them."""

import dataclasses
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Event:
  """One kernel or copy on the device.

  Attributes:
    name: the profiler's.
    begin_us: when it began.
    duration_us: how long it took.
  """

  name: str
  begin_us: float
  duration_us: float


def events_of(trace: dict[str, Any]) -> list[Event]:
  """Lists what ran on the streams of a GPU, in order of their beginning.

  Args:
    trace: in the trace event format, as the profiler writes it. Beside streams
      it has lines that the profiler derives from them; those do not count.
  """
  processes, threads = {}, {}
  for e in trace["traceEvents"]:
    if e.get("ph") == "M" and e.get("name") == "process_name":
      processes[e["pid"]] = e["args"]["name"]
    elif e.get("ph") == "M" and e.get("name") == "thread_name":
      threads[e["pid"], e["tid"]] = e["args"]["name"]
  found = [
    Event(e["name"], float(e["ts"]), float(e.get("dur", 0)))
    for e in trace["traceEvents"]
    if e.get("ph") == "X"
    and "GPU" in processes.get(e["pid"], "")
    and threads.get((e["pid"], e["tid"]), "").startswith("Stream")
  ]
  return sorted(found, key=lambda event: event.begin_us)


def record(run: Callable[[], Any]) -> list[Event]:
  """Runs under the profiler; returns no events where it sees none."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
      jax.block_until_ready(run())
    paths = sorted(pathlib.Path(folder).rglob("perfetto_trace.json.gz"))
    if not paths:
      return []
    with gzip.open(paths[-1], "rt", encoding="utf-8") as file:
      return events_of(json.load(file))


@dataclasses.dataclass(frozen=True)
class Launches:
  """What a step launches.

  Attributes:
    per_step: kernels and copies.
    longest: the name of the kernel that takes most of the time.
    longest_us: median of its durations.
    gap_us: median time from its end to its next beginning.
    mean_gap_us: mean over the steps by which the loop is longer, with the host's
      looks at it: as many as those steps have.
    us_per_step: time on the device by name.
  """

  per_step: float
  longest: str
  longest_us: float
  gap_us: float
  mean_gap_us: float
  us_per_step: dict[str, float]


def launches(
  few: list[Event], many: list[Event], num_steps: int
) -> Launches | None:
  """Compares two loops, so that what surrounds a loop does not count.

  Args:
    few: events of a loop.
    many: events of one that is longer by `num_steps`.
    num_steps: by how much.

  Returns:
    What one step adds; None if the profiler saw nothing of the device.
  """
  if not few or len(many) <= len(few):
    return None

  def totals(events: list[Event]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for e in events:
      sums[e.name] = sums.get(e.name, 0.0) + e.duration_us
    return sums

  before, after = totals(few), totals(many)
  longest = max(after, key=lambda name: after[name])
  own = [e for e in many if e.name == longest]
  gaps = _gaps_us(own)
  gaps_before = _gaps_us([e for e in few if e.name == longest])
  return Launches(
    per_step=(len(many) - len(few)) / num_steps,
    longest=longest,
    longest_us=float(np.median([e.duration_us for e in own])),
    gap_us=float(np.median(gaps or 0)),
    mean_gap_us=(sum(gaps) - sum(gaps_before)) / num_steps,
    us_per_step={
      name: (total - before.get(name, 0.0)) / num_steps
      for name, total in after.items()
    },
  )


def _gaps_us(events: list[Event]) -> list[float]:
  """Lists the times from the end of each to the beginning of the next."""
  return [
    later.begin_us - earlier.begin_us - earlier.duration_us
    for earlier, later in zip(events, events[1:], strict=False)
  ]
