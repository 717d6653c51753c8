"""The attention phase: one new token of a sequence against its cache.

An item is one KV head of one sequence, or a part of its keys. Keys are the
operand with 64 rows, the group's queries the one with 8; softmax is taken tile
by tile, with a running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867),
and parts are merged in their order (Dao et al. 2023, Flash-Decoding).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.exchange import Exchange
from pallas_kernels.geometry import TILE
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
from pallas_kernels.plan import ATTENTION, MASKED
from pallas_kernels.schedule import split_of
from pallas_kernels.stream import Stream

_WGMMA = plgpu.Layout.WGMMA


class AttentionPhase(Stream, Exchange):
  """Scores, softmax, values, and the new entries of the cache."""

  def patch(self, tile: Ref, row: Index, new: Ref) -> None:
    """Replaces one row of a `[64, 64]` tile in the ring; clears later ones."""
    layout = plgpu.Layout.SMEM_GMEM_COPY((TILE, TILE), BF16, 128)
    old = plgpu.load(tile, layout=layout, optimized=False)
    row_index = plgpu.broadcasted_iota(I32, (TILE, TILE), 0, layout=layout)
    new = plgpu.load(new, layout=layout.reduce(0), optimized=False)
    new = repeat_rows(new.astype(BF16), (TILE, TILE), layout)
    # What lies beyond may be anything, and even times 0 must not be NaN.
    new = jnp.where(row_index == row, new, jnp.zeros_like(new))
    tile[...] = jnp.where(row_index < row, old, new)

  def attention_item(self, item: Index, i: Index, layer: Index) -> Index:
    """Attends from one sequence's new token to a part of its keys.

    Returns:
      The stream's next index.
    """
    plan, h = self.plan, self.geometry.head_dim
    slots_per_tile = h // TILE
    b, head, split = self.item(item)
    position = self.positions[b]
    first, end, tiles, num_splits = split_of(position, split, plan.splits)

    @pl.when(first < end)
    def _() -> None:
      q = plgpu.load(
        self.qkv.at[b, pl.ds(head * self.geometry.group, 8)],
        layout=rows_layout(h),
        optimized=False,
      )
      self.q[...] = q.astype(BF16)
      plgpu.commit_smem()
      zero = plgpu.layout_cast(jnp.zeros((TILE, 8), F32), _WGMMA)
      state = lax.fori_loop(
        first,
        end,
        lambda t, state: self.attend_tile(
          i + (t - first) * slots_per_tile, t, b, head, state
        ),
        (zero + F32(MASKED), zero, *[zero] * slots_per_tile),
      )

      # The split with the last tile writes the new key and value: after that
      # tile has come, and before others may go on to the next layer's.
      @pl.when((end == tiles) & (self.active[b] > 0))
      def _() -> None:
        self.extend_cache(layer, b, head, position)

      # The last stores have been read from `state` and `narrow`.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for n, value in enumerate(state):
        mosaic.store(
          self.state.at[n].transpose((1, 0)),
          plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED),
        )

      @pl.when(split > 0)
      def _() -> None:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.state, self.parts.at[self.cta])
        self.join(ATTENTION, self.cta - split)

      @pl.when(split == 0)
      def _() -> None:
        @pl.when(num_splits > 1)
        def _() -> None:
          self.wait_joined(ATTENTION, (layer + 1) * (num_splits - 1))
          fori(0, num_splits - 1, self.merge)

        self.store_attended(b, head)
        self.publish(ATTENTION)

    return i + jnp.maximum(end - first, 0) * slots_per_tile

  def new_heads(self, head: Index) -> tuple[Index, Index]:
    """Returns where in `qkv` a KV head's new key and value are."""
    g = self.geometry
    key = g.num_attention_heads + head
    return key, key + g.num_key_value_heads

  def attend_tile(
    self,
    i: Index,
    t: Index,
    b: Index,
    head: Index,
    state: tuple[jax.Array, ...],
  ) -> tuple[jax.Array, ...]:
    """Takes in the 64 keys of tile t, which begin at index i of the stream.

    Args:
      i: index in the stream.
      t: tile.
      b: sequence.
      head: KV head.
      state: running maximum and sum of the weights, repeated in every row, and
        the weighted values so far, `[64, 8]` for each 64 of H.

    Returns:
      The next state.
    """
    g, plan = self.geometry, self.plan
    parts = range(g.head_dim // TILE)
    position = self.positions[b]
    k_slot = lax.rem(i, I32(plan.num_slots))
    if g.head_dim == TILE:
      v_slot = k_slot
      k_tiles = [self.ring.at[k_slot, pl.ds(0, TILE)]]
      v_tiles = [self.ring.at[k_slot, pl.ds(TILE, TILE)]]
    else:
      v_slot = lax.rem(i + 1, I32(plan.num_slots))
      k_tiles, v_tiles = (
        [self.ring.at[slot, pl.ds(n * TILE, TILE)] for n in parts]
        for slot in (k_slot, v_slot)
      )
    # The tile's keys and values have arrived.
    plgpu.barrier_wait(self.produced.at[k_slot])
    if g.head_dim != TILE:
      plgpu.barrier_wait(self.produced.at[v_slot])

    # The new token is not in the cache yet.
    @pl.when(t == position // TILE)
    def _() -> None:
      row = lax.rem(position, I32(TILE))
      for n in parts:
        for tile, source in zip(
          (k_tiles[n], v_tiles[n]), self.new_heads(head), strict=True
        ):
          self.patch(tile, row, self.qkv.at[b, source, pl.ds(n * TILE, TILE)])
      plgpu.commit_smem()

    def score(acc: Ref) -> jax.Array:
      for n in parts:
        q = self.q.at[:, pl.ds(n * TILE, TILE)]
        plgpu.wgmma(acc, k_tiles[n], q.transpose((1, 0)))
      plgpu.wgmma_wait(0)
      return acc[...]

    scores = pl.run_scoped(score, plgpu.ACC((TILE, 8), F32))
    scores = scores * F32(g.head_dim**-0.5)
    key = plgpu.broadcasted_iota(I32, (TILE, 8), 0, layout=_WGMMA)
    scores = jnp.where(key + t * TILE <= position, scores, F32(MASKED))
    most, total, *out = state
    new_most = jnp.maximum(
      most, repeat_rows(jnp.max(scores, axis=0), (TILE, 8), _WGMMA)
    )
    shrink = jnp.exp(most - new_most)
    weights = jnp.exp(scores - new_most)
    total = total * shrink + repeat_rows(
      jnp.sum(weights, axis=0), (TILE, 8), _WGMMA
    )
    mosaic.store(
      self.p.transpose((1, 0)),
      plgpu.layout_cast(weights.astype(BF16), plgpu.Layout.WGMMA_TRANSPOSED),
    )
    plgpu.commit_smem()

    def weigh(acc: Ref, v_tile: Ref) -> jax.Array:
      plgpu.wgmma(acc, v_tile.transpose((1, 0)), self.p.transpose((1, 0)))
      plgpu.wgmma_wait(0)
      return acc[...]

    for n in parts:
      weighted = pl.run_scoped(
        lambda acc, v_tile=v_tiles[n]: weigh(acc, v_tile),
        plgpu.ACC((TILE, 8), F32),
      )
      out[n] = out[n] * shrink + weighted
    # The slot may have been patched: what comes next by bulk load must not be
    # overtaken by that.
    plgpu.commit_smem()
    plgpu.barrier_arrive(self.consumed.at[k_slot])
    if g.head_dim != TILE:
      plgpu.barrier_arrive(self.consumed.at[v_slot])
    return (new_most, total, *out)

  def extend_cache(
    self, layer: Index, b: Index, head: Index, position: Index
  ) -> None:
    """Writes the new key and value of one KV head to the cache."""
    # The last ones have been read from `new`.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for j, source in enumerate(self.new_heads(head)):
      # Its first row is wanted.
      rows = plgpu.load(
        self.qkv.at[b, pl.ds(source, 8)],
        layout=rows_layout(self.geometry.head_dim),
        optimized=False,
      )
      mosaic.store(self.new.at[j], rows.astype(BF16))
    plgpu.commit_smem()
    for j, cache in enumerate((self.k_cache, self.v_cache)):
      plgpu.copy_smem_to_gmem(
        self.new.at[j, pl.ds(0, 1)],
        cache.at[layer, b, head, pl.ds(position, 1)],
      )

  def merge(self, j: Index) -> None:
    """Adds the part of the CTA j + 1 further on to `state`."""
    layout = rows_layout(TILE)
    ours, theirs = (
      [
        plgpu.load(x.at[n], layout=layout, optimized=False)
        for n in range(self.geometry.head_dim // TILE + 2)
      ]
      for x in (self.state, self.parts.at[self.cta + 1 + j])
    )
    most = jnp.maximum(ours[0], theirs[0])
    shrink_ours, shrink_theirs = (jnp.exp(x[0] - most) for x in (ours, theirs))
    mosaic.store(self.state.at[0], most)
    for n in range(1, len(ours)):
      mosaic.store(
        self.state.at[n], ours[n] * shrink_ours + theirs[n] * shrink_theirs
      )

  def store_attended(self, b: Index, head: Index) -> None:
    """Stores a KV head's result, a row of H for each query of its group."""
    g = self.geometry
    layout = rows_layout(TILE)
    parts = range(g.head_dim // TILE)
    total = plgpu.load(self.state.at[1], layout=layout, optimized=False)
    for n in parts:
      out = plgpu.load(self.state.at[2 + n], layout=layout, optimized=False)
      mosaic.store(self.narrow.at[n], (out / total).astype(BF16))
    plgpu.commit_smem()
    for n in parts:
      for query in range(g.group):
        col = (head * g.group + query) * g.head_dim + n * TILE
        plgpu.copy_smem_to_gmem(
          self.narrow.at[n, pl.ds(query, 1)],
          self.attended.at[pl.ds(b, 1), pl.ds(col, TILE)],
        )
