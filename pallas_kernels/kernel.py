"""The decode step as one persistent kernel.

One CTA per SM, two warpgroups each. The memory warpgroup streams this CTA's
chunks of every matrix, and the keys and values it attends to, into a ring of
shared-memory slots; it runs ahead of everything, bounded only by free slots.
The compute warpgroup follows the same order and multiplies.

CTAs exchange activations through device memory, see `words`. Nothing that is
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

from pallas_kernels import mosaic, times
from pallas_kernels.attention import AttentionPhase
from pallas_kernels.geometry import CHUNK_COLS, CHUNK_ROWS
from pallas_kernels.layouts import BF16, F32, I32, SWIZZLED, Index, rows_layout
from pallas_kernels.matmul import MatmulPhases
from pallas_kernels.plan import (
  GROUP_ROWS,
  INSTEAD_OF_X,
  QKV,
  Plan,
  operand_shapes,
  scratch_shapes,
)

# What `wgmma` reads from shared memory, beside the ring.
_OPERANDS = ("x", "q", "p")


class Cta(MatmulPhases, AttentionPhase):
  """One CTA's part of the step."""

  def load_angles(self) -> None:
    """Copies the angles to shared memory, the first ones again at the end."""
    width = GROUP_ROWS // 2
    num = self.cos_sin.shape[2] // width
    for n in range(2):
      for j in range(num):
        at = j * width % self.angles.shape[2]
        for b in range(self.plan.batch):
          values = plgpu.load(
            self.angles.at[n, b, pl.ds(at, width)],
            layout=rows_layout(width).reduce(0),
            optimized=False,
          )
          mosaic.store(self.cos_sin.at[n, b, pl.ds(j * width, width)], values)

  def compute(self) -> None:
    """Follows the stream through all phases of the step."""
    g, s = self.geometry, self.plan.schedule
    self.load_angles()

    def fill_normed(name: str, norm: Index, stamp: Index) -> None:
      # Every matrix that comes after a norm has D columns, in one block.
      self.receive_x(name, s.qkv, g.hidden_rows, 0, stamp, norm)
      plgpu.commit_smem()

    def layer_step(layer: Index, i: Index) -> Index:
      stamp = layer + 1

      def fill_qkv(block: Index) -> None:
        del block

        # The first layer's is there.
        @pl.when(layer > 0)
        def _() -> None:
          fill_normed("output", 2 * layer, layer)

      i = self.matmul(
        i,
        s.qkv,
        fill_qkv,
        functools.partial(self.finish_qkv, stamp),
        follows=True,
      )
      i = self.for_items(lambda item, i: self.attention_item(item, i, layer), i)

      def fill_o(block: Index) -> None:
        self.receive_x("attended", s.o, g.attention_size, block, stamp)
        plgpu.commit_smem()

      i = self.matmul(
        i,
        s.o,
        fill_o,
        functools.partial(self.finish_residual, "middle", stamp),
      )
      i = self.matmul(
        i,
        s.gate_up,
        lambda _: fill_normed("middle", 2 * layer + 1, stamp),
        functools.partial(self.finish_gate_up, stamp),
      )

      def fill_down(block: Index) -> None:
        self.receive_x("hidden", s.down, g.gate_up_rows // 2, block, stamp)
        plgpu.commit_smem()

      return self.matmul(
        i,
        s.down,
        fill_down,
        functools.partial(self.finish_residual, "output", stamp),
      )

    self.embed(0)
    plgpu.commit_smem()
    i = lax.fori_loop(0, self.num_layers, layer_step, I32(0))
    self.begin_choice()
    self.matmul(
      i,
      s.lm_head,
      lambda _: fill_normed("output", 2 * self.num_layers, self.num_layers),
      self.finish_lm_head,
    )
    self.choose()
    # The new keys and values are in the cache.
    plgpu.wait_smem_to_gmem(0)


def make_step(
  plan: Plan,
  *,
  interpret: Any = None,
  as_cluster: bool = False,
  timed: bool = False,
  cta_class: type[Cta] = Cta,
) -> Callable[..., Any]:
  """Builds the kernel.

  Args:
    plan: sizes and schedule.
    interpret: parameters of Pallas' GPU interpreter, or None for the GPU.
    as_cluster: whether the CTAs form one cluster, which is what the interpreter
      runs concurrently, rather than a grid.
    timed: whether the CTAs count where their time goes, see `times`. The
      counters, zero, then come before the operands, as a `jax.Ref`.
    cta_class: what runs on each CTA; tests put faults in.

  Returns:
    A function of the operands of `operand_shapes`, in that order, the caches and
    `words` as `jax.Ref`s: it extends the caches in place, and `words` are zero
    before. It returns logits `[B, V]` float32 (V padded) and the greedy choice
    `[8]` int32.
  """
  g, p = plan.geometry, plan.num_ctas
  names = [*(["times"] if timed else []), *operand_shapes(plan)]
  out_types = dict(
    logits=((plan.batch, g.vocab_rows), F32),
    next_ids=((8,), I32),
  )
  arrays = {
    name: plgpu.SMEM(
      *shape_dtype, transforms=SWIZZLED if name in _OPERANDS else ()
    )
    for name, shape_dtype in scratch_shapes(plan).items()
  }
  plain = [name for name in arrays if name not in _OPERANDS]
  instead = [arrays.pop(name) for name in INSTEAD_OF_X]
  scratch: dict[str, Any] = dict(
    ring=plgpu.SMEM(
      (plan.num_slots, CHUNK_ROWS, CHUNK_COLS // 2), BF16, transforms=SWIZZLED
    ),
    x_or_instead=plgpu.RefUnion([arrays.pop("x")], instead),
    **arrays,
    produced=plgpu.Barrier(num_barriers=plan.num_slots, num_arrivals=2),
    consumed=plgpu.Barrier(num_barriers=plan.num_slots),
  )

  def body(*args: Any) -> None:
    refs = dict(zip([*names, *out_types, *scratch], args, strict=True))
    refs["num_layers"] = refs["num_layers"][0]
    (refs["x"],), others = refs.pop("x_or_instead")
    refs.update(zip(INSTEAD_OF_X, others, strict=True))
    cta = cta_class(plan, refs)
    wg = lax.axis_index("wg")

    @pl.when(wg == 1)
    def _memory_wg() -> None:
      cta.produce()

    @pl.when(wg == 0)
    def _compute_wg() -> None:
      if interpret is None:
        mosaic.keep_plain(*(refs[name] for name in plain))
      cta.phase = QKV
      with cta.span("step"), cta.span("step_ns"):
        cta.compute()
      times.count_sm(cta.times, cta.cta)

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
  times_ref: Any = None,
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
    times_ref: a `jax.Ref` for `times`, or None.

  Returns:
    Logits `[B, V]` float32, the greedy choice `[B]` int32, and the caches.
  """
  g = plan.geometry
  missing = 8 - plan.batch
  # Few arrays: each costs a launch of its own.
  sequences = jnp.stack(
    [
      jnp.clip(token_ids, 0, g.vocab_size - 1),
      jnp.where(active, positions, 0),
      active.astype(I32),
    ]
  )
  angles = jnp.stack([cos, sin])
  k_ref, v_ref = jax.new_ref(k_cache), jax.new_ref(v_cache)
  logits, next_ids = make_step(plan, timed=times_ref is not None)(
    *([] if times_ref is None else [times_ref]),
    jnp.asarray(plan.schedule.table()),
    jnp.full((1,), g.num_hidden_layers, I32),
    jnp.pad(sequences, ((0, 0), (0, missing))),
    jnp.pad(angles, ((0, 0), (0, missing), (0, 0))),
    packed["norms"].reshape(operand_shapes(plan)["norms"][0]),
    packed["qkv"],
    packed["o"],
    packed["gate_up"],
    packed["down"],
    packed["lm_head"],
    packed["embedding"],
    jax.new_ref(jnp.zeros((plan.num_words, 2), I32)),
    k_ref,
    v_ref,
  )
  return (
    logits[:, : g.vocab_size],
    next_ids[: plan.batch],
    jax.freeze(k_ref),
    jax.freeze(v_ref),
  )
