"""Programs that each thread of a warpgroup runs by itself, in PTX.

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


def turns(count: int) -> list[Any]:
  """Returns which of `count` things a thread does, one after the other."""
  t = mosaic.thread_index()
  return [t + i * THREADS for i in range(-(-count // THREADS))]


def run(
  what: Any,
  emit: Callable[..., Sequence[Any] | None],
  refs: Sequence[Ref],
  tiled: Sequence[Ref],
  scalars: Sequence[Index],
  *,
  arrays: Sequence[jax.Array] = (),
  num_results: int = 0,
  meets_before: bool = True,
  meets_after: bool = True,
) -> tuple[jax.Array, ...]:
  """Emits a program.

  Args:
    what: describes it.
    emit: emits it, given that, an address for each ref, what the thread holds
      of each array, and the scalars; returns what it holds of each result.
    refs: plain ones.
    tiled: operands of `wgmma`.
    scalars: int32.
    arrays: `[64, n]` float32, results of `wgmma`.
    num_results: how many results there are.
    meets_before: whether all threads are there first: what others have written
      to shared memory then is, too.
    meets_after: whether they are at the end: what is written to shared memory
      here then is there, and all have read their words.

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
    if meets_before:
      mosaic.warpgroup_barrier()
    results = emit(
      what,
      *(mosaic.Address(x) for x in args[:num_refs]),
      *(mosaic.registers(x) for x in args[num_refs:][:num_arrays]),
      *(mosaic.Int(x) for x in args[num_refs + num_arrays :]),
    )
    if meets_after:
      mosaic.warpgroup_barrier()
    return [mosaic.wgmma_array(x) for x in results or ()]

  program.what = what  # type: ignore[attr-defined]
  call = plgpu.inline_mgpu(
    arg_types=arg_types, return_type=[result] * num_results
  )(program)
  numbers = (jnp.asarray(x, I32) for x in scalars)
  return tuple(call(*refs, *tiled, *arrays, *numbers) or ())


@dataclasses.dataclass(frozen=True)
class Meet:
  """Nothing but threads that wait for each other."""


def meet() -> None:
  """Lets the warpgroup's threads see each other's writes to shared memory."""
  run(Meet(), lambda what: None, [], [], [], meets_after=False)
