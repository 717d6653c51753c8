"""The decode step as one persistent kernel.

One CTA per SM, two warpgroups each. The memory warpgroup streams this CTA's
chunks of every matrix, and the keys and values it attends to, into a ring of
shared-memory slots; it runs ahead of everything, bounded only by free slots.
The compute warpgroup follows the same order and multiplies.

CTAs exchange activations through device memory: a tile of results is written by
a bulk store, the store is waited for, and a counter moves; readers wait for the
counter and read with ordinary loads. Nothing that is read by a bulk load is
written in the same launch before it, except by a bulk store.

Axis letters: L layers, B batch, D width, N query heads, K KV heads, G = N / K,
H head size, F MLP width, V vocabulary, S cache slots, P CTAs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.geometry import CHUNK_COLS, CHUNK_ROWS, TILE
from pallas_kernels.plan import (
  ATTENTION,
  CANDIDATE,
  DOWN,
  EMBED,
  GATE_UP,
  LM_HEAD,
  O_PROJ,
  QKV,
  Plan,
  operand_shapes,
)
from pallas_kernels.schedule import split_of

_F32, _BF16, _I32 = jnp.float32, jnp.bfloat16, jnp.int32
_HALF = TILE // 2
_MASKED = -1e30

_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _rows_layout(cols: int) -> Any:
  """Layout of `[8, cols]` arrays: two rows per warp, 16 lanes across one.

  Half a warp then covers 128 bytes of a bfloat16 row, which no two lanes of a
  swizzled store conflict in.
  """
  width = min(cols, TILE)
  return plgpu.Layout.TILED(
    plgpu.Tiling(((8, width), (2, width), (width // 16,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
  )


def _repeat_rows(row: jax.Array, shape: tuple[int, int], layout: Any) -> Any:
  return plgpu.layout_cast(lax.broadcast_in_dim(row, shape, (1,)), layout)


def _fori(lower: Any, upper: Any, body: Callable[[Any], None]) -> None:
  def step(i: jax.Array, _: None) -> None:
    body(i)

  lax.fori_loop(lower, upper, step, None)


class _Cta:
  """One CTA's part of the step."""

  def __init__(self, plan: Plan, refs: dict[str, Any]):
    self.plan = plan
    self.geometry = plan.geometry
    self.__dict__.update(refs)
    self.cta = lax.axis_index("cta")
    self.published = pl.get_global(plgpu.SemaphoreType.REGULAR((7,)))
    self.joined = pl.get_global(
      plgpu.SemaphoreType.REGULAR((7 * plan.num_ctas,))
    )
    # The scalar prefetch: all that steers the stream, read once.
    self.runs = {}
    for i, matmul in enumerate(plan.schedule.matmuls):
      self.runs[matmul.name] = tuple(
        self.table[self.cta, i, j] for j in range(3)
      )

  # ---- the weight stream -------------------------------------------------

  def acquire(self, i):
    slot = lax.rem(i, _I32(self.plan.num_slots))

    # A slot is free again once the compute warpgroup has arrived for the
    # chunk that was in it before.
    @pl.when(i >= self.plan.num_slots)
    def _():
      plgpu.barrier_wait(self.consumed.at[slot])

    return slot

  def load_halves(self, i, upper, lower):
    slot = self.acquire(i)
    half = CHUNK_ROWS // 2
    for j, source in enumerate((upper, lower)):
      plgpu.copy_gmem_to_smem(
        source,
        self.ring.at[slot, pl.ds(j * half, half)],
        self.produced.at[slot],
      )
    return i + 1

  def stream_weights(self, i, packed, matmul):
    _, count, _ = self.runs[matmul.name]
    half = CHUNK_ROWS // 2

    def step(j, i):
      chunk = packed.at[self.cta, j]
      return self.load_halves(
        i, chunk.at[pl.ds(0, half)], chunk.at[pl.ds(half, half)]
      )

    return lax.fori_loop(0, count, step, i)

  def stream_keys_and_values(self, i, layer):
    g = self.geometry

    def item_tiles(item, i):
      b, head, split = self.item(item)
      first, end, _, _ = split_of(self.positions[b], split, self.plan.splits)

      def tile(t, i):
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

  def produce(self):
    plan, s = self.plan, self.plan.schedule

    def layer_stream(layer, i):
      i = self.stream_weights(i, self.w_qkv.at[layer], s.qkv)
      i = self.stream_keys_and_values(i, layer)
      i = self.stream_weights(i, self.w_o.at[layer], s.o)
      i = self.stream_weights(i, self.w_gate_up.at[layer], s.gate_up)
      return self.stream_weights(i, self.w_down.at[layer], s.down)

    i = lax.fori_loop(0, self.num_layers, layer_stream, _I32(0))
    i = self.stream_weights(i, self.w_lm_head, s.lm_head)

    # Every completion of a barrier must be awaited.
    def drain(j):
      plgpu.barrier_wait(self.consumed.at[lax.rem(j, _I32(plan.num_slots))])

    _fori(jnp.maximum(i - plan.num_slots, 0), i, drain)

  def consume(self, i, use):
    slot = lax.rem(i, _I32(self.plan.num_slots))
    # Both halves of the chunk have arrived.
    plgpu.barrier_wait(self.produced.at[slot])
    use(self.ring.at[slot])
    plgpu.barrier_arrive(self.consumed.at[slot])
    return i + 1

  # ---- exchange ----------------------------------------------------------

  def wait_published(self, phase, count):
    # All CTAs that publish this phase have stored their results.
    plgpu.semaphore_wait(
      self.published.at[phase], count, decrement=False, memory_scope="gpu"
    )

  def signal(self, semaphore):
    """Adds 1 for all to see, after everything that this CTA has stored.

    The wait makes the stores visible to the thread that issued them, and no
    more than that: without the release, a counter was seen to move before the
    data (bench/LOG.md).
    """
    plgpu.wait_smem_to_gmem(0)
    plgpu.semaphore_signal(semaphore, memory_scope="gpu")

  def publish(self, phase):
    self.signal(self.published.at[phase])

  def join(self, phase, owner):
    self.signal(self.joined.at[phase * self.plan.num_ctas + owner])

  def wait_joined(self, phase, count):
    plgpu.semaphore_wait(
      self.joined.at[phase * self.plan.num_ctas + self.cta],
      count,
      decrement=False,
      memory_scope="gpu",
    )

  def store_tile(self, value, target):
    """Stores a `[8, 64]` array to `[B, 64]` in device memory."""
    self.staging.at[0][...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      self.staging.at[0, pl.ds(0, self.plan.batch)], target
    )

  def store_halves(self, buffer, values, targets):
    """Stores `[8, 32]` arrays to `[B, 32]` in device memory."""
    for j, value in enumerate(values):
      buffer.at[j][...] = value
    plgpu.commit_smem()
    for j, target in enumerate(targets):
      plgpu.copy_smem_to_gmem(buffer.at[j, pl.ds(0, self.plan.batch)], target)

  # ---- activations -------------------------------------------------------

  def load_rows(self, source, start, cols):
    """Loads `[8, cols]`; sequences beyond the batch are meaningless."""
    layout = _rows_layout(cols)
    if self.plan.batch == 1:
      return self.repeat(source.at[0, pl.ds(start, cols)], cols)
    return plgpu.load(
      source.at[:, pl.ds(start, cols)], layout=layout, optimized=False
    )

  def repeat(self, row, cols):
    """Loads `[cols]` and repeats it as `[8, cols]`."""
    layout = _rows_layout(cols)
    row = plgpu.load(row, layout=layout.reduce(0), optimized=False)
    return _repeat_rows(row, (8, cols), layout)

  def load_row(self, source, width):
    """Loads `[width]` with all of the warpgroup side by side."""
    per_thread = width // 128
    vector = math.gcd(16 // source.dtype.itemsize, per_thread)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)
    return plgpu.load(source, layout=layout, optimized=False)

  def inverse_rms(self, row):
    """Returns a float32 scalar for `[D]`."""
    g = self.geometry
    mean = jnp.sum(row * row) * _F32(1 / g.hidden_size)
    return lax.rsqrt(mean + _F32(g.rms_norm_eps))

  def piece(self, width, most):
    """Returns into pieces of how many columns to cut; never the whole width.

    Layout inference would confuse that one with the rows of `load_row`.
    """
    return math.gcd(most, width // 2)

  def fill_from_row(self, row, width):
    """Writes one sequence's activations as all eight rows of x.

    By way of a plain row in shared memory: each is then read from device memory
    once and not by every thread that writes one of its eight copies.
    """
    self.row.at[pl.ds(0, width)][...] = row.astype(_BF16)
    plgpu.commit_smem()
    piece = self.piece(width, 1024)
    for start in range(0, width, piece):
      self.x.at[:, pl.ds(start, piece)][...] = self.repeat(
        self.row.at[pl.ds(start, piece)], piece
      )
    plgpu.commit_smem()

  def fill_normed(self, x, norm):
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
    layout = _rows_layout(piece)

    def fill(j):
      start = j * piece
      rows = self.load_rows(x, start, piece)
      gain = self.repeat(norm.at[pl.ds(start, piece)], piece)
      row = plgpu.broadcasted_iota(_I32, (8, piece), 0, layout=layout)
      scale = jnp.full((8, piece), scales[0], _F32)
      for b in range(1, self.plan.batch):
        scale = jnp.where(row == b, scales[b], scale)
      y = rows * scale * gain
      self.x.at[:, pl.ds(start, piece)][...] = y.astype(_BF16)

    _fori(0, width // piece, fill)
    plgpu.commit_smem()

  def fill_plain(self, source, start, width, valid):
    """Writes `width` columns of activations from column `start` on.

    Args:
      source: `[8, cols]` bfloat16.
      start: int32 scalar.
      width: static; may reach beyond what is used.
      valid: columns from here on were never written, or None.
    """

    def masked(x, axis, offset, layout):
      if valid is None:
        return x
      col = plgpu.broadcasted_iota(_I32, x.shape, axis, layout=layout)
      # Times their weights, which are 0, they must not be NaN.
      return jnp.where(col + (start + offset) < valid, x, jnp.zeros((), _BF16))

    if self.plan.batch == 1:
      row = self.load_row(source.at[0, pl.ds(start, width)], width)
      layout = plgpu.Layout.WG_STRIDED(
        (width,), vec_size=math.gcd(8, width // 128)
      )
      self.fill_from_row(masked(row, 0, 0, layout), width)
      return
    piece = self.piece(width, 1024)
    layout = _rows_layout(piece)

    def fill(j):
      rows = self.load_rows(source, start + j * piece, piece)
      self.x.at[:, pl.ds(j * piece, piece)][...] = masked(
        rows, 1, j * piece, layout
      )

    _fori(0, width // piece, fill)
    plgpu.commit_smem()

  # ---- matrix phases -----------------------------------------------------

  def matmul(self, i, matmul, phase, epoch, fill, fill_block, finish):
    """Runs this CTA's run of a matrix.

    Returns the stream's next index.
    """
    first, count, joins = self.runs[matmul.name]
    per_tile = matmul.chunks_per_tile
    end = first + count

    @pl.when(count > 0)
    def _():
      if fill is not None:
        fill()

      def tile(t):
        begin = jnp.maximum(first, t * per_tile)
        stop = jnp.minimum(end, (t + 1) * per_tile)

        def accumulate(acc):
          def step(j, x_chunk):
            def use(chunk):
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
            _fori(begin, stop, lambda j: step(j, j - t * per_tile))
          else:
            most = self.plan.block_chunks(matmul)

            def block(n):
              lower = begin + n * most
              upper = jnp.minimum(stop, lower + most)
              fill_block((lower - t * per_tile) * CHUNK_COLS, most * CHUNK_COLS)
              _fori(lower, upper, lambda j: step(j, j - lower))

            _fori(0, (stop - begin + most - 1) // most, block)
          return acc[...]

        sums = pl.run_scoped(accumulate, plgpu.ACC((TILE, 8), _F32))
        # The last stores have been read from the staging buffers.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.sums.transpose((1, 0))[...] = plgpu.layout_cast(
          sums, plgpu.Layout.WGMMA_TRANSPOSED
        )
        owned = begin == t * per_tile

        @pl.when(jnp.logical_not(owned))
        def _():
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(
            self.sums.at[pl.ds(0, self.plan.batch)],
            self.partial.at[self.cta, pl.ds(0, self.plan.batch)],
          )
          self.join(phase, (t * per_tile) // matmul.run)

        @pl.when(owned)
        def _():
          @pl.when(stop < (t + 1) * per_tile)
          def _():
            self.wait_joined(phase, epoch * joins)

            def add(j):
              layout = _rows_layout(TILE)
              self.sums[...] = plgpu.load(
                self.sums, layout=layout, optimized=False
              ) + self.load_rows(self.partial.at[self.cta + 1 + j], 0, TILE)

            _fori(0, joins, add)

          finish(t)

      _fori(first // per_tile, (end + per_tile - 1) // per_tile, tile)

      # `choose` publishes for the LM head.
      if phase != LM_HEAD:
        owner = (first + per_tile - 1) // per_tile * per_tile < end

        @pl.when(owner)
        def _():
          self.publish(phase)

    return i + count

  def result(self):
    return plgpu.load(self.sums, layout=_rows_layout(TILE), optimized=False)

  def result_halves(self):
    return (
      plgpu.load(
        self.sums.at[:, pl.ds(j * _HALF, _HALF)],
        layout=_rows_layout(_HALF),
        optimized=False,
      )
      for j in range(2)
    )

  def finish_qkv(self, t):
    g = self.geometry
    blocks = g.head_dim // TILE
    head, block = t // blocks, lax.rem(t, _I32(blocks))
    rotated = head < g.num_attention_heads + g.num_key_value_heads
    a, b = self.result_halves()
    cos, sin = (
      plgpu.load(
        x.at[:, pl.ds(block * _HALF, _HALF)],
        layout=_rows_layout(_HALF),
        optimized=False,
      )
      for x in (self.cos, self.sin)
    )
    # Values are turned by the angle 0.
    turn = jnp.where(rotated, _F32(1), _F32(0))
    cos, sin = cos * turn + (1 - turn), sin * turn
    targets = [
      self.qkv.at[
        pl.ds(0, self.plan.batch),
        head,
        pl.ds(j * (g.head_dim // 2) + block * _HALF, _HALF),
      ]
      for j in range(2)
    ]
    self.store_halves(self.halves, (a * cos - b * sin, b * cos + a * sin), targets)

  def finish_residual(self, source, target, t):
    x = self.load_rows(source, t * TILE, TILE)
    self.store_tile(
      self.result() + x,
      target.at[pl.ds(0, self.plan.batch), pl.ds(t * TILE, TILE)],
    )

  def finish_gate_up(self, t):
    gate, up = self.result_halves()
    target = self.hidden.at[pl.ds(0, self.plan.batch), pl.ds(t * _HALF, _HALF)]
    y = gate * (1 / (1 + jnp.exp(-gate))) * up
    self.store_halves(self.narrow_half, [y.astype(_BF16)], [target])

  def finish_lm_head(self, t):
    y = self.result()
    self.store_tile(
      y, self.logits.at[pl.ds(0, self.plan.batch), pl.ds(t * TILE, TILE)]
    )
    layout = _rows_layout(TILE)
    index = (
      plgpu.broadcasted_iota(_I32, (8, TILE), 1, layout=layout) + t * TILE
    )
    y = jnp.where(index < self.geometry.vocab_size, y, _F32(-jnp.inf))
    best = plgpu.load(self.best, layout=layout, optimized=False)
    best_index = plgpu.load(self.best_index, layout=layout, optimized=False)
    # Tiles come in ascending order: the first of equals stays.
    better = y > best
    self.best[...] = jnp.where(better, y, best)
    self.best_index[...] = jnp.where(better, index, best_index)

  # ---- attention ---------------------------------------------------------

  def item(self, item):
    """Returns batch index, KV head and split of an item of attention."""
    heads = self.geometry.num_key_value_heads
    splits = self.plan.splits
    return (
      item // (splits * heads),
      lax.rem(item // splits, _I32(heads)),
      lax.rem(item, _I32(splits)),
    )

  def for_items(self, body, carry):
    """Folds `body` over this CTA's items of attention."""
    plan = self.plan
    mine = (plan.num_items - self.cta + plan.num_ctas - 1) // plan.num_ctas

    def step(j, carry):
      return body(self.cta + j * plan.num_ctas, carry)

    return lax.fori_loop(0, mine, step, carry)

  def patch(self, tile, row, new):
    """Replaces one row of a `[64, 64]` tile in the ring; clears later ones."""
    layout = plgpu.Layout.SMEM_GMEM_COPY((TILE, TILE), _BF16, 128)
    old = plgpu.load(tile, layout=layout, optimized=False)
    row_index = plgpu.broadcasted_iota(_I32, (TILE, TILE), 0, layout=layout)
    new = plgpu.load(new, layout=layout.reduce(0), optimized=False)
    new = _repeat_rows(new.astype(_BF16), (TILE, TILE), layout)
    tile[...] = jnp.where(row_index == row, new, old)

  def attention_item(self, item, i, layer):
    g, plan = self.geometry, self.plan
    h = g.head_dim
    halves = h // TILE
    b, head, split = self.item(item)
    position = self.positions[b]
    first, end, tiles, num_splits = split_of(position, split, plan.splits)
    key_head = g.num_attention_heads + head
    value_head = key_head + g.num_key_value_heads

    @pl.when(first < end)
    def _():
      q = plgpu.load(
        self.qkv.at[b, pl.ds(head * g.group, 8)],
        layout=_rows_layout(h),
        optimized=False,
      )
      self.q[...] = q.astype(_BF16)
      plgpu.commit_smem()
      # The split with the last tile writes the new key and value.
      @pl.when((end == tiles) & (self.active[b] > 0))
      def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for j, source in enumerate((key_head, value_head)):
          new = plgpu.load(
            self.qkv.at[b, pl.ds(source, 8)],
            layout=_rows_layout(h),
            optimized=False,
          )
          self.new.at[j][...] = new.astype(_BF16)
        plgpu.commit_smem()
        for j, cache in enumerate((self.k_cache, self.v_cache)):
          plgpu.copy_smem_to_gmem(
            self.new.at[j, pl.ds(0, 1)],
            cache.at[layer, b, head, pl.ds(position, 1)],
          )

      wgmma_layout = plgpu.Layout.WGMMA

      def step(t, carry):
        m, l, *out = carry
        j = i + (t - first) * halves
        k_slot = lax.rem(j, _I32(plan.num_slots))
        v_slot = lax.rem(j + halves - 1, _I32(plan.num_slots))
        k_tiles = [
          self.ring.at[k_slot, pl.ds(n * TILE, TILE)] for n in range(halves)
        ]
        v_tiles = [
          self.ring.at[v_slot, pl.ds((n + 2 - halves) % 2 * TILE, TILE)]
          if halves == 1
          else self.ring.at[v_slot, pl.ds(n * TILE, TILE)]
          for n in range(halves)
        ]
        plgpu.barrier_wait(self.produced.at[k_slot])
        if halves == 2:
          plgpu.barrier_wait(self.produced.at[v_slot])

        # The new token is not in the cache yet.
        @pl.when(t == tiles - 1)
        def _():
          row = lax.rem(position, _I32(TILE))
          for n in range(halves):
            for tile, source in ((k_tiles[n], key_head), (v_tiles[n], value_head)):
              self.patch(
                tile, row, self.qkv.at[b, source, pl.ds(n * TILE, TILE)]
              )
          plgpu.commit_smem()

        def scores(acc):
          for n in range(halves):
            plgpu.wgmma(
              acc,
              k_tiles[n],
              self.q.at[:, pl.ds(n * TILE, TILE)].transpose((1, 0)),
            )
          plgpu.wgmma_wait(0)
          return acc[...]

        s = pl.run_scoped(scores, plgpu.ACC((TILE, 8), _F32))
        s = s * _F32(h**-0.5)
        key = plgpu.broadcasted_iota(
          _I32, (TILE, 8), 0, layout=wgmma_layout
        )
        s = jnp.where(key + t * TILE <= position, s, _F32(_MASKED))
        m_tile = _repeat_rows(jnp.max(s, axis=0), (TILE, 8), wgmma_layout)
        m_new = jnp.maximum(m, m_tile)
        alpha = jnp.exp(m - m_new)
        p = jnp.exp(s - m_new)
        l_tile = _repeat_rows(jnp.sum(p, axis=0), (TILE, 8), wgmma_layout)
        self.p.transpose((1, 0))[...] = plgpu.layout_cast(
          p.astype(_BF16), plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        new_out = []
        for n in range(halves):

          def weigh(acc, n=n):
            plgpu.wgmma(
              acc, v_tiles[n].transpose((1, 0)), self.p.transpose((1, 0))
            )
            plgpu.wgmma_wait(0)
            return acc[...]

          pv = pl.run_scoped(weigh, plgpu.ACC((TILE, 8), _F32))
          new_out.append(out[n] * alpha + pv)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.consumed.at[k_slot])
        if halves == 2:
          plgpu.barrier_arrive(self.consumed.at[v_slot])
        return (m_new, l * alpha + l_tile, *new_out)

      zero = plgpu.layout_cast(jnp.zeros((TILE, 8), _F32), wgmma_layout)
      m, l, *out = lax.fori_loop(
        first, end, step, (zero + _F32(_MASKED), zero, *[zero] * halves)
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for n, value in enumerate((*out, m, l)):
        self.state.at[n].transpose((1, 0))[...] = plgpu.layout_cast(
          value, plgpu.Layout.WGMMA_TRANSPOSED
        )

      @pl.when(split > 0)
      def _():
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.state, self.parts.at[self.cta])
        self.join(ATTENTION, self.cta - split)

      @pl.when(split == 0)
      def _():
        layout = _rows_layout(TILE)

        @pl.when(num_splits > 1)
        def _():
          self.wait_joined(ATTENTION, (layer + 1) * (num_splits - 1))

          def merge(j):
            ours, theirs = (
              [
                plgpu.load(x.at[n], layout=layout, optimized=False)
                for n in range(halves + 2)
              ]
              for x in (self.state, self.parts.at[self.cta + 1 + j])
            )
            m = jnp.maximum(ours[halves], theirs[halves])
            alpha = jnp.exp(ours[halves] - m)
            beta = jnp.exp(theirs[halves] - m)
            for n in range(halves + 2):
              if n == halves:
                self.state.at[n][...] = m
              else:
                self.state.at[n][...] = ours[n] * alpha + theirs[n] * beta

          _fori(0, num_splits - 1, merge)

        l = plgpu.load(
          self.state.at[halves + 1], layout=layout, optimized=False
        )
        for n in range(halves):
          out = plgpu.load(self.state.at[n], layout=layout, optimized=False)
          self.narrow.at[n][...] = (out / l).astype(_BF16)
        plgpu.commit_smem()
        for n in range(halves):
          for query in range(g.group):
            plgpu.copy_smem_to_gmem(
              self.narrow.at[n, pl.ds(query, 1)],
              self.attended.at[
                pl.ds(b, 1),
                pl.ds((head * g.group + query) * h + n * TILE, TILE),
              ],
            )
        self.publish(ATTENTION)

    return i + jnp.maximum(end - first, 0) * halves

  # ---- the step ----------------------------------------------------------

  def embed(self):
    g, plan = self.geometry, self.plan
    per_row = g.padded_hidden_size // CHUNK_COLS
    num = plan.batch * per_row
    lm_head = plan.schedule.lm_head
    half = CHUNK_ROWS // 2

    def item(j):
      index = self.cta + j * plan.num_ctas
      b, k = index // per_row, lax.rem(index, _I32(per_row))
      token = self.token_ids[b]
      chunk = token // TILE * per_row + k
      source = self.embedding.at[
        chunk // lm_head.run, lax.rem(chunk, _I32(lm_head.run))
      ]
      for n in range(2):
        plgpu.copy_gmem_to_smem(
          source.at[n * half + lax.rem(token, _I32(TILE))],
          self.embedded.at[pl.ds(n * half, half)],
          self.embedded_produced,
        )
      plgpu.barrier_wait(self.embedded_produced)
      row = plgpu.load(
        self.embedded,
        layout=plgpu.Layout.WG_STRIDED((CHUNK_COLS,), vec_size=1),
        optimized=False,
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      self.embedded_f32[...] = row.astype(_F32)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        self.embedded_f32,
        self.residual.at[0, b, pl.ds(k * CHUNK_COLS, CHUNK_COLS)],
      )
      self.publish(EMBED)

    _fori(0, (num - self.cta + plan.num_ctas - 1) // plan.num_ctas, item)
    return num

  def compute(self):
    g, plan, s = self.geometry, self.plan, self.plan.schedule
    x_in, x_mid = self.residual.at[0], self.residual.at[1]
    num_embedded = self.embed()

    def input_ready(layer):
      begins = layer == 0
      self.wait_published(
        jnp.where(begins, EMBED, DOWN),
        jnp.where(begins, num_embedded, layer * s.down.num_owners),
      )

    def layer_step(layer, i):
      epoch = layer + 1

      def fill_qkv():
        input_ready(layer)
        self.fill_normed(x_in, self.norms.at[2 * layer])

      i = self.matmul(i, s.qkv, QKV, epoch, fill_qkv, None, self.finish_qkv)

      def attend(item, i):
        self.wait_published(QKV, epoch * s.qkv.num_owners)
        return self.attention_item(item, i, layer)

      i = self.for_items(attend, i)

      def wait_attention():
        num = plan.batch * g.num_key_value_heads
        self.wait_published(ATTENTION, epoch * num)

      attention_size = g.num_attention_heads * g.head_dim
      padded = attention_size != g.padded_attention_size

      def fill_o(start, width):
        self.fill_plain(
          self.attended, start, width, attention_size if padded else None
        )

      i = self.matmul(
        i,
        s.o,
        O_PROJ,
        epoch,
        wait_attention,
        fill_o,
        functools.partial(self.finish_residual, x_in, x_mid),
      )

      def fill_gate_up():
        self.wait_published(O_PROJ, epoch * s.o.num_owners)
        self.fill_normed(x_mid, self.norms.at[2 * layer + 1])

      i = self.matmul(
        i, s.gate_up, GATE_UP, epoch, fill_gate_up, None, self.finish_gate_up
      )

      def wait_hidden():
        self.wait_published(GATE_UP, epoch * s.gate_up.num_owners)

      def fill_down(start, width):
        self.fill_plain(self.hidden, start, width, None)

      return self.matmul(
        i,
        s.down,
        DOWN,
        epoch,
        wait_hidden,
        fill_down,
        functools.partial(self.finish_residual, x_mid, x_in),
      )

    i = lax.fori_loop(0, self.num_layers, layer_step, _I32(0))

    layout = _rows_layout(TILE)
    self.best[...] = plgpu.layout_cast(
      jnp.full((8, TILE), -jnp.inf, _F32), layout
    )
    self.best_index[...] = plgpu.layout_cast(
      jnp.full((8, TILE), g.vocab_size, _I32), layout
    )

    def fill_lm_head():
      input_ready(self.num_layers)
      self.fill_normed(x_in, self.norms.at[2 * self.num_layers])

    self.matmul(
      i, s.lm_head, LM_HEAD, 1, fill_lm_head, None, self.finish_lm_head
    )
    self.choose()

  def choose(self):
    """Takes the largest logit, the first of equals."""
    g, plan = self.geometry, self.plan
    layout = _rows_layout(TILE)

    def spread(column: jax.Array) -> jax.Array:
      return plgpu.layout_cast(
        lax.broadcast_in_dim(column, (8, TILE), (0,)), layout
      )

    best, index = (
      plgpu.load(x, layout=layout, optimized=False)
      for x in (self.best, self.best_index)
    )
    top = spread(jnp.max(best, axis=1))
    none = _I32(g.padded_vocab_size)
    top_index = spread(jnp.min(jnp.where(best == top, index, none), axis=1))
    # The last logits have been read from the staging buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for j, value in enumerate((top, top_index.astype(_F32))):
      self.staging.at[j][...] = value
    plgpu.commit_smem()
    for j in range(2):
      for b in range(plan.batch):
        plgpu.copy_smem_to_gmem(
          self.staging.at[j, pl.ds(b, 1), pl.ds(0, CANDIDATE)],
          self.candidates.at[
            j, pl.ds(b, 1), pl.ds(self.cta * CANDIDATE, CANDIDATE)
          ],
        )
    self.publish(LM_HEAD)

    @pl.when(self.cta == 0)
    def _():
      self.wait_published(LM_HEAD, plan.num_ctas)
      width = plan.candidate_cols
      strided = plgpu.Layout.WG_STRIDED((width,), vec_size=1)
      real = (
        plgpu.broadcasted_iota(_I32, (width,), 0, layout=strided)
        < plan.num_ctas * CANDIDATE
      )
      for b in range(plan.batch):
        logit, index = (
          plgpu.load(self.candidates.at[j, b], layout=strided, optimized=False)
          for j in range(2)
        )
        logit = jnp.where(real, logit, _F32(-jnp.inf))
        top = jnp.max(logit)
        first = jnp.min(jnp.where(logit == top, index, _F32(g.vocab_size - 1)))
        self.next_ids[b] = first.astype(_I32)


def make_step(
  plan: Plan,
  *,
  interpret: Any = None,
  as_cluster: bool = False,
  cta_class: type[_Cta] = _Cta,
) -> Callable[..., Any]:
  """Builds the kernel.

  Args:
    plan: sizes and schedule.
    interpret: parameters of Pallas' GPU interpreter, or None for the GPU.
    as_cluster: whether the CTAs form one cluster, which is what the interpreter
      runs concurrently, rather than a grid.
    cta_class: what runs on each CTA; tests put faults in.

  Returns:
    A function of the operands of `operand_shapes`, in that order, the caches as
    `jax.Ref`s that it extends in place. It returns a list that starts with
    logits `[B, V]` float32 (V padded) and the greedy choice `[8]` int32.
  """
  g, p = plan.geometry, plan.num_ctas
  halves = g.head_dim // TILE
  names = list(operand_shapes(plan))
  out_types = dict(
    logits=((plan.batch, g.padded_vocab_size), _F32),
    next_ids=((8,), _I32),
    residual=((2, 8, g.padded_hidden_size), _F32),
    qkv=((8, g.num_qkv_heads + 8, g.head_dim), _F32),
    # Filling x may read beyond the last column.
    attended=((8, g.padded_attention_size + plan.x_cols), _BF16),
    hidden=((8, g.padded_intermediate_size + plan.x_cols), _BF16),
    candidates=((2, 8, plan.candidate_cols), _F32),
    partial=((p, 8, TILE), _F32),
    parts=((p, halves + 2, 8, TILE), _F32),
  )
  scratch = dict(
    ring=plgpu.SMEM(
      (plan.num_slots, CHUNK_ROWS, CHUNK_COLS // 2),
      _BF16,
      transforms=_SWIZZLED,
    ),
    x=plgpu.SMEM((8, plan.x_cols), _BF16, transforms=_SWIZZLED),
    q=plgpu.SMEM((8, g.head_dim), _BF16, transforms=_SWIZZLED),
    p=plgpu.SMEM((8, TILE), _BF16, transforms=_SWIZZLED),
    sums=plgpu.SMEM((8, TILE), _F32),
    staging=plgpu.SMEM((2, 8, TILE), _F32),
    halves=plgpu.SMEM((2, 8, _HALF), _F32),
    narrow_half=plgpu.SMEM((1, 8, _HALF), _BF16),
    narrow=plgpu.SMEM((halves, 8, TILE), _BF16),
    # Never both in use.
    row_or_state=plgpu.RefUnion(
      plgpu.SMEM((plan.x_cols,), _BF16),
      plgpu.SMEM((halves + 2, 8, TILE), _F32),
    ),
    new=plgpu.SMEM((2, 8, g.head_dim), _BF16),
    best=plgpu.SMEM((8, TILE), _F32),
    best_index=plgpu.SMEM((8, TILE), _I32),
    embedded=plgpu.SMEM((CHUNK_COLS,), _BF16),
    embedded_f32=plgpu.SMEM((CHUNK_COLS,), _F32),
    produced=plgpu.Barrier(num_barriers=plan.num_slots, num_arrivals=2),
    consumed=plgpu.Barrier(num_barriers=plan.num_slots),
    embedded_produced=plgpu.Barrier(num_arrivals=2),
  )
  plain = (
    "sums staging halves narrow_half narrow state new best best_index"
  ).split()

  def body(*args: Any) -> None:
    refs = dict(zip([*names, *out_types, *scratch], args, strict=True))
    refs["num_layers"] = refs["num_layers"][0]
    refs["row"], refs["state"] = refs.pop("row_or_state")
    cta = cta_class(plan, refs)
    wg = lax.axis_index("wg")

    @pl.when(wg == 1)
    def _memory_wg():
      cta.produce()

    @pl.when(wg == 0)
    def _compute_wg():
      if interpret is None:
        mosaic.keep_plain(*(refs[name] for name in plain))
      cta.compute()

  axis: dict[str, Any] = dict(grid=(p,), grid_names=("cta",))
  if as_cluster:
    axis = dict(cluster=(p,), cluster_names=("cta",))
  return plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct(*x) for x in out_types.values()],
    scratch_types=list(scratch.values()),
    num_threads=2,
    thread_name="wg",
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    **axis,
  )


def step(
  plan: Plan,
  packed: dict[str, jax.Array],
  token_ids: jax.Array,
  positions: jax.Array,
  active: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Runs one decode step; to be called under `jax.jit`.

  Args:
    plan: sizes and schedule.
    packed: `qkv`, `o`, `gate_up`, `down`, `lm_head`, `embedding` (None if
      tied) and `norms`, see `packing`.
    token_ids: `[B]` int32.
    positions: `[B]` int32, tokens in the cache so far, below S.
    active: `[B]` bool; the caches of other sequences are left alone.
    cos: `[B, H / 2]` float32, of the positions.
    sin: likewise.
    k_cache: `[L, B, K, S, H]` bfloat16; donated, it is extended in place.
    v_cache: likewise.

  Returns:
    Logits `[B, V]` float32, the greedy choice `[B]` int32, and the caches.
  """
  g = plan.geometry

  def rows(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 8 - plan.batch), *[(0, 0)] * (x.ndim - 1)])

  embedding = packed["embedding"]
  k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
  logits, next_ids, *_ = make_step(plan)(
    jnp.asarray(plan.schedule.table()),
    jnp.full((1,), g.num_hidden_layers, _I32),
    rows(jnp.clip(token_ids, 0, g.vocab_size - 1)),
    rows(jnp.where(active, positions, 0)),
    rows(active.astype(_I32)),
    rows(cos),
    rows(sin),
    packed["norms"],
    packed["qkv"],
    packed["o"],
    packed["gate_up"],
    packed["down"],
    packed["lm_head"],
    packed["lm_head"] if embedding is None else embedding,
    k_ref,
    v_ref,
  )
  return (
    logits[:, : g.vocab_size],
    next_ids[: plan.batch],
    jax.freeze(k_ref),
    jax.freeze(v_ref),
  )
