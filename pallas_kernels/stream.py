"""The stream of weights, keys and values through the ring of slots.

The memory warpgroup fills slots in the order in which they are used, across
phases and layers, bounded only by free slots. Of several compute warpgroups, each
takes every other unit of a group, and the first one takes keys and values.

A slot has for each compute warpgroup a barrier that says that its chunk has come:
who waits counts the completions, and so has to wait for each of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cta import CtaBase
from pallas_kernels.geometry import CHUNK_ROWS, TILE
from pallas_kernels.layouts import I32, Index, Ref, fori
from pallas_kernels.plan import ATTENTION, GROUP_UNITS, PHASE_OF
from pallas_kernels.schedule import Matmul, split_of


class Place(NamedTuple):
  """Where in the stream the memory warpgroup is.

  Attributes:
    i: index of the next chunk.
    users: which compute warpgroup takes the chunks before, a bit of each: that of
      chunk `i - 1 - n` in bit n.
    seen: how many chunks have been seen to come.
  """

  i: Index
  users: Index
  seen: Index

  def next(self, user: Index) -> "Place":
    """Returns the place after a chunk that `user` takes."""
    return Place(self.i + 1, (self.users << 1) | user, self.seen)

  def user(self, before: Index) -> Index:
    """Returns who takes the chunk so many before the next one."""
    return (self.users >> (before - 1)) & 1


class Stream(CtaBase):
  """Both ends of the ring."""

  def come(self, slot: Index, user: Index) -> Ref:
    """Returns the barrier of a slot's chunks that a compute warpgroup takes."""
    if self.plan.compute_wgs == 1:
      return self.produced.at[slot]
    return self.produced.at[user * self.plan.num_slots + slot]

  def acquire(self, place: Place, in_flight: Index) -> tuple[Index, Place]:
    """Waits until the stream's next chunk may be loaded.

    Args:
      place: where in the stream.
      in_flight: how many chunks may then be under way.

    Returns:
      Its slot, and the place with what has been seen to come.
    """
    i = place.i
    slot = self.slot(i)

    # A slot is free again once the warpgroup that took it has arrived for the
    # chunk that was in it before.
    @pl.when(i >= self.plan.num_slots)
    def _() -> None:
      with self.span("ring_full"):
        plgpu.barrier_wait(self.consumed.at[slot])

    # Nor are more chunks asked for than it takes to keep memory busy: what is
    # asked for later, by this CTA or another, waits behind them, and the words
    # that CTAs exchange are among it. Earlier chunks have arrived.
    # Nor may a slot be loaded again before that has been seen.
    in_flight = jnp.minimum(in_flight, self.plan.num_slots)
    too_many = i - place.seen >= in_flight

    @pl.when(too_many)
    def _() -> None:
      self.see(place, place.seen)

    return slot, place._replace(seen=place.seen + too_many.astype(I32))

  def see(self, place: Place, j: Index) -> None:
    """Waits until chunk j has come; it was loaded before `place`."""
    plgpu.barrier_wait(self.come(self.slot(j), place.user(place.i - j)))

  def load_halves(
    self,
    place: Place,
    upper: Ref,
    lower: Ref,
    user: Index,
    in_flight: Index,
    wanted: Index | None = None,
  ) -> Place:
    """Loads two `[64, 64]` into the next slot, or the first half of their rows.

    Args:
      place: where in the stream.
      upper: what the slot's first rows get.
      lower: what the others get.
      user: which compute warpgroup takes it.
      in_flight: see `acquire`.
      wanted: how many of the 64 rows are wanted at least; None for all.

    Returns:
      The next place.
    """
    slot, place = self.acquire(place, in_flight)
    half = CHUNK_ROWS // 2

    def load(num_rows: int) -> None:
      for j, source in enumerate((upper, lower)):
        plgpu.copy_gmem_to_smem(
          source.at[pl.ds(0, num_rows)],
          self.ring.at[slot, pl.ds(j * half, num_rows)],
          self.come(slot, user),
        )

    if wanted is None:
      load(half)
    else:
      pl.when(wanted <= half // 2)(lambda: load(half // 2))
      pl.when(wanted > half // 2)(lambda: load(half))
    return place.next(user)

  def load_codes(
    self,
    place: Place,
    codes: Ref,
    scales: Ref,
    user: Index,
    in_flight: Index,
  ) -> Place:
    """Loads codes and their scales into the next slot; returns the next place."""
    slot, place = self.acquire(place, in_flight)
    targets = (
      self.ring.at[slot, pl.ds(0, codes.shape[0])],
      self.scales.at[slot, pl.ds(0, scales.shape[0])],
    )
    for source, target in zip((codes, scales), targets, strict=True):
      plgpu.copy_gmem_to_smem(source, target, self.come(slot, user))
    return place.next(user)

  def stream_weights(
    self, place: Place, matmul: Matmul, layer: Index | None = None
  ) -> Place:
    """Streams this CTA's units of a matrix, as `MatmulPhases` does.

    Args:
      place: where in the stream.
      matmul: how it is dealt out.
      layer: whose matrix it is, or None if layers have none.

    Returns:
      The stream's next place.
    """
    plan = self.plan
    self.phase = PHASE_OF[matmul.name]
    _, count = self.runs[matmul.name]
    half, per_unit = CHUNK_ROWS // 2, matmul.chunks_per_unit
    begin = place.i
    per_block = plan.block_chunks(matmul)

    def operand(kind: str) -> Ref:
      ref = getattr(self, f"{kind}_{matmul.name}")
      return ref if layer is None else ref.at[layer]

    packed = operand("w")
    scales = operand("s") if matmul.format.is_packed else None

    def load(j: Index, place: Place) -> Place:
      # Groups begin with the first warpgroup's turn.
      user = lax.rem(j // per_unit, I32(plan.compute_wgs))
      in_flight = I32(plan.in_flight)
      if layer is None:
        # A chunk has been freed, so that its input has come, and there is no
        # other for anybody to wait for.
        in_flight = jnp.where(
          place.i - begin < plan.num_slots,
          in_flight,
          I32(plan.head_in_flight),
        )
      chunk = packed.at[self.cta, j]
      if scales is not None:
        return self.load_codes(
          place, chunk, scales.at[self.cta, j], user, in_flight
        )
      return self.load_halves(
        place,
        chunk.at[pl.ds(0, half)],
        chunk.at[pl.ds(half, half)],
        user,
        in_flight,
      )

    if plan.num_blocks(matmul) == 1:
      return lax.fori_loop(0, count * per_unit, load, place)

    def group(n: Index, place: Place) -> Place:
      first = n * GROUP_UNITS
      last = jnp.minimum(first + GROUP_UNITS, count)

      def block(m: Index, place: Place) -> Place:
        begin = m * per_block
        end = jnp.minimum(begin + per_block, per_unit)

        def unit(u: Index, place: Place) -> Place:
          at = u * per_unit
          return lax.fori_loop(at + begin, at + end, load, place)

        return lax.fori_loop(first, last, unit, place)

      return lax.fori_loop(0, plan.num_blocks(matmul), block, place)

    num_groups = (count + GROUP_UNITS - 1) // GROUP_UNITS
    return lax.fori_loop(0, num_groups, group, place)

  def stream_keys_and_values(self, place: Place, layer: Index) -> Place:
    """Streams the tiles of keys and values that this CTA attends to.

    A slot holds 64 keys and their values, or with wide heads one of both. Of the
    last tile, keys beyond the new one are masked and values there are cleared,
    whatever they are: half a tile is enough if that has all that come before.
    """
    g = self.geometry
    self.phase = ATTENTION

    def item_tiles(item: Index, place: Place) -> Place:
      b, head, split = self.item(item)
      position = self.positions[b]
      first, end, _, _ = split_of(position, split, self.plan.splits)

      def tile(t: Index, place: Place) -> Place:
        k, v = (
          cache.at[layer, b, head, pl.ds(t * TILE, TILE)]
          for cache in (self.k_cache, self.v_cache)
        )
        in_flight = self.plan.in_flight
        # Those of the tile that come before the new one.
        wanted = position - t * TILE
        if g.head_dim == TILE:
          return self.load_halves(place, k, v, 0, in_flight, wanted)
        for x in (k, v):
          left, right = (x.at[:, pl.ds(n * TILE, TILE)] for n in range(2))
          place = self.load_halves(place, left, right, 0, in_flight, wanted)
        return place

      return lax.fori_loop(first, jnp.maximum(first, end), tile, place)

    return self.for_items(item_tiles, place)

  def produce(self) -> None:
    """Streams everything that the step reads, in the order of its use."""
    plan, s = self.plan, self.plan.schedule

    def layer_stream(layer: Index, place: Place) -> Place:
      place = self.stream_weights(place, s.qkv, layer)
      place = self.stream_keys_and_values(place, layer)
      for matmul in (s.o, s.gate_up, s.down):
        place = self.stream_weights(place, matmul, layer)
      return place

    place = lax.fori_loop(
      0, self.num_layers, layer_stream, Place(I32(0), I32(0), I32(0))
    )
    place = self.stream_weights(place, s.lm_head)
    i = place.i

    def consumed(j: Index) -> None:
      plgpu.barrier_wait(self.consumed.at[self.slot(j)])

    # Every completion of a barrier must be awaited.
    fori(place.seen, i, lambda j: self.see(place, j))
    fori(jnp.maximum(i - plan.num_slots, 0), i, consumed)

  def slot(self, i: Index) -> Index:
    """Returns the slot of the stream's chunk i."""
    return lax.rem(i, I32(self.plan.num_slots))

  def arrived(self, i: Index) -> Index:
    """Waits for the stream's chunk i, this warpgroup's; returns its slot."""
    slot = self.slot(i)
    # Both halves of the chunk have arrived.
    with self.span("ring_empty"):
      plgpu.barrier_wait(self.come(slot, self.wg))
    return slot

  def free(self, i: Index) -> None:
    """Gives the slot of the stream's chunk i back: it has been read."""
    slot = self.slot(i)
    plgpu.barrier_arrive(self.consumed.at[slot])
