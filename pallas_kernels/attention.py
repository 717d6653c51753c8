"""The attention phase: one new token of a sequence against its cache.

An item is one KV head of one sequence, or a part of its keys. Keys are the
operand with 64 rows, the group's queries the one with 8; softmax is taken a
few tiles at a time, with a running maximum (Milakov and Gimelshein 2018, arXiv
1805.02867), and parts are merged in their order (Dao et al. 2023, Flash-Decoding).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fragments, mosaic, patching, words
from pallas_kernels.fragments import State
from pallas_kernels.geometry import CHUNK_ROWS, TILE
from pallas_kernels.layouts import (
  BF16,
  F32,
  I32,
  Index,
  Ref,
)
from pallas_kernels.plan import ATTENTION, MASKED
from pallas_kernels.schedule import split_of
from pallas_kernels.stream import Stream
from pallas_kernels.threads import ALONE

_WGMMA = plgpu.Layout.WGMMA


class AttentionPhase(Stream):
  """Scores, softmax, values, and the new entries of the cache."""

  def attention_item(
    self, item: Index, i: Index, layer: Index, stamp: Index
  ) -> Index:
    """Attends from one sequence's new token to a part of its keys.

    The first compute warpgroup does; others only count the stream.

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

    @pl.when((first < end) & (self.wg == 0))
    def _() -> None:
      with self.span("fill"):
        self.receive_new(b, head, stamp)
      zero = plgpu.layout_cast(jnp.zeros((TILE, 8), F32), _WGMMA)
      at_once = plan.tiles_at_once
      with self.span("multiply"):
        most, total, *out = lax.fori_loop(
          0,
          (end - first + at_once - 1) // at_once,
          lambda n, state: self.attend_tiles(
            i + n * (at_once * slots_per_tile),
            first + n * at_once,
            end,
            b,
            state,
          ),
          (zero + F32(MASKED), zero, *[zero] * slots_per_tile),
        )
        total = fragments.reduce_rows("add", total, self.tops)

      # The split with the last tile writes the new key and value: after that
      # tile has come, and before others may go on to the next layer's.
      @pl.when((end == tiles) & (self.active[b] > 0))
      def _() -> None:
        self.extend_cache(layer, b, head, position)

      first_word, row_words = plan.exchanges["parts"]

      @pl.when(split > 0)
      def _() -> None:
        fragments.send_part(
          self.words,
          first_word + item * row_words,
          stamp,
          (most, total, *out),
          plan.part,
        )

      @pl.when(split == 0)
      def _() -> None:
        with self.span("finish"):
          state = (most, total, *out)
          if plan.splits > 1:
            state = self.merge(item + 1, num_splits - 1, stamp, state)
          self.send_attended(b, head, stamp, state)

    return i + jnp.maximum(end - first, 0) * slots_per_tile

  def receive_new(self, b: Index, head: Index, stamp: Index) -> None:
    """Waits for the group's queries, and the new key and value."""
    # The last item's have been read from `new` on their way to the cache.
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
    # All have read the last item's queries.
    ALONE.meet()
    words.receive(ALONE, self.words, stamp, queries, new)
    # `wgmma` and bulk stores read what has been received.
    plgpu.commit_smem()

  def attend_tiles(
    self, i: Index, t: Index, end: Index, b: Index, state: State
  ) -> State:
    """Takes in the next tiles of 64 keys, as many as go at once.

    All scores are there before the weights of any key are, so that only one
    maximum goes from warp to warp. Where there are fewer tiles left, the last
    one takes the place of those that are missing, and its keys are masked there:
    no other slot of the ring is read, or waited for.

    Args:
      i: index in the stream.
      t: the first tile, which begins at index i.
      end: one after the last tile of this split.
      b: sequence.
      state: running maximum, the same in every row; for each thread the sum of
        its own keys' weights; and the weighted values so far, `[64, 8]` for each
        64 of H.

    Returns:
      The next state.
    """
    g, plan = self.geometry, self.plan
    blocks = range(g.head_dim // TILE)
    position = self.positions[b]
    left = end - t
    # Zero, but only here: where q and p are would else be computed before the
    # loop over layers, and held in registers all the while.
    origin = (position >> 30) * TILE
    slots, keys, values = [], [], []
    for n in range(plan.tiles_at_once):
      at = i + jnp.minimum(n, left - 1) * len(blocks)
      k_slot = lax.rem(at, I32(plan.num_slots))
      if g.head_dim == TILE:
        slots.append([k_slot])
        keys.append([self.ring.at[k_slot, pl.ds(0, TILE)]])
        values.append([self.ring.at[k_slot, pl.ds(TILE, TILE)]])
        continue
      slots.append([k_slot, lax.rem(at + 1, I32(plan.num_slots))])
      for tiles, slot in zip((keys, values), slots[-1], strict=True):
        tiles.append(
          [self.ring.at[slot, pl.ds(m * TILE, TILE)] for m in blocks]
        )

    # The tiles' keys and values have arrived.
    with self.span("ring_empty"):
      for n, tile_slots in enumerate(slots):

        @pl.when(n < left)
        def _(tile_slots: list[Index] = tile_slots) -> None:
          for slot in tile_slots:
            plgpu.barrier_wait(self.come(slot, 0))

    # The new token is not in the cache yet.
    newest = position // TILE
    ahead = newest - t

    @pl.when((newest < end) & (ahead < plan.tiles_at_once))
    def _() -> None:
      k_slot, v_slot = (
        lax.rem(i + ahead * len(blocks) + m, I32(plan.num_slots))
        for m in (0, len(blocks) - 1)
      )
      first_row = k_slot * CHUNK_ROWS
      patching.patch(
        self.ring,
        self.new,
        first_row,
        first_row + TILE if g.head_dim == TILE else v_slot * CHUNK_ROWS,
        lax.rem(position, I32(TILE)),
        head_dim=g.head_dim,
      )
      plgpu.commit_smem()

    # What was patched was committed before it was read, and so comes before the
    # slot's next load, too.
    def free(which: int) -> None:
      for n, tile_slots in enumerate(slots):

        @pl.when(n < left)
        def _(slot: Index = tile_slots[which]) -> None:
          plgpu.barrier_arrive(self.consumed.at[slot])

    def score(*accs: Ref) -> list[jax.Array]:
      for acc, tiles in zip(accs, keys, strict=True):
        for m in blocks:
          q = self.q.at[:, pl.ds(origin + m * TILE, TILE)]
          plgpu.wgmma(acc, tiles[m], q.transpose((1, 0)))
      plgpu.wgmma_wait(0)
      return [acc[...] for acc in accs]

    acc_type = plgpu.ACC((TILE, 8), F32)
    scores = pl.run_scoped(score, *[acc_type] * plan.tiles_at_once)
    if g.head_dim != TILE:
      # The keys have been read, and their slots hold nothing else.
      free(0)
    # Powers are of 2, which is what there is an instruction for.
    scale = F32(g.head_dim**-0.5 * math.log2(math.e))
    key = plgpu.broadcasted_iota(I32, (TILE, 8), 0, layout=_WGMMA) + t * TILE
    last = jnp.minimum(position, end * TILE - 1)
    scores = [
      jnp.where(key + n * TILE <= last, x * scale, F32(MASKED))
      for n, x in enumerate(scores)
    ]
    most, total, *out = state
    top = functools.reduce(jnp.maximum, scores)
    # The threads have met since the scratch was used, to commit weights or queries.
    new_most = jnp.maximum(most, fragments.reduce_rows("max", top, self.tops))
    shrink = jnp.exp2(most - new_most)
    total = total * shrink
    weights = [jnp.exp2(x - new_most) for x in scores]
    total = functools.reduce(jnp.add, weights, total)
    fragments.store_weights(weights, self.p)
    plgpu.commit_smem()

    def weigh(*accs: Ref) -> list[jax.Array]:
      for m, acc in enumerate(accs):
        for n, tiles in enumerate(values):
          p = self.p.at[:, pl.ds(origin + n * TILE, TILE)]
          plgpu.wgmma(acc, tiles[m].transpose((1, 0)), p.transpose((1, 0)))
      plgpu.wgmma_wait(0)
      return [acc[...] for acc in accs]

    weighted = pl.run_scoped(weigh, *[acc_type] * len(blocks))
    free(-1)
    out = [x * shrink + y for x, y in zip(out, weighted, strict=True)]
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

  def merge(
    self, item: Index, num_parts: Index, stamp: Index, state: State
  ) -> State:
    """Adds the next parts of the same head's keys, in their order.

    Args:
      item: the first part's.
      num_parts: how many.
      stamp: of this layer.
      state: of the keys before.

    Returns:
      The state of all of them.
    """
    first, row_words = self.plan.exchanges["parts"]
    return fragments.merge_parts(
      self.words,
      first + item * row_words,
      num_parts,
      stamp,
      state,
      self.plan.part,
    )

  def send_attended(
    self, b: Index, head: Index, stamp: Index, state: State
  ) -> None:
    """Sends a KV head's result, a row of H for each query of its group."""
    g = self.geometry
    first, row_words = self.plan.exchanges["attended"]
    _, total, *out = state
    for n, value in enumerate(out):
      mosaic.store(
        self.attended.at[:, pl.ds(n * TILE, TILE)].transpose((1, 0)),
        plgpu.layout_cast(
          (value / total).astype(BF16), plgpu.Layout.WGMMA_TRANSPOSED
        ),
      )
    words.send(
      ALONE,
      self.words,
      first + b * row_words + head * (g.group * g.head_dim // 4),
      self.attended,
      0,
      g.head_dim // 4,
      stamp,
      num_rows=g.group,
      target_stride=g.head_dim // 4,
    )
