"""The matrix phases: products, sums over segments, and what becomes of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import codes, fragments, mosaic, words
from pallas_kernels.activations import Activations
from pallas_kernels.geometry import CHUNK_COLS, SEGMENTS, TILE, UNIT_ROWS
from pallas_kernels.layouts import BF16, F32, I32, Index, Ref, fori
from pallas_kernels.plan import GROUP_ROWS, GROUP_UNITS, PHASE_OF
from pallas_kernels.schedule import Matmul
from pallas_kernels.stream import Stream
from pallas_kernels.threads import ALONE

_PAIRS = GROUP_ROWS // 2
# Results of two lanes each: 64 rows of 8 segments, and 32 pairs of rows.
_ROWS_OF_8 = plgpu.Layout.TILED(
  plgpu.Tiling(((GROUP_ROWS, 8), (16, 8), (4,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)
_PAIRS_OF_8 = plgpu.Layout.TILED(
  plgpu.Tiling(((_PAIRS, 8), (8, 8), (2,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)
_ROW, _PAIR = _ROWS_OF_8.reduce(1), _PAIRS_OF_8.reduce(1)


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
          for block in range(num_blocks):
            self._group_block(i, begin, num_units, block, matmul, fill)
        with self.span("finish"):
          finish((first + begin) * UNIT_ROWS, num_units * UNIT_ROWS)

      fori(0, (count + GROUP_UNITS - 1) // GROUP_UNITS, group)

    return i + count * per_unit

  def _group_block(
    self,
    i: Index,
    begin: Index,
    num_units: Index,
    block: int,
    matmul: Matmul,
    fill: Callable[[Index], None],
  ) -> None:
    """Multiplies one block of columns of a group's units."""
    per_unit = matmul.chunks_per_unit
    per_block = self.plan.block_chunks(matmul)
    num_chunks = min(per_block, per_unit - block * per_block)
    with self.span("fill"):
      fill(block)
    # The stream brings the group's chunks block by block.
    at = i + begin * per_unit + num_units * (block * per_block)
    with self.span("multiply"):
      self.multiply_units(at, num_chunks, num_units, block > 0, matmul)

  def multiply_units(
    self,
    i: Index,
    num_chunks: int,
    num_units: Index,
    adds: bool,
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
    self, i: Index, num_chunks: int, u: Index, adds: bool, matmul: Matmul
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
    self, i: Index, num_chunks: int, matmul: Matmul
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

  def _products(self, i: Index, num_chunks: int) -> jax.Array:
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

  def result(self, b: Index) -> jax.Array:
    """Returns a group's 64 results."""
    sums = self.sums.at[b].reshape(GROUP_ROWS, SEGMENTS)
    return jnp.sum(plgpu.load(sums, layout=_ROWS_OF_8, optimized=False), axis=1)

  def result_pairs(self, b: Index) -> list[jax.Array]:
    """Returns the 32 results of a group's even rows, and of its odd ones.

    They are of what is normed.
    """
    scale = self.inverse_rms(b)
    sums = self.sums.at[b].reshape(_PAIRS, 2 * SEGMENTS)
    return [
      scale
      * jnp.sum(
        plgpu.load(
          sums.at[:, pl.ds(n * SEGMENTS, SEGMENTS)],
          layout=_PAIRS_OF_8,
          optimized=False,
        ),
        axis=1,
      )
      for n in range(2)
    ]

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
    num_turned = (g.num_attention_heads + g.num_key_value_heads) * half
    start = lax.rem(pair, I32(half))
    index = plgpu.broadcasted_iota(I32, (_PAIRS,), 0, layout=_PAIR) + pair
    turned = index < num_turned

    def sequence(b: Index) -> None:
      x, y = self.result_pairs(b)
      cos, sin = (
        plgpu.load(
          self.cos_sin.at[n, b, pl.ds(start, _PAIRS)],
          layout=_PAIR,
          optimized=False,
        )
        for n in range(2)
      )
      cos = jnp.where(turned, cos, F32(1))
      sin = jnp.where(turned, sin, F32(0))
      for n, value in enumerate((x * cos - y * sin, y * cos + x * sin)):
        target = self.results.at[b, pl.ds(n * _PAIRS, _PAIRS)]
        mosaic.store(target, value.astype(BF16))

    self.take_turns(self.plan.batch, sequence)
    self.send_results("qkv", row, num_rows, stamp, half_head=g.head_dim // 8)

  def finish_residual(
    self, name: str, stamp: Index, row: Index, num_rows: Index
  ) -> None:
    """Adds to this CTA's rows of the residual stream, and sends them."""
    first, _ = self.runs["o"]
    at = row - first * UNIT_ROWS

    def sequence(b: Index) -> None:
      residual = self.residual.at[b, pl.ds(at, GROUP_ROWS)]
      y = self.result(b) + plgpu.load(residual, layout=_ROW, optimized=False)
      mosaic.store(residual, y)
      mosaic.store(self.results.at[b], y.astype(BF16))

    self.take_turns(self.plan.batch, sequence)
    self.send_results(name, row, num_rows, stamp)

  def finish_gate_up(self, stamp: Index, row: Index, num_rows: Index) -> None:
    """Sends `silu(gate) * up`."""

    def sequence(b: Index) -> None:
      gate, up = self.result_pairs(b)
      y = gate * (1 / (1 + jnp.exp(-gate))) * up
      mosaic.store(self.results.at[b, pl.ds(0, _PAIRS)], y.astype(BF16))

    self.take_turns(self.plan.batch, sequence)
    self.send_results(
      "hidden", row // 2, num_rows // 2, stamp, row_payloads=_PAIRS // 4
    )

  def begin_choice(self) -> None:
    """Says that no logit has come yet; a meeting is to follow."""

    @self.first_wg
    def _() -> None:
      for n, value in enumerate((-jnp.inf, float(self.geometry.vocab_size))):
        for b in range(self.plan.batch):
          mosaic.store(
            self.best.at[n * self.plan.batch + b],
            plgpu.layout_cast(jnp.full((GROUP_ROWS,), value, F32), _ROW),
          )

  def finish_lm_head(self, row: Index, num_rows: Index) -> None:
    """Stores logits; keeps the largest of each lane."""
    lane = plgpu.broadcasted_iota(I32, (GROUP_ROWS,), 0, layout=_ROW)
    index = lane + row
    real = (index < self.geometry.vocab_size) & (lane < num_rows)

    def sequence(b: Index) -> None:
      y = self.result(b) * self.inverse_rms(b)
      mosaic.store(self.results_f32.at[b], y)
      y = jnp.where(real, y, F32(-jnp.inf))
      best, best_index = (
        plgpu.load(
          self.best.at[n * self.plan.batch + b], layout=_ROW, optimized=False
        )
        for n in range(2)
      )
      # Rows come in ascending order: the first of equals stays.
      better = y > best
      mosaic.store(self.best.at[b], jnp.where(better, y, best))
      mosaic.store(
        self.best.at[self.plan.batch + b],
        jnp.where(better, index.astype(F32), best_index),
      )

    self.take_turns(self.plan.batch, sequence)
    words.put(self.team, self.results_f32, self.logits, row, num_rows)

  def choose(self, stamp: Index) -> None:
    """Takes the largest logit, the first of equals, as the next token."""
    g, plan = self.geometry, self.plan
    first, row_words = plan.exchanges["candidates"]
    none = F32(g.vocab_size)

    def own(b: Index) -> None:
      best, index = (
        plgpu.load(
          self.best.at[n * self.plan.batch + b], layout=_ROW, optimized=False
        )
        for n in range(2)
      )
      top = jnp.max(best)
      top_index = jnp.min(jnp.where(best == top, index, none))
      for n, value in enumerate((top, top_index)):
        spread = plgpu.layout_cast(jnp.full((GROUP_ROWS,), value, F32), _ROW)
        mosaic.store(self.best.at[n * self.plan.batch + b], spread)

    # Maxima of Pallas go through shared memory that is there once.
    @self.first_wg
    def _() -> None:
      fori(0, plan.batch, own)

    words.send(
      self.team,
      self.words,
      first,
      self.best,
      self.cta,
      1,
      stamp,
      target_stride=row_words,
      row_payloads=1,
    )

    @pl.when((self.cta == 0) & (self.wg == 0))
    def _() -> None:
      width = plan.candidate_cols
      strided = plgpu.Layout.WG_STRIDED((width,), vec_size=1)
      real = (
        plgpu.broadcasted_iota(I32, (width,), 0, layout=strided) < plan.num_ctas
      )
      for b in range(plan.batch):
        wanted = [
          words.Wanted(
            self.candidates.at[n],
            first + (n * plan.batch + b) * row_words,
            row_words=width,
            num_rows=1,
            valid=plan.num_ctas,
          )
          for n in range(2)
        ]
        # The last sequence's have been read.
        ALONE.meet()
        words.receive(ALONE, self.words, stamp, *wanted)
        ALONE.meet()
        logit, index = (
          plgpu.load(self.candidates.at[n], layout=strided, optimized=False)
          for n in range(2)
        )
        logit = jnp.where(real, logit, F32(-jnp.inf))
        top = jnp.max(logit)
        last = F32(g.vocab_size - 1)
        chosen = jnp.min(jnp.where(real & (logit == top), index, last))
        # In range even if no logit is a number.
        chosen = jnp.maximum(jnp.minimum(chosen, last), F32(0))
        self.proceed(b, chosen.astype(I32))
      self.tick(1)
