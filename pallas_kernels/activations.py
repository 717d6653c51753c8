"""From what CTAs have sent to x, the operand of the products that is not weights.

x is `[8 B, columns]`: row `8 b + s` is segment s of sequence b's activations.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import words
from pallas_kernels.cta import CtaBase
from pallas_kernels.geometry import CHUNK_COLS, SEGMENTS, TILE, UNIT_ROWS
from pallas_kernels.layouts import BF16, F32, I32, Index, Ref, fori, rows_layout
from pallas_kernels.schedule import Matmul

# Columns of a segment that are normed at once: what registers hold.
_PIECE = 512


class Activations(CtaBase):
  """Fills x."""

  def x_offset_bytes(self, b: Index) -> Index:
    """Returns where in x a sequence begins."""
    return b * (self.x.shape[1] * SEGMENTS * 2)

  def receive_x(
    self, name: str, matmul: Matmul, valid: int, block: Index, stamp: Index
  ) -> None:
    """Waits for activations and writes a block of their columns to x.

    Args:
      name: what is sent, see `Plan.exchanges`.
      matmul: what they are multiplied with.
      valid: how many values there are.
      block: which block of each segment.
      stamp: that they bear.
    """
    first, row_words = self.plan.exchanges[name]
    segment = matmul.cols // SEGMENTS
    width = self.plan.block_chunks(matmul) * CHUNK_COLS

    def sequence(b: Index) -> None:
      wanted = words.Wanted(
        self.x,
        first + b * row_words,
        row_words=width // 2,
        num_rows=SEGMENTS,
        source_stride=segment // 2,
        column=block * (width // 2),
        offset_bytes=self.x_offset_bytes(b),
        valid=None if self._whole(matmul, valid) else valid // 2,
        tiled=True,
      )
      words.receive(self.words, stamp, wanted)

    fori(0, self.plan.batch, sequence)

  def _whole(self, matmul: Matmul, valid: int) -> bool:
    """Whether neither the columns nor the last block are padded."""
    per_block = self.plan.block_chunks(matmul)
    return valid == matmul.cols and matmul.chunks_per_unit % per_block == 0

  def norm_x(self, norm: Index) -> None:
    """Multiplies x by the inverse of its RMS and the weights of a norm."""
    g = self.geometry
    segment = g.padded_hidden_size // SEGMENTS
    width = min(segment, _PIECE)
    starts = range(0, segment, width)

    def load(ref: Ref, start: int) -> jax.Array:
      cols = min(width, segment - start)
      return plgpu.load(
        ref.at[:, pl.ds(start, cols)],
        layout=rows_layout(cols),
        optimized=False,
      )

    gains = [load(self.norms.at[norm], start) for start in starts]

    def sequence(b: Index) -> None:
      x = self.x.at[pl.ds(b * SEGMENTS, SEGMENTS)]
      total = F32(0)
      for start in starts:
        values = load(x, start).astype(F32)
        total = total + jnp.sum(jnp.sum(values * values, axis=1))
      scale = lax.rsqrt(total * F32(1 / g.hidden_size) + F32(g.rms_norm_eps))
      for start, gain in zip(starts, gains, strict=True):
        cols = min(width, segment - start)
        values = load(x, start).astype(F32) * scale * gain
        x.at[:, pl.ds(start, cols)][...] = values.astype(BF16)

    fori(0, self.plan.batch, sequence)

  def embed(self) -> None:
    """Writes the tokens' rows to x, and this CTA's part of the residual."""
    g, lm_head = self.geometry, self.plan.schedule.lm_head
    half = CHUNK_COLS // 2
    first, _ = self.runs["o"]

    def sequence(b: Index) -> None:
      token = self.token_ids[b]
      unit = token // UNIT_ROWS
      owner, local = unit // lm_head.run, lax.rem(unit, I32(lm_head.run))
      row = lax.rem(token, I32(UNIT_ROWS)) * SEGMENTS
      for c in range(lm_head.chunks_per_unit):
        chunk = self.embedding.at[owner, local * lm_head.chunks_per_unit + c]
        for n in range(2):
          values = plgpu.load(
            chunk.at[pl.ds(n * TILE + row, SEGMENTS)],
            layout=rows_layout(half),
            optimized=False,
          )
          self.x.at[
            pl.ds(b * SEGMENTS, SEGMENTS),
            pl.ds(c * CHUNK_COLS + n * half, half),
          ][...] = values
      words.take(
        self.x,
        self.x_offset_bytes(b),
        first * UNIT_ROWS,
        self.residual.at[b],
        segment=g.padded_hidden_size // SEGMENTS,
      )

    fori(0, self.plan.batch, sequence)
