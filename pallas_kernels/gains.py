"""A norm's weights and sum of squares, on the way of activations to x.

PTX for programs of `threads`. A thread has 8 bfloat16 in four registers `wN_0` to
`wN_3`, and the weights of their columns in `gM_0` to `gM_7`.
"""

from typing import Any

from pallas_kernels import mosaic, threads
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.threads import F32_BYTES, WARP

# `[norms, 8, columns]` float32 in device memory and which of them; the warps'
# sums of squares of each sequence, float32 in shared memory, and where the first
# sequence's begin.
Gain = tuple[Ref, Index, Ref, Index]

# What the other pieces of PTX use.
SCRATCH = ".reg .pred e; .reg .b32 m; .reg .f32 lo, hi;"


def load_gain(n: int, operand: int) -> str:
  """Returns PTX that loads `g{n}_*` from where an operand says."""
  return (
    f".reg .f32 {', '.join(f'g{n}_{j}' for j in range(8))};"
    f" ld.global.nc.v4.f32 {{g{n}_0, g{n}_1, g{n}_2, g{n}_3}}, [${operand}];"
    f" ld.global.nc.v4.f32 {{g{n}_4, g{n}_5, g{n}_6, g{n}_7}},"
    f" [${operand} + 16];"
  )


def apply_gain(n: int, gain: int, sequence: int) -> str:
  """Returns PTX that sums up squares of `w{n}_*`, and multiplies it."""
  return " ".join(
    f"shl.b32 m, w{n}_{j}, 16; mov.b32 lo, m;"
    f" and.b32 m, w{n}_{j}, 0xFFFF0000; mov.b32 hi, m;"
    f" fma.rn.f32 ss{sequence}, lo, lo, ss{sequence};"
    f" fma.rn.f32 ss{sequence}, hi, hi, ss{sequence};"
    f" mul.f32 lo, lo, g{gain}_{2 * j}; mul.f32 hi, hi, g{gain}_{2 * j + 1};"
    f" cvt.rn.bf16x2.f32 w{n}_{j}, hi, lo;"
    for j in range(4)
  )


def begin_squares(count: int) -> str:
  """Returns PTX that declares so many sums of squares, from `ss0` on."""
  return " ".join(
    f".reg .f32 ss{k}; mov.f32 ss{k}, {threads.f32(0)};" for k in range(count)
  )


def store_squares(count: int, operand: int) -> str:
  """Returns PTX that sums `ss0` and those after it over the warp, and stores them.

  Args:
    count: how many sums.
    operand: where a lane's is to go, and whether it goes there; see `squares_of`.
  """
  sums = threads.warp_sums([f"ss{k}" for k in range(count)])
  return (
    f"{threads.SUMS_SCRATCH} {sums} setp.ne.b32 e, ${operand + 1}, 0;"
    f" @e st.shared.f32 [${operand}], ss0;"
  )


def squares_of(
  squares: Any, square: Any, count: int, num_threads: int
) -> tuple[Any, Any]:
  """Returns where a lane's sum of squares goes, and whether it has one.

  Args:
    squares: float32 in shared memory, by sequence and warp.
    square: where the first sequence's begin.
    count: how many sequences.
    num_threads: of all warps.
  """
  t = mosaic.thread_index(num_threads)
  warp, lane = t // WARP, t % WARP
  sequence, there = threads.sum_of_lane(lane, count)
  index = square + warp + sequence * (num_threads // WARP)
  return squares.plus(index, F32_BYTES), there
