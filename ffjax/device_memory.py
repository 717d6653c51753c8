"""How much memory a device has left, so that a request can be refused early."""

from typing import Any

import jax
import jax.numpy as jnp

from ffjax.errors import RequestError


def require(num_bytes: int, what: str) -> None:
  """Raises if the default device cannot hold `num_bytes` more.

  Args:
    num_bytes: bytes about to be allocated.
    what: what they are for, as the subject of the message.

  Raises:
    RequestError: with both sizes.
  """
  device = default_device()
  free = free_bytes(device)
  if free is not None and num_bytes > free:
    raise RequestError(
      f"{what} takes {num_bytes / 2**30:.2f} GiB, but {device} has"
      f" {free / 2**30:.2f} GiB free"
    )


def zeros(shapes: Any, what: str) -> Any:
  """Makes arrays of zeros on the default device, and waits for them.

  Args:
    shapes: a pytree of their shapes and dtypes.
    what: what they are for, as the subject of the message.

  Raises:
    RequestError: if no free piece of memory is as large as one of them, which
      may be so though `require` found that there is enough.
  """
  try:
    return jax.block_until_ready(
      jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    )
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    leaves = jax.tree.leaves(shapes)
    largest = max(x.size * x.dtype.itemsize for x in leaves)
    device = default_device()
    free = free_bytes(device)
    left = "enough" if free is None else f"{free / 2**30:.2f} GiB"
    raise RequestError(
      f"{what} takes an array of {largest / 2**30:.2f} GiB: {device} has {left}"
      " free, but in smaller pieces. JAX takes a GPU's memory as one piece,"
      " unless XLA_PYTHON_CLIENT_PREALLOCATE=false"
    ) from e


def join_pieces() -> None:
  """Makes what a GPU's allocator has not taken yet one piece of free memory.

  JAX takes most of a GPU's memory at its start, or, where
  XLA_PYTHON_CLIENT_PREALLOCATE=false, piece by piece as it is needed. It keeps
  the pieces, and no array can lie in two of them: half of the memory may be free
  and a quarter of it not to be had. To be called before anything large is made,
  by a program that has the device for itself.
  """
  stats = default_device().memory_stats() or {}
  if not {"bytes_limit", "pool_bytes"} <= stats.keys():
    return  # The CPU, or another allocator.
  mebibytes = (stats["bytes_limit"] - stats["pool_bytes"]) >> 20
  if mebibytes <= 0:
    return
  try:
    taken = jax.block_until_ready(jnp.zeros((mebibytes, 1 << 20), jnp.uint8))
  except jax.errors.JaxRuntimeError:
    return  # Others have a part of it. All goes on as without.
  taken.delete()


def default_device() -> jax.Device:
  """Returns the device that arrays are made on; under a trace too."""
  with jax.ensure_compile_time_eval():
    (device,) = jnp.zeros(()).devices()
  return device


def free_bytes(device: jax.Device) -> int | None:
  """Returns the bytes that can still be allocated, or None if unknown.

  For an accelerator, what its allocator has not handed out; for the CPU, what
  Linux calls available.
  """
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  if device.platform != "cpu":
    return None
  try:
    with open("/proc/meminfo", encoding="ascii") as meminfo:
      for line in meminfo:
        if line.startswith("MemAvailable:"):
          return int(line.split()[1]) * 1024
  except OSError:
    pass  # Not Linux: the allocation itself has to tell.
  return None
