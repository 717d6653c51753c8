"""What is chosen by measuring, by device and model.

`python -m bench.tune` measures what the table should hold. What it found is in
`bench/results/*/tune`, and what was made of that in `bench/LOG.md`.
"""

from typing import TypeVar

_T = TypeVar("_T")

# Chunks of 16 KB that a CTA asks memory for at a time: with too few, memory
# idles; with too many, all that comes later waits behind them, the results that
# CTAs exchange too. Of each device, by the width D from which on it holds.
_IN_FLIGHT = {
  "NVIDIA H100 80GB HBM3": {1: 2, 4096: 3},
  # The same, by measuring, although its memory is faster.
  "NVIDIA H200": {1: 2, 4096: 3},
}
# Likewise of the LM head: nobody waits for words then. An H100's memory is busy with
# 3 to 4; on an H200 1 to 8 are alike.
_HEAD_IN_FLIGHT = {"NVIDIA H100 80GB HBM3": 4, "NVIDIA H200": 4}
# Where a second warpgroup computes: D, padded to whole chunks, whether weights
# are of few bits, and B. It is worth it where computing, or receiving activations,
# is what memory waits for; else its meetings only cost, as at D = 4,096. Only what
# has been measured and checked is here.
_TWO_COMPUTE_WGS = {
  "NVIDIA H100 80GB HBM3": {(2048, True, 1), (2048, False, 8)},
  # Not at batch 1 in bfloat16, by measuring; the others are an H100's.
  "NVIDIA H200": {(2048, True, 1), (2048, False, 8)},
}
# For a device that nobody has measured.
_DEFAULT = "NVIDIA H100 80GB HBM3"

# The rest is the same for all of them. Slots of the ring are as many as shared
# memory leaves, which on Hopper is never more than this.
MOST_SLOTS = 16
# Activations that do not fit in this come in blocks; what they do not take is slots.
X_BYTES = 32768
# Tiles of 64 keys that are attended to in one round, if the ring holds as many.
TILES_AT_ONCE = 4


def _of(table: dict[str, _T], device_kind: str | None) -> _T:
  return table.get(device_kind or "", table[_DEFAULT])


def in_flight(device_kind: str | None, hidden_size: int) -> int:
  """Returns how many chunks a CTA asks for at a time.

  Args:
    device_kind: as JAX names it; None if unknown.
    hidden_size: D.
  """
  by_width = _of(_IN_FLIGHT, device_kind)
  return by_width[max(width for width in by_width if width <= hidden_size)]


def head_in_flight(device_kind: str | None) -> int:
  """Returns how many chunks of the LM head a CTA asks for at a time.

  Args:
    device_kind: as JAX names it; None if unknown.
  """
  return _of(_HEAD_IN_FLIGHT, device_kind)


def compute_wgs(
  device_kind: str | None, bits: int, padded_hidden_size: int, batch: int
) -> int:
  """Returns how many warpgroups of a CTA compute.

  Args:
    device_kind: as JAX names it; None if unknown.
    bits: of a weight of the layers.
    padded_hidden_size: D, padded to whole chunks.
    batch: B.
  """
  two = _of(_TWO_COMPUTE_WGS, device_kind)
  return 2 if (padded_hidden_size, bits < 16, batch) in two else 1
