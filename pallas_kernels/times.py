"""Where the time of a step goes, if a kernel is built to say so.

Each CTA adds up clock cycles by phase and by what they were spent on, over all
layers. A span subtracts the clock when it begins and adds it when it ends; the
sums are right modulo 2^32. A kernel that is not asked has none of this in it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.layouts import I32, Index, Ref
from pallas_kernels.plan import NUM_PHASES, QKV

# What cycles are spent on: by the first compute warpgroup, waiting for results and
# writing them to x; multiplying, waits for chunks included; those waits alone;
# sums, what becomes of them, and sending. By the memory warpgroup, waiting for
# a free slot. And by all, from the first instruction to the last, once in cycles
# and once in nanoseconds. Last, which SM it was.
KINDS = (
  "fill",
  "multiply",
  "ring_empty",
  "finish",
  "ring_full",
  "step",
  "step_ns",
  "sm",
)
SHAPE = (NUM_PHASES, len(KINDS))


@contextlib.contextmanager
def span(
  times: Ref | None, cta: Index, phase: int, kind: str, num_threads: int
) -> Iterator[None]:
  """Counts the cycles of what is traced inside.

  Args:
    times: `[P, phases, kinds]` int32 in device memory, or None.
    cta: whose cycles they are.
    phase: see `plan`.
    kind: one of `KINDS`.
    num_threads: that compute; the first one counts, and the first after them.
  """
  if times is None:
    yield
    return
  index = jnp.asarray(
    (cta * SHAPE[0] + phase) * SHAPE[1] + KINDS.index(kind), I32
  )
  clock = "globaltimer_lo" if kind == "step_ns" else "clock"
  _count(times, index, f"mov.u32 x, %{clock}; neg.s32 x, x;", num_threads)
  yield
  _count(times, index, f"mov.u32 x, %{clock};", num_threads)


def count_sm(times: Ref | None, cta: Index, num_threads: int) -> None:
  """Adds the number of the SM that the CTA runs on."""
  if times is not None:
    index = (cta * SHAPE[0] + QKV) * SHAPE[1] + KINDS.index("sm")
    _count(times, jnp.asarray(index, I32), "mov.u32 x, %smid;", num_threads)


def _count(times: Ref, index: Any, value: str, num_threads: int) -> None:
  """Adds what `value` puts into x."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
  def program(context: Any, times: Any, index: Any) -> None:
    del context
    mosaic.asm(
      f"{{ .reg .pred p; .reg .u32 x; {value} setp.eq.u32 p, $1, 0;"
      " @p red.relaxed.gpu.global.add.u32 [$0], x; }",
      mosaic.Address(times).plus(mosaic.Int(index), 4),
      mosaic.thread_index(num_threads),
    )

  program(times, index)
