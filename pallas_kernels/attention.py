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

from pallas_kernels import mosaic, words
from pallas_kernels.geometry import CHUNK_ROWS, TILE
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
from pallas_kernels.plan import ATTENTION, MASKED, PARTS_AT_ONCE
from pallas_kernels.schedule import split_of
from pallas_kernels.stream import Stream

_WGMMA = plgpu.Layout.WGMMA
_HALF = TILE // 2


class AttentionPhase(Stream):
  """Scores, softmax, values, and the new entries of the cache."""

  def attention_item(
    self, item: Index, i: Index, layer: Index, stamp: Index
  ) -> Index:
    """Attends from one sequence's new token to a part of its keys.

    Args:
      item: which sequence, KV head and part.
      i: index in the stream.
      layer: whose keys.
      stamp: of what it sends and receives.

    Returns:
      The stream's next index.
    """
    plan, h = self.plan, self.geometry.head_dim
    slots_per_tile = h // TILE
    b, head, split = self.item(item)
    position = self.positions[b]
    first, end, tiles, num_splits = split_of(position, split, plan.splits)

    self.phase = ATTENTION

    @pl.when(first < end)
    def _() -> None:
      with self.span("fill"):
        self.receive_new(b, head, stamp)
      zero = plgpu.layout_cast(jnp.zeros((TILE, 8), F32), _WGMMA)
      with self.span("multiply"):
        most, total, *out = lax.fori_loop(
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

      # Maximum and sum are the same in all rows: they share a tile.
      upper = plgpu.broadcasted_iota(I32, (TILE, 8), 0, layout=_WGMMA) < _HALF
      for n, value in enumerate((jnp.where(upper, most, total), *out)):
        mosaic.store(
          self.state.at[:, pl.ds(n * TILE, TILE)].transpose((1, 0)),
          plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED),
        )

      @pl.when(split > 0)
      def _() -> None:
        first_word, row_words = plan.exchanges["parts"]
        words.send(
          self.words,
          first_word + item * row_words,
          self.state,
          0,
          h + TILE,
          stamp,
          num_rows=self.geometry.group,
          target_stride=h + TILE,
        )

      @pl.when(split == 0)
      def _() -> None:
        with self.span("finish"):
          fori(
            0,
            (num_splits - 1 + PARTS_AT_ONCE - 1) // PARTS_AT_ONCE,
            lambda n: self.merge(
              item + 1 + n * PARTS_AT_ONCE,
              jnp.minimum(num_splits - 1 - n * PARTS_AT_ONCE, PARTS_AT_ONCE),
              stamp,
            ),
          )
          self.send_attended(b, head, stamp)

    return i + jnp.maximum(end - first, 0) * slots_per_tile

  def receive_new(self, b: Index, head: Index, stamp: Index) -> None:
    """Waits for the group's queries, and the new key and value."""
    # The last layer's have been read from `new` on their way to the cache.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    g = self.geometry
    first, row_words = self.plan.exchanges["qkv"]
    head_words = g.head_dim // 4
    row = first + b * row_words
    queries = words.Wanted(
      self.q,
      row + head * g.group * head_words,
      row_words=head_words,
      num_rows=g.group,
      tiled=True,
    )
    new = words.Wanted(
      self.new,
      row + (g.num_attention_heads + head) * head_words,
      row_words=head_words,
      num_rows=2,
      source_stride=g.num_key_value_heads * head_words,
    )
    words.receive(self.words, stamp, queries, new)
    # `wgmma` and bulk stores read what has been received.
    plgpu.commit_smem()

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
    with self.span("ring_empty"):
      plgpu.barrier_wait(self.produced.at[k_slot])
      if g.head_dim != TILE:
        plgpu.barrier_wait(self.produced.at[v_slot])

    # The new token is not in the cache yet.
    @pl.when(t == position // TILE)
    def _() -> None:
      first_row = k_slot * CHUNK_ROWS
      words.patch(
        self.ring,
        self.new,
        first_row,
        first_row + TILE if g.head_dim == TILE else v_slot * CHUNK_ROWS,
        lax.rem(position, I32(TILE)),
        head_dim=g.head_dim,
      )
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
    for j, cache in enumerate((self.k_cache, self.v_cache)):
      plgpu.copy_smem_to_gmem(
        self.new.at[pl.ds(j, 1)],
        cache.at[layer, b, head, pl.ds(position, 1)],
      )

  def merge(self, item: Index, num_parts: Index, stamp: Index) -> None:
    """Adds the next parts of the same head's keys to `state`, in their order."""
    first, row_words = self.plan.exchanges["parts"]
    group = self.geometry.group
    words.receive(
      self.words,
      stamp,
      words.Wanted(
        self.part,
        first + item * row_words,
        row_words=row_words // group,
        num_rows=PARTS_AT_ONCE * group,
        valid=num_parts * row_words,
      ),
    )

    def add(j: Index) -> None:
      # Rows after the group's are the next part's, and mean nothing here.
      part = self.part.at[pl.ds(j * group, 8)]
      ours, theirs = self.pieces(self.state), self.pieces(part)
      most = jnp.maximum(ours[0], theirs[0])
      shrink_ours, shrink_theirs = (
        jnp.exp(x[0] - most) for x in (ours, theirs)
      )
      merged = [
        x * shrink_ours + y * shrink_theirs
        for x, y in zip(ours[1:], theirs[1:], strict=True)
      ]
      for n, value in enumerate((most, *merged)):
        mosaic.store(self.state.at[:, pl.ds(n * _HALF, _HALF)], value)

    fori(0, num_parts, add)

  def pieces(self, state: Ref) -> list[jax.Array]:
    """Returns maximum, sum and weighted values, each `[8, 32]`, of a state."""
    return [
      plgpu.load(
        state.at[:, pl.ds(n * _HALF, _HALF)],
        layout=rows_layout(_HALF),
        optimized=False,
      )
      for n in range((self.geometry.head_dim + TILE) // _HALF)
    ]

  def send_attended(self, b: Index, head: Index, stamp: Index) -> None:
    """Sends a KV head's result, a row of H for each query of its group."""
    g = self.geometry
    first, row_words = self.plan.exchanges["attended"]
    _, total, *out = self.pieces(self.state)
    for n, value in enumerate(out):
      target = self.attended.at[:, pl.ds(n * _HALF, _HALF)]
      mosaic.store(target, (value / total).astype(BF16))
    words.send(
      self.words,
      first + b * row_words + head * (g.group * g.head_dim // 4),
      self.attended,
      0,
      g.head_dim // 4,
      stamp,
      num_rows=g.group,
      target_stride=g.head_dim // 4,
    )
