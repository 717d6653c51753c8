"""Types, a layout and loops that all parts of the kernel use."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32

# A Python integer or a traced int32 scalar.
Index = Any
# A `jax.Ref` in device or shared memory, or a view of one.
Ref = Any

# How `wgmma` wants its operands in shared memory.
SWIZZLED = (
  plgpu.TilingTransform((8, 64)),  # type: ignore[abstract]
  plgpu.SwizzleTransform(128),  # type: ignore[abstract]
)


def fori(lower: Index, upper: Index, body: Callable[[Index], None]) -> None:
  """Loops without a carry."""

  def step(i: jax.Array, _: None) -> None:
    body(i)

  lax.fori_loop(lower, upper, step, None)
