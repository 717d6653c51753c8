"""From activations in device memory to the operand x of the products."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.cta import CtaBase
from pallas_kernels.layouts import (
  BF16,
  F32,
  I32,
  Index,
  Ref,
  fori,
  repeat_rows,
  rows_layout,
)

_MOST_UNROLLED = 16


class Activations(CtaBase):
  """Loads, norms, and writes x."""

  def load_rows(self, source: Ref, start: Index, cols: int) -> jax.Array:
    """Loads `[8, cols]`; sequences beyond the batch are meaningless."""
    layout = rows_layout(cols)
    if self.plan.batch == 1:
      return self.repeat(source.at[0, pl.ds(start, cols)], cols)
    return plgpu.load(
      source.at[:, pl.ds(start, cols)], layout=layout, optimized=False
    )

  def repeat(self, row: Ref, cols: int) -> jax.Array:
    """Loads `[cols]` and repeats it as `[8, cols]`."""
    layout = rows_layout(cols)
    values = plgpu.load(row, layout=layout.reduce(0), optimized=False)
    return repeat_rows(values, (8, cols), layout)

  def row_layout(self, width: int, itemsize: int) -> Any:
    """Returns the layout of `[width]` over all of the warpgroup."""
    vector = math.gcd(16 // itemsize, width // 128)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=vector)

  def load_row(self, source: Ref, width: int) -> jax.Array:
    """Loads `[width]` with all of the warpgroup side by side."""
    layout = self.row_layout(width, source.dtype.itemsize)
    return plgpu.load(source, layout=layout, optimized=False)

  def inverse_rms(self, row: jax.Array) -> jax.Array:
    """Returns a float32 scalar for `[D]`."""
    g = self.geometry
    mean = jnp.sum(row * row) * F32(1 / g.hidden_size)
    return lax.rsqrt(mean + F32(g.rms_norm_eps))

  def piece(self, width: int, most: int) -> int:
    """Returns into pieces of how many columns to cut; never the whole width.

    Layout inference would confuse that one with the rows of `load_row`.
    """
    return math.gcd(most, width // 2)

  def fill_from_row(self, row: jax.Array, width: int) -> None:
    """Writes one sequence's activations as all eight rows of x.

    By way of a plain row in shared memory: each is then read from device memory
    once and not by every thread that writes one of its eight copies.
    """
    mosaic.store(self.row.at[pl.ds(0, width)], row.astype(BF16))
    plgpu.commit_smem()
    piece = self.piece(width, 1024)

    def copy(start: Index) -> None:
      self.x.at[:, pl.ds(start, piece)][...] = self.repeat(
        self.row.at[pl.ds(start, piece)], piece
      )

    # Unrolled, one piece hides the other; many would take long to compile.
    if width // piece <= _MOST_UNROLLED:
      for start in range(0, width, piece):
        copy(start)
    else:
      fori(0, width // piece, lambda j: copy(j * piece))
    plgpu.commit_smem()

  def fill_normed(self, x: Ref, norm: Ref) -> None:
    """Writes the normed activations `[8, D]` to shared memory."""
    width = self.geometry.padded_hidden_size
    if self.plan.batch == 1:
      row, gain = self.load_row(x.at[0], width), self.load_row(norm, width)
      self.fill_from_row(row * self.inverse_rms(row) * gain, width)
      return
    scales = [
      self.inverse_rms(self.load_row(x.at[b], width))
      for b in range(self.plan.batch)
    ]
    piece = self.piece(width, 512)
    layout = rows_layout(piece)

    def fill(j: Index) -> None:
      start = j * piece
      rows = self.load_rows(x, start, piece)
      gain = self.repeat(norm.at[pl.ds(start, piece)], piece)
      row = plgpu.broadcasted_iota(I32, (8, piece), 0, layout=layout)
      scale = jnp.full((8, piece), scales[0], F32)
      for b in range(1, self.plan.batch):
        scale = jnp.where(row == b, scales[b], scale)
      y = rows * scale * gain
      self.x.at[:, pl.ds(start, piece)][...] = y.astype(BF16)

    fori(0, width // piece, fill)
    plgpu.commit_smem()

  def fill_plain(
    self, source: Ref, start: Index, width: int, valid: int | None
  ) -> None:
    """Writes `width` columns of activations from column `start` on.

    Args:
      source: `[8, cols]` bfloat16.
      start: int32 scalar.
      width: static; may reach beyond what is used.
      valid: columns from here on were never written, or None.
    """

    def masked(
      x: jax.Array, axis: int, offset: Index, layout: Any
    ) -> jax.Array:
      if valid is None:
        return x
      col = plgpu.broadcasted_iota(I32, x.shape, axis, layout=layout)
      # Times their weights, which are 0, they must not be NaN.
      return jnp.where(col + (start + offset) < valid, x, jnp.zeros((), BF16))

    if self.plan.batch == 1:
      row = self.load_row(source.at[0, pl.ds(start, width)], width)
      layout = self.row_layout(width, source.dtype.itemsize)
      self.fill_from_row(masked(row, 0, 0, layout), width)
      return
    piece = self.piece(width, 1024)
    layout = rows_layout(piece)

    def fill(j: Index) -> None:
      rows = self.load_rows(source, start + j * piece, piece)
      self.x.at[:, pl.ds(j * piece, piece)][...] = masked(
        rows, 1, j * piece, layout
      )

    fori(0, width // piece, fill)
    plgpu.commit_smem()
