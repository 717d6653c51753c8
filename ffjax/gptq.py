"""GPTQ: rounds a matrix so that its products with real inputs change least.

Columns are rounded one after another, those with the largest inputs first, and
the columns that are left make up for each one's error. Groups keep the scales
that rounding to nearest would give them, so that the order leaves no trace.

Source: Frantar et al. 2022 (arXiv 2210.17323), with its authors' later
"act-order" and "static groups".
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ffjax.cache import KVCache
from ffjax.config import LlamaConfig
from ffjax.model import DecoderLayer, Linear, Params, TokenPlaces
from ffjax.quantized import Format, QuantizedMatrix, pack_codes
from ffjax.rounding import group_scales, nearest_codes, values_of

# Added to the diagonal of the Hessian, as a share of its mean: the less there
# is to calibrate with, the more it is needed.
_DAMPING = 0.05
# Columns that are rounded before the rest of the matrix hears of their errors.
_BLOCK = 128

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def run_layer(
  config: LlamaConfig,
  params: Params,
  x: jax.Array,
  num_tokens: jax.Array,
) -> tuple[jax.Array, dict[tuple[str, str], jax.Array]]:
  """Runs one layer on whole sequences.

  Args:
    config: the model.
    params: the layer's parameter tree.
    x: `[B, T, D]`, what comes into the layer.
    num_tokens: `[B]` int32, tokens that are not padding.

  Returns:
    What comes out, and for each matrix, by module and name, the second moments
    `[in, in]` float32 of what it is multiplied by.
  """
  b, t, _ = x.shape
  config = dataclasses.replace(config, num_hidden_layers=1)
  cache = KVCache.create(config, b, t, x.dtype)
  tokens = TokenPlaces.after(config, cache, num_tokens, t)
  real = jnp.arange(t, dtype=jnp.int32)[None, :] < num_tokens[:, None]
  real = real.astype(jnp.float32).reshape(b * t, 1)
  moments = {}

  def watch(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, Linear):
      flat = args[0].astype(jnp.float32).reshape(b * t, -1)
      flat *= real
      *_, module, name = context.module.path
      moments[module, name] = _dot(flat.T, flat)
    return run(*args, **kwargs)

  layer = DecoderLayer(config, dtype=x.dtype, param_dtype=x.dtype)
  with nn.intercept_methods(watch):
    (x, _, _), _ = layer.apply(
      {"params": params}, (x, cache.k, cache.v), jnp.int32(0), tokens
    )
  return x, moments


@functools.partial(jax.jit, static_argnames="format")
def quantize_matrix(
  matrix: jax.Array, moments: jax.Array, format: Format
) -> QuantizedMatrix:
  """Quantises `[out, in]`, given what it is multiplied by.

  Args:
    matrix: the weights.
    moments: `[in, in]` float32, sum of the inputs' outer products.
    format: the format.
  """
  out, columns = matrix.shape
  weights = matrix.astype(jnp.float32)
  groups = weights.reshape(out, format.num_groups(columns), -1)
  scales, zeros = group_scales(groups, format, matrix.dtype)
  size = columns // scales.shape[-1]

  order = jnp.argsort(-jnp.diagonal(moments))
  group = order // size
  codes = _solve(
    weights[:, order],
    _whitened(moments[order][:, order]),
    scales[:, group],
    None if zeros is None else zeros[:, group],
    format,
  )
  return QuantizedMatrix(
    codes=pack_codes(codes[:, jnp.argsort(order)], format),
    scales=scales,
    zeros=zeros,
    minimums=None,
    columns=None,
    format=format,
  )


def _whitened(moments: jax.Array) -> jax.Array:
  """Returns upper triangular U `[in, in]` with U^T U the damped inverse."""
  n = moments.shape[0]
  mean = jnp.trace(moments) / n
  # Of what is never multiplied, any rounding will do.
  mean = jnp.where(mean > 0, mean, 1.0)
  damped = moments + _DAMPING * mean * jnp.eye(n, dtype=jnp.float32)
  # From the last column on: then the inverse of the factor is the factor of the
  # inverse.
  lower = jnp.linalg.cholesky(damped[::-1, ::-1])
  identity = jnp.eye(n, dtype=jnp.float32)
  inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
  return inverse[::-1, ::-1]


def _solve(
  weights: jax.Array,
  upper: jax.Array,
  scales: jax.Array,
  zeros: jax.Array | None,
  format: Format,
) -> jax.Array:
  """Rounds columns from the first to the last.

  Args:
    weights: `[out, in]` float32.
    upper: what `_whitened` returns.
    scales: `[out, in]`, of each weight.
    zeros: `[out, in]` uint8, or None.
    format: the format.

  Returns:
    Codes `[out, in]` uint8, a byte each.
  """
  out, columns = weights.shape
  block = math.gcd(columns, _BLOCK)

  def take(x: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

  def run_block(weights: jax.Array, start: jax.Array) -> Any:
    rows = jax.lax.dynamic_slice_in_dim(upper, start, block, axis=0)
    within = take(rows, start)
    parts = take(weights, start), take(scales, start)
    of_zeros = None if zeros is None else take(zeros, start)

    def run_column(i: jax.Array, carry: Any) -> Any:
      left, errors, codes = carry
      weight, scale = left[:, i], parts[1][:, i]
      zero = None if of_zeros is None else of_zeros[:, i]
      code = nearest_codes(weight, scale, zero, format)
      error = weight - values_of(code, scale, zero, format)
      error /= within[i, i]
      left -= error[:, None] * within[i][None, :]
      return left, errors.at[:, i].set(error), codes.at[:, i].set(code)

    empty = jnp.zeros((out, block), jnp.float32)
    _, errors, codes = jax.lax.fori_loop(
      0, block, run_column, (parts[0], empty, empty.astype(jnp.uint8))
    )
    return weights - _dot(errors, rows), codes

  starts = jnp.arange(0, columns, block, dtype=jnp.int32)
  _, codes = jax.lax.scan(run_block, weights, starts)
  return jnp.moveaxis(codes, 0, 1).reshape(out, columns)
