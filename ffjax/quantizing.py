"""Quantises models: `ffjax.quantize`.

Down the flow: `ffjax.quantized` says what the results mean, `ffjax.checkpoint`
saves them.
"""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp

from ffjax.errors import RequestError
from ffjax.packed import PackedParams
from ffjax.params import Model, matrix_formats
from ffjax.quantized import SYMMETRIC_ZERO, Format, QuantizedMatrix

# The largest finite float8_e4m3fn.
_FLOAT8_MAX = 448.0


def quantize(
  model: Model, format_name: str, *, head_format: str | None = None
) -> Model:
  """Quantises the matrices of all layers; the argument stays as it is.

  Args:
    model: a model that is neither packed nor quantised.
    format_name: a key of `ffjax.quantized.FORMATS`, for example `"int4_g128"`.
    head_format: likewise for embedding and LM head, of 8-bit integers; None
      leaves them as they are.

  Returns:
    The quantised model. Scales have the dtype of the matrices they were made
    from.

  Raises:
    RequestError: if there is no such format, it does not fit the model's
      sizes, or the model is packed or quantised already.
  """
  if isinstance(model.params, PackedParams):
    raise RequestError("the model is packed: quantise it before")
  if model.formats:
    names = ", ".join(sorted(x.name for x in model.formats))
    raise RequestError(f"the model is quantised already ({names})")
  found = matrix_formats(model.config, format_name, head_format)
  flat = flax.traverse_util.flatten_dict(model.params)
  made = {
    path: leaf if path not in found else quantize_leaf(leaf, found[path])
    for path, leaf in flat.items()
  }
  return dataclasses.replace(
    model, params=flax.traverse_util.unflatten_dict(made)
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
  # Numbers so small that they are not normal may count as zero on a device.
  smallest = float(jnp.finfo(dtype).tiny)

  def rounded(scales: jax.Array) -> jax.Array:
    return jnp.maximum(scales, smallest).astype(dtype)

  if format.is_float:
    return rounded(largest / _FLOAT8_MAX), None
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
    x = jnp.clip(x, -_FLOAT8_MAX, _FLOAT8_MAX)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)
  if format.bits == 8:
    x = jnp.clip(jnp.round(x), -128.0, 127.0)
    return jax.lax.bitcast_convert_type(x.astype(jnp.int8), jnp.uint8)
  zero = float(SYMMETRIC_ZERO) if zeros is None else zeros.astype(jnp.float32)
  return jnp.clip(jnp.round(x) + zero, 0.0, 15.0).astype(jnp.uint8)


def pack_codes(codes: jax.Array, format: Format) -> jax.Array:
  """Returns `QuantizedMatrix.codes` of codes `[..., in]` uint8, a byte each."""
  if format.bits == 8:
    return codes
  return codes[..., 0::2] | (codes[..., 1::2] << 4)
