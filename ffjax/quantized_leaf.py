"""Stacks the quantised matrices of all layers into a leaf, bit for bit.

`ffjax.checkpoint` asks for it where a checkpoint's own bits are kept.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.errors import CheckpointError
from ffjax.params import Leaf
from ffjax.quantized import (
  FLOAT8_MAX,
  FORMATS,
  SYMMETRIC_ZERO,
  QuantizedMatrix,
)
from ffjax.tensor_entry import TensorEntry

Struct = jax.ShapeDtypeStruct


def stacked_shapes(
  leaf: Leaf, parts: list[TensorEntry]
) -> QuantizedMatrix | None:
  """Returns what a leaf is as a stack of quantised matrices.

  Args:
    leaf: the leaf.
    parts: its tensors, one for each layer.

  Returns:
    It as shapes and dtypes; None if the leaf is not made of such matrices.

  Raises:
    CheckpointError: if only some of the tensors are quantised, or not alike.
  """
  found = [part.bits for part in parts]
  if not leaf.stacked or not any(found):
    return None
  stack = [None if bits is None else bits.shapes for bits in found]
  with_minimums = any(x is not None and x.minimums is not None for x in stack)
  with_columns = any(x is not None and x.columns is not None for x in stack)
  alike = [
    None if x is None else _alike(x, with_minimums, with_columns) for x in stack
  ]
  example, first = next(
    (part, x) for part, x in zip(parts, alike, strict=True) if x is not None
  )
  for part, other in zip(parts, alike, strict=True):
    if other != first:
      this, that = part.stored_as, example.stored_as
      if this == that and other is not None:
        this = f"{this} with scales of {other.scales.dtype.name}"
        that = f"{that} with scales of {first.scales.dtype.name}"
      raise CheckpointError(
        f"{part.path}: {part.name} is {this}, but {example.name} is {that}:"
        " matrices of one kind must be stored alike in all layers"
        " (keep_quantized=False dequantises them)"
      )
  return jax.tree.map(lambda x: Struct((len(parts), *x.shape), x.dtype), first)


def _alike(
  shapes: QuantizedMatrix, with_minimums: bool, with_columns: bool
) -> QuantizedMatrix:
  """Returns what `_made_alike` makes of a matrix, as shapes and dtypes."""
  made = functools.partial(
    _made_alike, with_minimums=with_minimums, with_columns=with_columns
  )
  return jax.eval_shape(made, shapes)


def _made_alike(
  matrix: QuantizedMatrix, with_minimums: bool, with_columns: bool
) -> QuantizedMatrix:
  """Gives a matrix the parts that others in its stack have, of equal weights.

  llama.cpp makes some layers Q4_1 where others are Q4_0.
  """
  if with_columns and matrix.columns is None:
    columns = jnp.arange(matrix.shape[1], dtype=jnp.int32)
    matrix = dataclasses.replace(matrix, columns=columns)
  format = matrix.format
  if with_minimums and matrix.minimums is None and matrix.zeros is None:
    # Exact: a multiple by a power of two.
    matrix = dataclasses.replace(
      matrix,
      minimums=matrix.scales * np.asarray(-SYMMETRIC_ZERO, matrix.scales.dtype),
      format=FORMATS.get(f"{format.name}_asym", format),
    )
  return matrix


def load(
  parts: list[TensorEntry],
  shapes: QuantizedMatrix,
  advance: Callable[[int], None],
) -> QuantizedMatrix:
  """Returns the stack on the default device.

  Args:
    parts: the tensors, one for each layer.
    shapes: what `stacked_shapes` said.
    advance: is called with numbers of bytes as they land.

  Raises:
    CheckpointError: if a scale or a weight is not finite.
  """
  with_parts = dict(
    with_minimums=shapes.minimums is not None,
    with_columns=shapes.columns is not None,
  )
  stack = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  for layer, part in enumerate(parts):
    assert part.bits is not None
    matrix = _made_alike(part.bits.read(), **with_parts)
    _check_finite(part, matrix)
    stack = _write(stack, matrix, np.int32(layer))
    # Matrices still in flight would add up to a second copy of the model.
    jax.block_until_ready(stack)
    advance(matrix.num_bytes)
  return stack


def _check_finite(part: TensorEntry, matrix: QuantizedMatrix) -> None:
  f = matrix.format
  numbers = [x for x in (matrix.scales, matrix.minimums) if x is not None]
  sizes = [np.abs(np.asarray(x).astype(np.float64)).max() for x in numbers]
  # The largest that a code, less its zero point, can be.
  code = FLOAT8_MAX if f.is_float else 2 ** (f.bits - f.symmetric)
  sizes[0] *= code
  finite = bool(sum(sizes) <= float(jnp.finfo(jnp.bfloat16).max))
  if f.is_float:
    finite &= bool((np.asarray(matrix.codes) & 0x7F != 0x7F).all())
  if not finite:
    raise CheckpointError(
      f"{part.path}: {part.name} holds values that are not finite"
    )


@functools.partial(jax.jit, donate_argnums=0)
def _write(
  stack: QuantizedMatrix, matrix: QuantizedMatrix, layer: jax.Array
) -> QuantizedMatrix:
  return jax.tree.map(
    lambda whole, part: jax.lax.dynamic_update_index_in_dim(
      whole, part, layer, 0
    ),
    stack,
    matrix,
  )
