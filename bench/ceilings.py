"""Measures how fast the device reads and copies: what no step can pass.

The read ceiling is the best of several reductions over a large array, and the
copy ceiling the best of two copies, read and written bytes counted. Passes over
the array are one device loop where possible, so that launches do not count.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bench import harness

# Of the array as rows, as a matrix product reads its weights.
_COLUMNS = 4096
_PASSES = 20
DATA = "random bits, seed 0; normal, seed 0, where they are bfloat16"


@functools.partial(jax.jit, static_argnames=("axis",))
def _largest(x: jax.Array, passes: jax.Array, axis: int | None) -> jax.Array:
  """Returns the maximum, looked for `passes` times, by rows or all at once."""

  def read(_: Any, carry: tuple[jax.Array, jax.Array]) -> Any:
    # Each pass depends on the one before, or XLA would do it only once.
    _, zero = carry
    largest = jnp.max(_reduced(jnp.max, x + zero, axis))
    return largest, largest * jnp.zeros((), x.dtype)

  start = jnp.zeros((), x.dtype)
  return jax.lax.fori_loop(0, passes, read, (start, start))[0]


@functools.partial(jax.jit, static_argnames=("axis",))
def _sum(x: jax.Array, passes: jax.Array, axis: int | None) -> jax.Array:
  """Returns a sum modulo 2^32 in which each pass depends on the one before."""

  def read(_: Any, total: jax.Array) -> jax.Array:
    rows = _reduced(jnp.sum, x ^ total, axis)
    return jnp.sum(rows, dtype=jnp.uint32)

  return jax.lax.fori_loop(0, passes, read, jnp.uint32(1))


def _reduced(
  reduce: Callable[..., jax.Array], x: jax.Array, axis: int | None
) -> jax.Array:
  if axis is None:
    return reduce(x)
  return reduce(x.reshape(-1, _COLUMNS), axis=axis)


@functools.partial(jax.jit, donate_argnums=0)
def _invert(x: jax.Array, passes: jax.Array) -> jax.Array:
  return jax.lax.fori_loop(0, passes, lambda _, x: ~x, x)


_copy_once = jax.jit(jnp.copy)


def _copy(x: jax.Array, passes: int) -> jax.Array:
  """Copies `passes` times; the launches overtake the device."""
  for _ in range(passes):
    x = _copy_once(x)
  return x


def _bits(size_bytes: int) -> jax.Array:
  # Whole rows.
  size = max(size_bytes // 4 // _COLUMNS, 1) * _COLUMNS
  return jax.random.bits(jax.random.key(0), (size,), jnp.uint32)


def _rates(
  calls: Mapping[str, Callable[[], Any]], num_bytes: int, repeats: int
) -> harness.Samples[float]:
  """Times calls that move `num_bytes` each; in GB/s."""

  def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return num_bytes / (time.perf_counter() - begin) / 1e9

  timers = {
    name: functools.partial(timed, call) for name, call in calls.items()
  }
  return harness.interleave(timers, warm_ups=2, repeats=repeats)


def _measurements(
  samples: harness.Samples[float], checks: dict[str, harness.Check]
) -> list[harness.Measurement]:
  return [
    harness.Measurement(
      name=name,
      unit="GB/s",
      samples=rates,
      warm_ups=samples.warm_ups,
      check=checks[name],
      clocks=samples.clocks,
    )
    for name, rates in samples.timed.items()
  ]


def _equality(against: str, same: jax.Array) -> harness.Check:
  return harness.Check(against, {"differing": float(~same)}, {"differing": 0.0})


def measure_reads(size_bytes: int, repeats: int) -> list[harness.Measurement]:
  """Times reductions; each must give what reducing in another order gives."""
  bits = _bits(size_bytes)
  normal = jax.random.normal(jax.random.key(0), (2 * bits.size,), jnp.bfloat16)
  kinds: dict[str, tuple[Callable[..., jax.Array], jax.Array, int | None]] = {
    "read: bfloat16 maximum": (_largest, normal, None),
    "read: bfloat16 maximum by rows": (_largest, normal, 1),
    "read: uint32 sum": (_sum, bits, None),
    "read: uint32 sum by rows": (_sum, bits, 1),
  }
  passes = jnp.int32(_PASSES)
  checks, calls = {}, {}
  for name, (read, x, axis) in kinds.items():
    same = read(x, jnp.int32(2), axis=axis) == read(x, jnp.int32(2), axis=0)
    checks[name] = _equality("the same by columns", same)
    checks[name].require(name)
    calls[name] = functools.partial(read, x, passes, axis=axis)
  return _measurements(_rates(calls, bits.nbytes * _PASSES, repeats), checks)


def measure_copies(size_bytes: int, repeats: int) -> list[harness.Measurement]:
  """Times copies; an even number of inversions counts as one."""
  source = _bits(size_bytes // 2)
  checks = {}
  holder = {"x": jnp.copy(source)}

  def invert() -> jax.Array:
    holder["x"] = _invert(holder["x"], jnp.int32(_PASSES))
    return holder["x"]

  calls: dict[str, Callable[[], Any]] = {
    "copy: array to array": lambda: _copy(source, _PASSES),
    "copy: in place, inverted": invert,
  }
  for name, call in calls.items():
    # An even number of inversions is none.
    checks[name] = _equality("its source", jnp.array_equal(call(), source))
    checks[name].require(name)
  num_bytes = 2 * source.nbytes * _PASSES
  return _measurements(_rates(calls, num_bytes, repeats), checks)


def measure(size_bytes: int, repeats: int = 5) -> dict[str, Any]:
  """Measures both ceilings on JAX's default device.

  Args:
    size_bytes: of the array that is read; a copy's two arrays have as many.
    repeats: samples of each kind.

  Returns:
    `read_gbps` and `copy_gbps`, the best samples, and all `measurements`.

  Raises:
    CheckFailedError: if a reduction or a copy is wrong.
  """
  reads = measure_reads(size_bytes, repeats)
  copies = measure_copies(size_bytes, repeats)
  return dict(
    read_gbps=max(max(m.samples) for m in reads),
    copy_gbps=max(max(m.samples) for m in copies),
    measurements=[m.to_json() for m in reads + copies],
  )
