"""Programs that each thread runs by itself, in PTX.

Pallas has no words for them: a program takes refs whole and scalars that say
where. The object that describes one says where each thread reads and writes, in
arithmetic that holds for numbers and for arrays of them, and `interpreter` runs
what it means.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.geometry import TILE
from pallas_kernels.layouts import F32, I32, SWIZZLED, Index, Ref
from pallas_kernels.plan import WARPS

WARP = 32
THREADS = WARPS * WARP
F32_BYTES = 4
# What a thread stores at once of an operand of `wgmma`: 8 bfloat16.
PIECE_COLUMNS = 8
PIECE_BYTES = 16
# Where several warpgroups meet. Mosaic itself uses the first ones.
_BARRIER_NAME = 8
# An operand's tile is 8 rows of 128 bytes, in which piece c of row r is at
# c xor r.
TILE_ROW_BYTES = 128
TILE_BYTES = 8 * TILE_ROW_BYTES


def swizzled_byte(row: Any, byte: Any) -> Any:
  """Returns where in its row of a tile a byte of an operand of `wgmma` is."""
  return byte ^ (row % 8 * PIECE_BYTES)


def tiled_byte(row: Any, byte: Any) -> Any:
  """Returns where byte `byte` of one of an operand's 8 rows is."""
  within = swizzled_byte(row, byte % TILE_ROW_BYTES)
  tile = byte // TILE_ROW_BYTES
  return tile * TILE_BYTES + row * TILE_ROW_BYTES + within


def turns(
  count: int, num_threads: int = THREADS, *, guarded: bool = False
) -> list[Any]:
  """Returns which of `count` things a thread does, one after the other.

  Args:
    count: how many there are.
    num_threads: how many threads do them.
    guarded: whether the caller sees to numbers that are not below `count`.

  Raises:
    ValueError: there would be such numbers, and nobody sees to them.
  """
  if count % num_threads and not guarded:
    raise ValueError(f"{count} is not a multiple of {num_threads} threads")
  t = mosaic.thread_index(num_threads)
  return [t + i * num_threads for i in range(-(-count // num_threads))]


def f32(value: float) -> str:
  """Returns a float32 in PTX."""
  return f"0f{np.float32(value).view(np.uint32):08X}"


def exchange(target: str, value: str, distance: int, bits: str = "m") -> str:
  """Returns PTX that takes a float32 register of the lane so far away.

  Args:
    target: where it goes.
    value: the register.
    distance: the other lane's number is this one's xor that.
    bits: a register of 32 bits for it on its way.
  """
  return (
    f"mov.b32 {bits}, {value};"
    f" shfl.sync.bfly.b32 {bits}, {bits}, {distance}, 31, 0xFFFFFFFF;"
    f" mov.b32 {target}, {bits};"
  )


# What `warp_sums` uses beside the values.
SUMS_SCRATCH = (
  ".reg .pred upper; .reg .b32 lane, bits; .reg .f32 keep, pass;"
  " mov.u32 lane, %laneid;"
)


def _sums_lanes(count: int) -> int:
  """Returns how many lanes have the same one of so many sums."""
  return WARP >> (count - 1).bit_length()


def sum_of_lane(lane: Any, count: int) -> tuple[Any, Any]:
  """Returns which of so many sums a lane has, and whether it is to store it."""
  lanes = _sums_lanes(count)
  n = lane // lanes
  return n, (lane % lanes < 1) & (n < count)


def warp_sums(values: Sequence[str]) -> str:
  """Returns PTX that sums float32 registers over the warp, each by itself.

  In each of the first steps, lanes hand half of their values on and keep the other
  half, so that about as many go from lane to lane as there are sums, and not five
  times as many. The first register then holds what `sum_of_lane` says.
  """
  num, distance = WARP // _sums_lanes(len(values)), WARP // 2
  names: list[str] = [*values, *[f32(0)] * (num - len(values))]
  code = []
  while num > 1:
    num //= 2
    code.append(f"and.b32 bits, lane, {distance}; setp.ne.u32 upper, bits, 0;")
    for low, high in zip(names[:num], names[num:], strict=True):
      code.append(
        f"selp.f32 pass, {low}, {high}, upper;"
        f" selp.f32 keep, {high}, {low}, upper;"
        f" {exchange('pass', 'pass', distance, 'bits')}"
        f" add.f32 {low}, keep, pass;"
      )
    names, distance = names[:num], distance // 2
  while distance:
    code.append(
      f"{exchange('pass', names[0], distance, 'bits')}"
      f" add.f32 {names[0]}, {names[0]}, pass;"
    )
    distance //= 2
  return " ".join(code)


@dataclasses.dataclass(frozen=True)
class Meet:
  """Nothing but threads that wait for each other.

  Attributes:
    num_threads: how many.
  """

  num_threads: int


@dataclasses.dataclass(frozen=True)
class Fence:
  """Orders writes to shared memory before what the asynchronous proxy reads."""


@dataclasses.dataclass(frozen=True)
class Team:
  """Warpgroups that run programs together: the first ones.

  Attributes:
    num_wgs: how many; one is whichever runs what is traced.
    barrier: what they meet at where programs are not run by threads, in the
      interpreter; each warpgroup arrives once.
  """

  num_wgs: int
  barrier: Ref | None = None

  @property
  def num_threads(self) -> int:
    """Of all of them."""
    return self.num_wgs * THREADS

  def meet(self) -> None:
    """Waits for the others: all see what any has written to shared memory."""
    if self.num_wgs > 1 and self.barrier is not None:
      plgpu.barrier_arrive(self.barrier)
      plgpu.barrier_wait(self.barrier)
    else:
      run(Meet(self.num_threads), _emit_meet, [], [], [])

  def commit(self) -> None:
    """Meets, and what has been written is there for `wgmma` and bulk stores."""
    if self.num_wgs > 1 and self.barrier is None:
      # A commit of Pallas is this and a barrier of each warpgroup by itself.
      run(Fence(), _emit_fence, [], [], [])
    else:
      plgpu.commit_smem()
    if self.num_wgs > 1:
      self.meet()


# A warpgroup by itself.
ALONE = Team(1)


def run(
  what: Any,
  emit: Callable[..., Sequence[Any] | None],
  refs: Sequence[Ref],
  tiled: Sequence[Ref],
  scalars: Sequence[Index],
  *,
  arrays: Sequence[jax.Array] = (),
  num_results: int = 0,
) -> tuple[jax.Array, ...]:
  """Emits a program; who needs what others write has to meet them.

  Args:
    what: describes it.
    emit: emits it, given that, an address for each ref, what the thread holds
      of each array, and the scalars; returns what it holds of each result.
    refs: plain ones.
    tiled: operands of `wgmma`.
    scalars: int32.
    arrays: `[64, n]` float32, results of `wgmma`.
    num_results: how many results there are.

  Returns:
    Its results, `[64, 8]` float32.
  """
  num_refs, num_arrays = len(refs) + len(tiled), len(arrays)
  arg_types = (
    *[plgpu.RefType()] * len(refs),
    *[plgpu.RefType(SWIZZLED)] * len(tiled),
    *[plgpu.Layout.WGMMA] * num_arrays,
    *[plgpu.Layout.WG_SPLAT] * len(scalars),
  )
  result = plgpu.ShapeDtypeStruct((TILE, 8), F32, layout=plgpu.Layout.WGMMA)

  def program(context: Any, *args: Any) -> list[Any]:
    del context
    results = emit(
      what,
      *(mosaic.Address(x) for x in args[:num_refs]),
      *(mosaic.registers(x) for x in args[num_refs:][:num_arrays]),
      *(mosaic.Int(x) for x in args[num_refs + num_arrays :]),
    )
    return [mosaic.wgmma_array(x) for x in results or ()]

  program.what = what  # type: ignore[attr-defined]
  call = plgpu.inline_mgpu(
    arg_types=arg_types, return_type=[result] * num_results
  )(program)
  numbers = (jnp.asarray(x, I32) for x in scalars)
  return tuple(call(*refs, *tiled, *arrays, *numbers) or ())


def _emit_fence(what: Fence) -> None:
  del what
  mosaic.asm("fence.proxy.async.shared::cta;")


def _emit_meet(what: Meet) -> None:
  if what.num_threads == THREADS:
    mosaic.warpgroup_barrier()
  else:
    mosaic.named_barrier(_BARRIER_NAME, what.num_threads)
