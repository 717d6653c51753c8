"""The matrix phases: products, sums over CTAs, and what becomes of a tile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.activations import Activations
from pallas_kernels.exchange import Exchange
from pallas_kernels.geometry import CHUNK_COLS, HALF, TILE
from pallas_kernels.layouts import (
  BF16,
  F32,
  I32,
  Index,
  Ref,
  fori,
  rows_layout,
)
from pallas_kernels.plan import LM_HEAD
from pallas_kernels.schedule import Matmul
from pallas_kernels.stream import Stream


class MatmulPhases(Stream, Exchange, Activations):
  """Weights are the operand with 64 rows, activations the one with 8."""

  def matmul(
    self,
    i: Index,
    matmul: Matmul,
    phase: int,
    epoch: Index,
    fill: Callable[[], None],
    fill_block: Callable[[Index, int], None] | None,
    finish: Callable[[Index], None],
  ) -> Index:
    """Multiplies this CTA's run of a matrix with the activations.

    Args:
      i: index in the stream.
      matmul: how the matrix is dealt out.
      phase: which it is.
      epoch: how often it has come, this time included.
      fill: called once: waits for the input and may write it to x.
      fill_block: called with first column and number of columns of each block
        that does not fit in x with all others; None if x holds everything.
      finish: called with each tile that this CTA owns, the sums in `sums`.

    Returns:
      The stream's next index.
    """
    first, count, joins = self.runs[matmul.name]
    per_tile = matmul.chunks_per_tile
    end = first + count

    @pl.when(count > 0)
    def _() -> None:
      fill()

      def tile(t: Index) -> None:
        begin = jnp.maximum(first, t * per_tile)
        stop = jnp.minimum(end, (t + 1) * per_tile)

        def accumulate(acc: Ref) -> jax.Array:
          def step(j: Index, x_chunk: Index) -> None:
            def use(chunk: Ref) -> None:
              for half in range(2):
                plgpu.wgmma(
                  acc,
                  chunk.at[pl.ds(half * TILE, TILE)],
                  self.x.at[
                    :, pl.ds(x_chunk * CHUNK_COLS + half * TILE, TILE)
                  ].transpose((1, 0)),
                )
              plgpu.wgmma_wait(0)

            self.consume(i + j - first, use)

          if fill_block is None:
            fori(begin, stop, lambda j: step(j, j - t * per_tile))
          else:
            most = self.plan.block_chunks(matmul)

            def block(n: Index) -> None:
              lower = begin + n * most
              upper = jnp.minimum(stop, lower + most)
              fill_block((lower - t * per_tile) * CHUNK_COLS, most * CHUNK_COLS)
              fori(lower, upper, lambda j: step(j, j - lower))

            fori(0, (stop - begin + most - 1) // most, block)
          return acc[...]

        sums = pl.run_scoped(accumulate, plgpu.ACC((TILE, 8), F32))
        # The last stores have been read from the staging buffers.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mosaic.store(
          self.sums.transpose((1, 0)),
          plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED),
        )
        owned = begin == t * per_tile

        @pl.when(jnp.logical_not(owned))
        def _() -> None:
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(
            self.sums.at[pl.ds(0, self.plan.batch)],
            self.partial.at[self.cta, pl.ds(0, self.plan.batch)],
          )
          self.join(phase, (t * per_tile) // matmul.run)

        @pl.when(owned)
        def _() -> None:
          @pl.when(stop < (t + 1) * per_tile)
          def _() -> None:
            self.wait_joined(phase, epoch * joins)

            def add(j: Index) -> None:
              layout = rows_layout(TILE)
              mosaic.store(
                self.sums,
                plgpu.load(self.sums, layout=layout, optimized=False)
                + self.load_rows(self.partial.at[self.cta + 1 + j], 0, TILE),
              )

            fori(0, joins, add)

          finish(t)

      fori(first // per_tile, (end + per_tile - 1) // per_tile, tile)

      # `choose` publishes for the LM head.
      if phase != LM_HEAD:
        owner = (first + per_tile - 1) // per_tile * per_tile < end

        @pl.when(owner)
        def _() -> None:
          self.publish(phase)

    return i + count

  def result(self) -> jax.Array:
    """Returns a tile's sums `[8, 64]`."""
    return plgpu.load(self.sums, layout=rows_layout(TILE), optimized=False)

  def result_halves(self) -> list[jax.Array]:
    """Returns the two halves of a tile's sums, each `[8, 32]`."""
    return [
      plgpu.load(
        self.sums.at[:, pl.ds(j * HALF, HALF)],
        layout=rows_layout(HALF),
        optimized=False,
      )
      for j in range(2)
    ]

  def finish_qkv(self, t: Index) -> None:
    """Applies rope to queries and keys; stores the tile."""
    g = self.geometry
    blocks = g.head_dim // TILE
    head, block = t // blocks, lax.rem(t, I32(blocks))
    rotated = head < g.num_attention_heads + g.num_key_value_heads
    a, b = self.result_halves()
    cos, sin = (
      plgpu.load(
        x.at[:, pl.ds(block * HALF, HALF)],
        layout=rows_layout(HALF),
        optimized=False,
      )
      for x in (self.cos, self.sin)
    )
    # Values are turned by the angle 0.
    turn = jnp.where(rotated, F32(1), F32(0))
    cos, sin = cos * turn + (1 - turn), sin * turn
    targets = [
      self.qkv.at[
        pl.ds(0, self.plan.batch),
        head,
        pl.ds(j * (g.head_dim // 2) + block * HALF, HALF),
      ]
      for j in range(2)
    ]
    self.store_halves(
      self.halves, (a * cos - b * sin, b * cos + a * sin), targets
    )

  def finish_residual(self, source: Ref, target: Ref, t: Index) -> None:
    """Adds the tile to the residual stream."""
    x = self.load_rows(source, t * TILE, TILE)
    self.store_tile(
      self.result() + x,
      target.at[pl.ds(0, self.plan.batch), pl.ds(t * TILE, TILE)],
    )

  def finish_gate_up(self, t: Index) -> None:
    """Stores `silu(gate) * up`."""
    gate, up = self.result_halves()
    target = self.hidden.at[pl.ds(0, self.plan.batch), pl.ds(t * HALF, HALF)]
    y = gate * (1 / (1 + jnp.exp(-gate))) * up
    self.store_halves(self.narrow_half, [y.astype(BF16)], [target])

  def finish_lm_head(self, t: Index) -> None:
    """Stores logits; keeps the largest of each lane."""
    y = self.result()
    self.store_tile(
      y, self.logits.at[pl.ds(0, self.plan.batch), pl.ds(t * TILE, TILE)]
    )
    layout = rows_layout(TILE)
    index = plgpu.broadcasted_iota(I32, (8, TILE), 1, layout=layout) + t * TILE
    y = jnp.where(index < self.geometry.vocab_size, y, F32(-jnp.inf))
    best = plgpu.load(self.best, layout=layout, optimized=False)
    best_index = plgpu.load(self.best_index, layout=layout, optimized=False)
    # Tiles come in ascending order: the first of equals stays.
    better = y > best
    mosaic.store(self.best, jnp.where(better, y, best))
    mosaic.store(self.best_index, jnp.where(better, index, best_index))
