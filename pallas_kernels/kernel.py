"""The decode step as one persistent kernel.

One CTA per SM, two warpgroups each. The memory warpgroup streams this CTA's
chunks of every matrix, and the keys and values it attends to, into a ring of
shared-memory slots; it runs ahead of everything, bounded only by free slots.
The compute warpgroup follows the same order and multiplies.

CTAs exchange activations through device memory, see `exchange`. Nothing that is
read by a bulk load is written before it in the same launch. All CTAs must be on
the device at once: two steps must not run at the same time on one GPU.

Axis letters: L layers, B batch, D width, N query heads, K KV heads, G = N / K,
H head size, F MLP width, V vocabulary, S cache slots, P CTAs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.attention import AttentionPhase
from pallas_kernels.geometry import CHUNK_COLS, CHUNK_ROWS, TILE
from pallas_kernels.layouts import (
  BF16,
  F32,
  I32,
  SWIZZLED,
  Index,
  fori,
  rows_layout,
)
from pallas_kernels.matmul import MatmulPhases
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
  scratch_shapes,
)

# What `wgmma` reads from shared memory, beside the ring.
_OPERANDS = ("x", "q", "p")


class Cta(MatmulPhases, AttentionPhase):
  """One CTA's part of the step."""

  def embed(self) -> int:
    """Copies the tokens' rows to the residual stream, a chunk at a time.

    Returns the number of publications that this takes, of all CTAs.
    """
    g, plan = self.geometry, self.plan
    per_row = g.padded_hidden_size // CHUNK_COLS
    num = plan.batch * per_row
    lm_head = plan.schedule.lm_head
    half = CHUNK_ROWS // 2

    def item(j: Index) -> None:
      index = self.cta + j * plan.num_ctas
      b, k = index // per_row, lax.rem(index, I32(per_row))
      token = self.token_ids[b]
      chunk = token // TILE * per_row + k
      source = self.embedding.at[
        chunk // lm_head.run, lax.rem(chunk, I32(lm_head.run))
      ]
      for n in range(2):
        plgpu.copy_gmem_to_smem(
          source.at[n * half + lax.rem(token, I32(TILE))],
          self.embedded.at[pl.ds(n * half, half)],
          self.embedded_produced,
        )
      plgpu.barrier_wait(self.embedded_produced)
      row = self.load_row(self.embedded, CHUNK_COLS)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      mosaic.store(self.embedded_f32, row.astype(F32))
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        self.embedded_f32,
        self.residual.at[0, b, pl.ds(k * CHUNK_COLS, CHUNK_COLS)],
      )
      self.publish(EMBED)

    fori(0, (num - self.cta + plan.num_ctas - 1) // plan.num_ctas, item)
    return num

  def compute(self) -> None:
    """Follows the stream through all phases of the step."""
    g, plan, s = self.geometry, self.plan, self.plan.schedule
    x_in, x_mid = self.residual.at[0], self.residual.at[1]
    num_embedded = self.embed()

    def input_ready(layer: Index) -> None:
      begins = layer == 0
      self.wait_published(
        jnp.where(begins, EMBED, DOWN),
        jnp.where(begins, num_embedded, layer * s.down.num_owners),
      )

    def layer_step(layer: Index, i: Index) -> Index:
      epoch = layer + 1

      def fill_qkv() -> None:
        input_ready(layer)
        self.fill_normed(x_in, self.norms.at[2 * layer])

      i = self.matmul(i, s.qkv, QKV, epoch, fill_qkv, None, self.finish_qkv)

      def attend(item: Index, i: Index) -> Index:
        self.wait_published(QKV, epoch * s.qkv.num_owners)
        return self.attention_item(item, i, layer)

      i = self.for_items(attend, i)

      def wait_attention() -> None:
        num = plan.batch * g.num_key_value_heads
        self.wait_published(ATTENTION, epoch * num)

      attention_size = g.num_attention_heads * g.head_dim
      padded = attention_size != g.padded_attention_size

      def fill_o(start: Index, width: int) -> None:
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

      def fill_gate_up() -> None:
        self.wait_published(O_PROJ, epoch * s.o.num_owners)
        self.fill_normed(x_mid, self.norms.at[2 * layer + 1])

      i = self.matmul(
        i, s.gate_up, GATE_UP, epoch, fill_gate_up, None, self.finish_gate_up
      )

      def wait_hidden() -> None:
        self.wait_published(GATE_UP, epoch * s.gate_up.num_owners)

      def fill_down(start: Index, width: int) -> None:
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

    i = lax.fori_loop(0, self.num_layers, layer_step, I32(0))

    layout = rows_layout(TILE)
    mosaic.store(
      self.best, plgpu.layout_cast(jnp.full((8, TILE), -jnp.inf, F32), layout)
    )
    mosaic.store(
      self.best_index,
      plgpu.layout_cast(jnp.full((8, TILE), g.vocab_size, I32), layout),
    )

    def fill_lm_head() -> None:
      input_ready(self.num_layers)
      self.fill_normed(x_in, self.norms.at[2 * self.num_layers])

    self.matmul(
      i, s.lm_head, LM_HEAD, 1, fill_lm_head, None, self.finish_lm_head
    )
    self.choose()

  def choose(self) -> None:
    """Takes the largest logit, the first of equals."""
    g, plan = self.geometry, self.plan
    layout = rows_layout(TILE)

    def spread(column: jax.Array) -> jax.Array:
      return plgpu.layout_cast(
        lax.broadcast_in_dim(column, (8, TILE), (0,)), layout
      )

    best, index = (
      plgpu.load(x, layout=layout, optimized=False)
      for x in (self.best, self.best_index)
    )
    top = spread(jnp.max(best, axis=1))
    none = I32(g.padded_vocab_size)
    top_index = spread(jnp.min(jnp.where(best == top, index, none), axis=1))
    # The last logits have been read from the staging buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for j, value in enumerate((top, top_index.astype(F32))):
      mosaic.store(self.staging.at[j], value)
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
    def _() -> None:
      self.wait_published(LM_HEAD, plan.num_ctas)
      width = plan.candidate_cols
      strided = plgpu.Layout.WG_STRIDED((width,), vec_size=1)
      real = (
        plgpu.broadcasted_iota(I32, (width,), 0, layout=strided)
        < plan.num_ctas * CANDIDATE
      )
      for b in range(plan.batch):
        logit, index = (
          plgpu.load(self.candidates.at[j, b], layout=strided, optimized=False)
          for j in range(2)
        )
        logit = jnp.where(real, logit, F32(-jnp.inf))
        top = jnp.max(logit)
        last = F32(g.vocab_size - 1)
        first = jnp.min(jnp.where(logit == top, index, last))
        # In range even if no logit is a number.
        first = jnp.maximum(jnp.minimum(first, last), F32(0))
        self.next_ids[b] = first.astype(I32)


def make_step(
  plan: Plan,
  *,
  interpret: Any = None,
  as_cluster: bool = False,
  cta_class: type[Cta] = Cta,
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
    logits=((plan.batch, g.padded_vocab_size), F32),
    next_ids=((8,), I32),
    residual=((2, 8, g.padded_hidden_size), F32),
    qkv=((8, g.num_qkv_heads + 8, g.head_dim), F32),
    # Filling x may read beyond the last column.
    attended=((8, g.padded_attention_size + plan.x_cols), BF16),
    hidden=((8, g.padded_intermediate_size + plan.x_cols), BF16),
    candidates=((2, 8, plan.candidate_cols), F32),
    partial=((p, 8, TILE), F32),
    parts=((p, halves + 2, 8, TILE), F32),
  )
  arrays = {
    name: plgpu.SMEM(
      *shape_dtype, transforms=SWIZZLED if name in _OPERANDS else ()
    )
    for name, shape_dtype in scratch_shapes(plan).items()
  }
  # Never both in use.
  row_or_state = plgpu.RefUnion(arrays.pop("row"), arrays.pop("state"))
  scratch: dict[str, Any] = dict(
    ring=plgpu.SMEM(
      (plan.num_slots, CHUNK_ROWS, CHUNK_COLS // 2), BF16, transforms=SWIZZLED
    ),
    **arrays,
    row_or_state=row_or_state,
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
    def _memory_wg() -> None:
      cta.produce()

    @pl.when(wg == 0)
    def _compute_wg() -> None:
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
    packed: `qkv`, `o`, `gate_up`, `down`, `lm_head`, `embedding` (the
      LM head if tied) and `norms`, see `packing`.
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

  k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
  logits, next_ids, *_ = make_step(plan)(
    jnp.asarray(plan.schedule.table()),
    jnp.full((1,), g.num_hidden_layers, I32),
    rows(jnp.clip(token_ids, 0, g.vocab_size - 1)),
    rows(jnp.where(active, positions, 0)),
    rows(active.astype(I32)),
    rows(cos),
    rows(sin),
    packed["norms"],
    packed["qkv"],
    packed["o"],
    packed["gate_up"],
    packed["down"],
    packed["lm_head"],
    packed["embedding"],
    k_ref,
    v_ref,
  )
  return (
    logits[:, : g.vocab_size],
    next_ids[: plan.batch],
    jax.freeze(k_ref),
    jax.freeze(v_ref),
  )
