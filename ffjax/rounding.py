"""Chooses scales and codes for the weights of a matrix.

`ffjax.quantizing` and `ffjax.gptq` share it; `ffjax.quantized` says what codes
and scales mean.
"""

import functools

import jax
import jax.numpy as jnp

from ffjax.quantized import (
  FLOAT8_MAX,
  SYMMETRIC_ZERO,
  Format,
  QuantizedMatrix,
  code_values,
  pack_codes,
)


@functools.partial(jax.jit, static_argnames="format")
def quantize_leaf(leaf: jax.Array, format: Format) -> QuantizedMatrix:
  """Rounds a matrix `[out, in]` or a stack of them `[L, out, in]`."""
  if leaf.ndim == 2:
    return round_to_nearest(leaf, format)
  # One layer after another: temporary arrays are of one layer.
  return jax.lax.map(lambda x: round_to_nearest(x, format), leaf)


def round_to_nearest(matrix: jax.Array, format: Format) -> QuantizedMatrix:
  """Quantises `[out, in]` so that its groups' extremes just fit the codes."""
  weights = matrix.astype(jnp.float32)
  out, columns = matrix.shape
  groups = weights.reshape(out, format.num_groups(columns), -1)
  scales, zeros = group_scales(groups, format, matrix.dtype)

  def spread(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x[..., None], groups.shape)

  of_each = None if zeros is None else spread(zeros)
  codes = nearest_codes(groups, spread(scales), of_each, format)
  return QuantizedMatrix(
    codes=pack_codes(codes.reshape(out, columns), format),
    scales=scales,
    zeros=zeros,
    minimums=None,
    columns=None,
    format=format,
  )


def group_scales(
  groups: jax.Array, format: Format, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array | None]:
  """Chooses what the weights of groups are divided by.

  Args:
    groups: `[..., group]` float32.
    format: the format.
    dtype: of the scales.

  Returns:
    Scales `[...]` in `dtype`, not zero, and zero points `[...]` uint8, None if
    the format has none.
  """
  largest = jnp.max(jnp.abs(groups), axis=-1)
  steps = 2**format.bits - 1
  # Numbers so small that they are not normal in float32 may count as zero on a
  # device. Those of float16 are.
  smallest = max(
    float(jnp.finfo(dtype).smallest_subnormal),
    float(jnp.finfo(jnp.float32).tiny),
  )

  def rounded(scales: jax.Array) -> jax.Array:
    return jnp.maximum(scales, smallest).astype(dtype)

  if format.is_float:
    return rounded(largest / FLOAT8_MAX), None
  if format.symmetric:
    return rounded(largest / (steps / 2)), None
  # Zero is among the values, as other tools have it too.
  low = jnp.minimum(jnp.min(groups, axis=-1), 0.0)
  high = jnp.maximum(jnp.max(groups, axis=-1), 0.0)
  scales = rounded((high - low) / steps)
  zeros = jnp.clip(jnp.round(-low / scales.astype(jnp.float32)), 0.0, steps)
  return scales, zeros.astype(jnp.uint8)


def nearest_codes(
  weights: jax.Array,
  scales: jax.Array,
  zeros: jax.Array | None,
  format: Format,
) -> jax.Array:
  """Returns the codes of the values nearest to weights.

  Args:
    weights: `[...]` float32.
    scales: `[...]`, of each weight.
    zeros: `[...]` uint8, of each weight, or None.
    format: the format.

  Returns:
    `[...]` uint8; codes of 4 bits have a byte each.
  """
  x = weights / scales.astype(jnp.float32)
  if format.is_float:
    x = jnp.clip(x, -FLOAT8_MAX, FLOAT8_MAX)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)
  if format.bits == 8:
    x = jnp.clip(jnp.round(x), -128.0, 127.0)
    return jax.lax.bitcast_convert_type(x.astype(jnp.int8), jnp.uint8)
  zero = float(SYMMETRIC_ZERO) if zeros is None else zeros.astype(jnp.float32)
  return jnp.clip(jnp.round(x) + zero, 0.0, 15.0).astype(jnp.uint8)


def values_of(
  codes: jax.Array,
  scales: jax.Array,
  zeros: jax.Array | None,
  format: Format,
) -> jax.Array:
  """Returns the weights `[...]` float32 that `nearest_codes` stand for."""
  values = code_values(codes, format)
  if zeros is not None:
    values -= zeros.astype(jnp.float32)
  elif format.bits == 4:
    values -= float(SYMMETRIC_ZERO)
  return values * scales.astype(jnp.float32)
