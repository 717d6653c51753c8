"""How much memory a device has left, so that a request can be refused early."""

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
