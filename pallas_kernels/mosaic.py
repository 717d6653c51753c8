"""Everything private or unstable in JAX that the kernel leans on.

Written against JAX 0.11.2. The rest of the package uses `jax`, `pl` and `plgpu`
by their public names.
"""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

MIN_JAX = (0, 11)


def missing() -> str | None:
  """Says what this JAX lacks to build the kernel, or None."""
  version = jax.__version_info__
  if version < MIN_JAX:
    wanted = ".".join(map(str, MIN_JAX))
    return f"it needs JAX {wanted} or later, and this is {jax.__version__}"
  return None


def keep_plain(*refs: jax.Array) -> None:
  """Tells layout inference that these shared-memory refs are not tiled.

  It would otherwise try tilings for each of them, and the product of those
  choices exhausts its search.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
  def use(context, *refs):  # type: ignore[no-untyped-def]
    del context, refs

  use(*refs)


def store(ref: Any, value: jax.Array) -> None:
  """Stores to a shared-memory ref that is not tiled, bank conflicts or not.

  From JAX 0.12 on, an assignment refuses to conflict.
  """
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value
