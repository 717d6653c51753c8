"""Programs that each thread of a warpgroup runs by itself, in PTX.

Pallas has no words for them: a program takes refs whole and scalars that say
where. The object that describes one says where each thread reads and writes, in
arithmetic that holds for numbers and for arrays of them, and `interpreter` runs
what it means.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.layouts import I32, SWIZZLED, Index, Ref
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


def scalars(*values: Index) -> list[jax.Array]:
  """Returns what a program takes as scalars."""
  return [jnp.asarray(x, I32) for x in values]


def run(
  what: Any,
  emit: Callable[..., None],
  refs: Sequence[Ref],
  tiled: Sequence[Ref],
  numbers: Sequence[jax.Array],
) -> None:
  """Emits a program.

  Args:
    what: describes it.
    emit: emits it, given that, an address for each ref and the scalars.
    refs: plain ones.
    tiled: operands of `wgmma`.
    numbers: int32 scalars.
  """
  arg_types = (
    *[plgpu.RefType()] * len(refs),
    *[plgpu.RefType(SWIZZLED)] * len(tiled),
    *[plgpu.Layout.WG_SPLAT] * len(numbers),
  )

  def program(context: Any, *args: Any) -> None:
    del context
    num_refs = len(refs) + len(tiled)
    # What other threads have written to shared memory is there, and what is
    # written here will be.
    mosaic.warpgroup_barrier()
    emit(
      what,
      *(mosaic.Address(x) for x in args[:num_refs]),
      *(mosaic.Int(x) for x in args[num_refs:]),
    )
    mosaic.warpgroup_barrier()

  program.what = what  # type: ignore[attr-defined]
  plgpu.inline_mgpu(arg_types=arg_types)(program)(*refs, *tiled, *numbers)
