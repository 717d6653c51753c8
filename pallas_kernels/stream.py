"""The stream of weights, keys and values through the ring of slots.

The memory warpgroup fills slots in the order in which the compute warpgroup
uses them, across phases and layers, bounded only by free slots.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cta import CtaBase
from pallas_kernels.geometry import CHUNK_ROWS, TILE
from pallas_kernels.layouts import I32, Index, Ref, fori
from pallas_kernels.plan import ATTENTION, GROUP_UNITS, PHASE_OF
from pallas_kernels.schedule import Matmul, split_of


class Stream(CtaBase):
  """Both ends of the ring."""

  def acquire(self, i: Index) -> Index:
    """Waits for the slot of the stream's chunk i and returns it."""
    slot = self.slot(i)

    # A slot is free again once the compute warpgroup has arrived for the
    # chunk that was in it before.
    @pl.when(i >= self.plan.num_slots)
    def _() -> None:
      with self.span("ring_full"):
        plgpu.barrier_wait(self.consumed.at[slot])

    # Nor are more chunks asked for than it takes to keep memory busy: what is
    # asked for later, by this CTA or another, waits behind them, and the words
    # that CTAs exchange are among it. An earlier chunk has arrived.
    if self.plan.in_flight < self.plan.num_slots:

      @pl.when(i >= self.plan.in_flight)
      def _() -> None:
        earlier = lax.rem(i - self.plan.in_flight, I32(self.plan.num_slots))
        plgpu.barrier_wait(self.produced.at[earlier])

    return slot

  def load_halves(self, i: Index, upper: Ref, lower: Ref) -> Index:
    """Loads two `[64, 64]` into the next slot; returns the next index."""
    slot = self.acquire(i)
    half = CHUNK_ROWS // 2
    for j, source in enumerate((upper, lower)):
      plgpu.copy_gmem_to_smem(
        source,
        self.ring.at[slot, pl.ds(j * half, half)],
        self.produced.at[slot],
      )
    return i + 1

  def load_codes(self, i: Index, codes: Ref, scales: Ref) -> Index:
    """Loads codes and their scales into the next slot; returns the next index."""
    slot = self.acquire(i)
    targets = (
      self.ring.at[slot, pl.ds(0, codes.shape[0])],
      self.scales.at[slot, pl.ds(0, scales.shape[0])],
    )
    for source, target in zip((codes, scales), targets, strict=True):
      plgpu.copy_gmem_to_smem(source, target, self.produced.at[slot])
    return i + 1

  def stream_weights(
    self, i: Index, packed: Ref, matmul: Matmul, scales: Ref | None = None
  ) -> Index:
    """Streams this CTA's units of a layer's matrix, as `MatmulPhases` does.

    Args:
      i: index in the stream.
      packed: `[P, n, rows of the ring, 64]`.
      matmul: how it is dealt out.
      scales: `[P, n, rows, 32]` int32 of codes, or None.

    Returns:
      The stream's next index.
    """
    plan = self.plan
    self.phase = PHASE_OF[matmul.name]
    _, count = self.runs[matmul.name]
    half, per_unit = CHUNK_ROWS // 2, matmul.chunks_per_unit
    per_block = plan.block_chunks(matmul)

    def load(j: Index, i: Index) -> Index:
      chunk = packed.at[self.cta, j]
      if scales is not None:
        return self.load_codes(i, chunk, scales.at[self.cta, j])
      return self.load_halves(
        i, chunk.at[pl.ds(0, half)], chunk.at[pl.ds(half, half)]
      )

    if plan.num_blocks(matmul) == 1:
      return lax.fori_loop(0, count * per_unit, load, i)

    def group(n: Index, i: Index) -> Index:
      first = n * GROUP_UNITS
      last = jnp.minimum(first + GROUP_UNITS, count)

      def block(m: Index, i: Index) -> Index:
        begin = m * per_block
        end = jnp.minimum(begin + per_block, per_unit)

        def unit(u: Index, i: Index) -> Index:
          at = u * per_unit
          return lax.fori_loop(at + begin, at + end, load, i)

        return lax.fori_loop(first, last, unit, i)

      return lax.fori_loop(0, plan.num_blocks(matmul), block, i)

    return lax.fori_loop(0, (count + GROUP_UNITS - 1) // GROUP_UNITS, group, i)

  def stream_keys_and_values(self, i: Index, layer: Index) -> Index:
    """Streams the tiles of keys and values that this CTA attends to.

    A slot holds 64 keys and their values, or with wide heads one of both.
    """
    g = self.geometry
    self.phase = ATTENTION

    def item_tiles(item: Index, i: Index) -> Index:
      b, head, split = self.item(item)
      first, end, _, _ = split_of(self.positions[b], split, self.plan.splits)

      def tile(t: Index, i: Index) -> Index:
        k, v = (
          cache.at[layer, b, head, pl.ds(t * TILE, TILE)]
          for cache in (self.k_cache, self.v_cache)
        )
        if g.head_dim == TILE:
          return self.load_halves(i, k, v)
        for x in (k, v):
          i = self.load_halves(
            i, x.at[:, pl.ds(0, TILE)], x.at[:, pl.ds(TILE, TILE)]
          )
        return i

      return lax.fori_loop(first, jnp.maximum(first, end), tile, i)

    return self.for_items(item_tiles, i)

  def produce(self) -> None:
    """Streams everything that the step reads, in the order of its use."""
    plan, s = self.plan, self.plan.schedule

    def layer_stream(layer: Index, i: Index) -> Index:
      def weights(i: Index, matmul: Matmul) -> Index:
        scales = None
        if matmul.format.is_packed:
          scales = getattr(self, f"s_{matmul.name}").at[layer]
        packed = getattr(self, f"w_{matmul.name}").at[layer]
        return self.stream_weights(i, packed, matmul, scales)

      i = weights(i, s.qkv)
      i = self.stream_keys_and_values(i, layer)
      for matmul in (s.o, s.gate_up, s.down):
        i = weights(i, matmul)
      return i

    i = lax.fori_loop(0, self.num_layers, layer_stream, I32(0))
    of_head = self.s_lm_head if s.lm_head.format.is_packed else None
    i = self.stream_weights(i, self.w_lm_head, s.lm_head, of_head)

    # Every completion of a barrier must be awaited.
    def drain(barrier: Ref, num_chunks: int) -> None:
      def wait(j: Index) -> None:
        plgpu.barrier_wait(barrier.at[lax.rem(j, I32(plan.num_slots))])

      fori(jnp.maximum(i - num_chunks, 0), i, wait)

    if plan.in_flight < plan.num_slots:
      drain(self.produced, plan.in_flight)
    drain(self.consumed, plan.num_slots)

  def slot(self, i: Index) -> Index:
    """Returns the slot of the stream's chunk i."""
    return lax.rem(i, I32(self.plan.num_slots))

  def arrived(self, i: Index) -> Index:
    """Waits for the stream's chunk i and returns its slot."""
    slot = self.slot(i)
    # Both halves of the chunk have arrived.
    with self.span("ring_empty"):
      plgpu.barrier_wait(self.produced.at[slot])
    return slot

  def free(self, i: Index) -> None:
    """Gives the slot of the stream's chunk i back: it has been read."""
    slot = self.slot(i)
    plgpu.barrier_arrive(self.consumed.at[slot])
