"""The matrix phases: products, sums over segments, and what becomes of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import choosing, codes, finishing, fragments, words
from pallas_kernels.activations import Activations
from pallas_kernels.geometry import CHUNK_COLS, SEGMENTS, TILE, UNIT_ROWS
from pallas_kernels.layouts import F32, I32, Index, Ref, fori
from pallas_kernels.plan import GROUP_ROWS, GROUP_UNITS, PHASE_OF
from pallas_kernels.schedule import Matmul
from pallas_kernels.stream import Stream


class MatmulPhases(Stream, Activations):
  """Weights are the operand with 64 rows, activations the other one."""

  def matmul(
    self,
    i: Index,
    matmul: Matmul,
    fill: Callable[[Index], None],
    finish: Callable[[Index, Index], None],
  ) -> Index:
    """Multiplies this CTA's units of a matrix with the activations.

    Args:
      i: index in the stream.
      matmul: how the matrix is dealt out.
      fill: called with the number of a block of columns: waits for the input
        and writes it to x. Once, if all columns are one block.
      finish: called for each group of units when their sums are in `sums`, with
        the first row of the matrix and the number of rows.

    Returns:
      The stream's next index.
    """
    plan = self.plan
    self.phase = PHASE_OF[matmul.name]
    first, count = self.runs[matmul.name]
    per_unit, num_blocks = matmul.chunks_per_unit, plan.num_blocks(matmul)

    @pl.when(count > 0)
    def _() -> None:
      if num_blocks == 1:
        with self.span("fill"):
          fill(0)

      def group(n: Index) -> None:
        begin = n * GROUP_UNITS
        num_units = jnp.minimum(count - begin, GROUP_UNITS)
        if num_blocks == 1:
          with self.span("multiply"):
            self.multiply_units(
              i + begin * per_unit, per_unit, num_units, False, matmul
            )
        else:
          fori(
            0,
            num_blocks,
            lambda block: self._group_block(
              i, begin, num_units, block, matmul, fill
            ),
          )
        with self.span("finish"):
          finish((first + begin) * UNIT_ROWS, num_units * UNIT_ROWS)

      fori(0, (count + GROUP_UNITS - 1) // GROUP_UNITS, group)

    return i + count * per_unit

  def _group_block(
    self,
    i: Index,
    begin: Index,
    num_units: Index,
    block: Index,
    matmul: Matmul,
    fill: Callable[[Index], None],
  ) -> None:
    """Multiplies one block of columns of a group's units."""
    per_unit = matmul.chunks_per_unit
    per_block = self.plan.block_chunks(matmul)
    num_chunks: Index = per_block
    if per_unit % per_block:
      num_chunks = jnp.minimum(per_block, per_unit - block * per_block)
    with self.span("fill"):
      fill(block)
    # The stream brings the group's chunks block by block.
    at = i + begin * per_unit + num_units * (block * per_block)
    with self.span("multiply"):
      self.multiply_units(at, num_chunks, num_units, block > 0, matmul)

  def multiply_units(
    self,
    i: Index,
    num_chunks: Index,
    num_units: Index,
    adds: Index,
    matmul: Matmul,
  ) -> None:
    """Multiplies the next chunks of a group's units.

    Args:
      i: index in the stream.
      num_chunks: how many chunks of each unit.
      num_units: how many units.
      adds: whether there are sums already.
      matmul: the matrix.
    """
    self.take_turns(
      num_units,
      lambda u: self._multiply_unit(
        i + u * num_chunks, num_chunks, u, adds, matmul
      ),
    )
    # What each thread has stored is there for all, and x has been read.
    self.team.meet()

  def _multiply_unit(
    self, i: Index, num_chunks: Index, u: Index, adds: Index, matmul: Matmul
  ) -> None:
    """Multiplies a unit's next chunks and stores, or adds, to `sums`.

    Args:
      i: index in the stream.
      num_chunks: how many.
      u: the unit's number in its group.
      adds: whether there is a sum already.
      matmul: the matrix.
    """
    if matmul.format.is_packed:
      products = self._products_of_codes(i, num_chunks, matmul)
    else:
      products = [self._products(i, num_chunks)]
    fragments.store_own(products, self.sums, u, adds=adds)

  def _products_of_codes(
    self, i: Index, num_chunks: Index, matmul: Matmul
  ) -> list[jax.Array]:
    """Multiplies chunks of codes; returns `[64, 8]` of each sequence."""
    columns = matmul.tiles * CHUNK_COLS

    def step(j: Index, sums: Any) -> Any:
      sums = codes.multiply(
        matmul,
        self.ring,
        self.scales,
        self.x,
        self.arrived(i + j),
        j * columns,
        sums,
      )
      # Each thread arrives for itself: it has read what it wants of the chunk.
      self.free(i + j)
      return sums

    zero = plgpu.layout_cast(
      jnp.zeros((TILE, SEGMENTS), F32), plgpu.Layout.WGMMA
    )
    return list(lax.fori_loop(0, num_chunks, step, (zero,) * self.plan.batch))

  def _products(self, i: Index, num_chunks: Index) -> jax.Array:
    """Multiplies chunks of bfloat16; returns `[64, 8 B]`."""

    def accumulate(acc: Ref) -> jax.Array:
      def step(j: Index) -> None:
        chunk = self.ring.at[self.arrived(i + j)]
        for half in range(2):
          plgpu.wgmma(
            acc,
            chunk.at[pl.ds(half * TILE, TILE)],
            self.x.at[:, pl.ds(j * CHUNK_COLS + half * TILE, TILE)].transpose(
              (1, 0)
            ),
          )

        # Products end in their order. All have but for this chunk's two: the
        # chunk before has been read, while the tensor cores go on.
        plgpu.wgmma_wait(2)

        @pl.when(j > 0)
        def _() -> None:
          self.free(i + j - 1)

      fori(0, num_chunks, step)
      plgpu.wgmma_wait(0)
      self.free(i + num_chunks - 1)
      return acc[...]

    return pl.run_scoped(
      accumulate, plgpu.ACC((TILE, SEGMENTS * self.plan.batch), F32)
    )

  def send_results(
    self, name: str, row: Index, num_rows: Index, stamp: Index, **kwargs: Any
  ) -> None:
    """Sends what is in `results` to whoever needs it.

    Args:
      name: what it is, see `Plan.exchanges`.
      row: where in it the results begin.
      num_rows: how many results there are.
      stamp: of this layer.
      **kwargs: for `words.send`.
    """
    first, row_words = self.plan.exchanges[name]
    words.send(
      self.team,
      self.words,
      first,
      self.results,
      row // 4,
      num_rows // 4,
      stamp,
      target_stride=row_words,
      **kwargs,
    )

  def finish_qkv(self, stamp: Index, row: Index, num_rows: Index) -> None:
    """Applies rope to queries and keys; sends them and the values."""
    g = self.geometry
    half = g.head_dim // 2
    pair = row // 2
    finishing.apply_rope(
      self.team,
      self.norm,
      self.sums,
      self.squares,
      self.cos_sin,
      self.results,
      pair,
      lax.rem(pair, I32(half)),
      (g.num_attention_heads + g.num_key_value_heads) * half,
    )
    self.send_results("qkv", row, num_rows, stamp, half_head=g.head_dim // 8)

  def finish_residual(
    self, name: str, stamp: Index, row: Index, num_rows: Index
  ) -> None:
    """Adds to this CTA's rows of the residual stream, and sends them."""
    first, _ = self.runs["o"]
    finishing.add_residual(
      self.team,
      self.sums,
      self.residual,
      self.results,
      row - first * UNIT_ROWS,
    )
    self.send_results(name, row, num_rows, stamp)

  def finish_gate_up(self, stamp: Index, row: Index, num_rows: Index) -> None:
    """Sends `silu(gate) * up`."""
    finishing.apply_swiglu(
      self.team, self.norm, self.sums, self.squares, self.results
    )
    self.send_results(
      "hidden", row // 2, num_rows // 2, stamp, row_payloads=GROUP_ROWS // 8
    )

  def begin_choice(self) -> None:
    """Says that no logit has come yet."""
    choosing.begin_best(self.team, self.best, self.geometry.vocab_size)
    # Who has no rows of the LM head sends this, and meets nobody until then.
    self.team.meet()

  def finish_lm_head(self, row: Index, num_rows: Index) -> None:
    """Keeps the largest logits of each lane; stores all, if that is asked for."""
    finishing.keep_best(
      self.team,
      self.norm,
      self.sums,
      self.squares,
      self.results_f32,
      self.best,
      row,
      num_rows,
      self.geometry.vocab_size,
    )
    if self.logits is not None:
      words.put(self.team, self.results_f32, self.logits, row, num_rows)

  def choose(self, stamp: Index) -> None:
    """Takes the largest logit, the first of equals, as the next token."""
    g, plan = self.geometry, self.plan
    first, row_words = plan.exchanges["candidates"]
    choosing.send_best(
      self.team,
      self.words,
      first + self.cta,
      self.best,
      stamp,
      row_words=row_words,
    )

    @pl.when(self.cta == 0)
    def _() -> None:
      # Nobody waits for these one after the other, nor when all have come.
      before = self.standing()
      choosing.choose(
        self.team,
        self.words,
        first,
        self.chosen,
        stamp,
        num_ctas=plan.num_ctas,
        row_words=row_words,
        vocab_size=g.vocab_size,
      )
      self.team.meet()

      @pl.when(self.wg == 0)
      def _() -> None:
        chosen = [self.chosen[b] for b in range(plan.batch)]
        for b in range(plan.batch):
          self.proceed(b, before[b], chosen[b])
        self.tick(1)
