"""The decode step as one persistent kernel.

One CTA per SM, of one or two compute warpgroups and a memory warpgroup. The
memory warpgroup streams this CTA's chunks of every matrix, and the keys and values
it attends to, into a ring of shared-memory slots; it runs ahead of everything,
bounded only by free slots. The compute warpgroups follow the same order and
multiply: of two, each takes every other unit of weights, both receive activations
and finish results, and the first one attends. They meet before one reads what the
other has written.

CTAs exchange activations through device memory, see `words`. Nothing else that
is read is written before in the same launch: where the sequences stand is one
array, and where they stand next is another, see `steps`. All CTAs must be on
the device at once: two steps must not run at the same time on one GPU.

Axis letters: L layers, B batch, D width, N query heads, K KV heads, G = N / K,
H head size, F MLP width, V vocabulary, S cache slots, P CTAs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import finishing, mosaic, steps, times
from pallas_kernels.attention import AttentionPhase
from pallas_kernels.formats import ROW_BYTES
from pallas_kernels.geometry import CHUNK_COLS, CHUNK_ROWS
from pallas_kernels.layouts import BF16, F32, I32, SWIZZLED, Index
from pallas_kernels.matmul import MatmulPhases
from pallas_kernels.plan import (
  CHANGED,
  INSTEAD_OF_X,
  QKV,
  Plan,
  operand_shapes,
  scratch_shapes,
)
from pallas_kernels.steps import Operands

# What `wgmma` reads from shared memory, beside the ring.
_OPERANDS = ("x", "q", "p")


class Cta(MatmulPhases, AttentionPhase):
  """One CTA's part of the step."""

  def load_angles(self) -> None:
    """Copies the angles to shared memory; a meeting is to follow."""
    finishing.load_angles(self.team, self.angles, self.step, self.cos_sin)

  def compute(self) -> None:
    """Follows the stream through all phases of the step."""
    g, s = self.geometry, self.plan.schedule
    # Stamps count layers through all steps.
    before = self.step * self.num_layers
    after = before + self.num_layers
    self.load_angles()

    def fill_normed(name: str, norm: Index, stamp: Index) -> None:
      # Every matrix that comes after a norm has D columns, in one block.
      self.receive_x(name, s.qkv, g.hidden_rows, 0, stamp, norm)

    def layer_step(layer: Index, i: Index) -> Index:
      stamp = before + layer + 1

      def fill_qkv(block: Index) -> None:
        del block

        # The first layer's is there.
        @pl.when(layer > 0)
        def _() -> None:
          fill_normed("output", 2 * layer, stamp - 1)

      i = self.matmul(
        i,
        s.qkv,
        fill_qkv,
        functools.partial(self.finish_qkv, stamp),
      )
      i = self.for_items(
        lambda item, i: self.attention_item(item, i, layer, stamp), i
      )
      # Attention has done with what takes the place of x. Who has no rows of o meets
      # too, since x is filled for other matrices.
      self.team.meet()

      def fill_o(block: Index) -> None:
        self.receive_x("attended", s.o, g.attention_size, block, stamp)

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

      def finish_down(row: Index, num_rows: Index) -> None:
        self.finish_residual("output", stamp, row, num_rows)

        # Some CTAs have rows of the LM head only. They see none of the layers,
        # and in `output` could not tell the last one from the one before it.
        @pl.when(layer == self.num_layers - 1)
        def _() -> None:
          self.send_results("final", row, num_rows, self.step + 1)

      return self.matmul(i, s.down, fill_down, finish_down)

    self.embed(0)
    i = lax.fori_loop(0, self.num_layers, layer_step, I32(0))
    self.begin_choice()
    self.matmul(
      i,
      s.lm_head,
      lambda _: fill_normed("final", 2 * self.num_layers, self.step + 1),
      self.finish_lm_head,
    )
    self.choose(after)
    # The new keys and values are in the cache.
    plgpu.wait_smem_to_gmem(0)


def make_step(
  plan: Plan,
  *,
  eos_token_ids: tuple[int, ...] = (),
  interpret: Any = None,
  as_cluster: bool = False,
  timed: bool = False,
  with_logits: bool = True,
  cta_class: type[Cta] = Cta,
) -> Callable[..., Any]:
  """Builds the kernel.

  Args:
    plan: sizes and schedule.
    eos_token_ids: tokens that end a sequence.
    interpret: parameters of Pallas' GPU interpreter, or None for the GPU.
    as_cluster: whether the CTAs form one cluster, which is what the interpreter
      runs concurrently, rather than a grid.
    timed: whether the CTAs count where their time goes, see `times`. The
      counters, zero, then come before the operands, as a `jax.Ref`.
    with_logits: whether to return logits. At batch 8 the writing of 1B's takes 7
      us (bench/LOG.md), and a greedy step needs none.
    cta_class: what runs on each CTA; tests put faults in.

  Returns:
    A function of the operands of `operand_shapes`, in that order, those of
    `CHANGED` as `jax.Ref`s. It returns, in a tuple, logits `[B, V]` float32 (V
    padded), if asked for, and the next `progress`. If no sequence is active, or
    there have been as many steps as there may be, it changes nothing, `progress`
    is as it was, and the logits have no meaning.
  """
  g, p = plan.geometry, plan.num_ctas
  names = [*(["times"] if timed else []), *operand_shapes(plan)]
  out_types: dict[str, Any] = {}
  if with_logits:
    out_types["logits"] = ((plan.batch, g.vocab_rows), F32)
  out_types["next_progress"] = operand_shapes(plan)["progress"]
  arrays = {
    name: plgpu.SMEM(
      *shape_dtype, transforms=SWIZZLED if name in _OPERANDS else ()
    )
    for name, shape_dtype in scratch_shapes(plan).items()
  }
  plain = [name for name in arrays if name not in _OPERANDS]
  instead = [arrays.pop(name) for name in INSTEAD_OF_X]
  scales = {}
  if plan.scale_rows:
    shape = (plan.num_slots, plan.scale_rows, ROW_BYTES // 4)
    scales["scales"] = plgpu.SMEM(shape, I32)
    plain.append("scales")
  scratch: dict[str, Any] = dict(
    ring=plgpu.SMEM(
      (plan.num_slots, CHUNK_ROWS, CHUNK_COLS // 2), BF16, transforms=SWIZZLED
    ),
    x_or_instead=plgpu.RefUnion([arrays.pop("x")], instead),
    **arrays,
    **scales,
    produced=plgpu.Barrier(
      num_barriers=plan.compute_wgs * plan.num_slots, num_arrivals=2
    ),
    consumed=plgpu.Barrier(num_barriers=plan.num_slots),
  )
  if plan.compute_wgs > 1 and interpret is not None:
    scratch["met"] = plgpu.Barrier(num_arrivals=plan.compute_wgs)

  def body(*args: Any) -> None:
    refs = dict(zip([*names, *out_types, *scratch], args, strict=True))
    refs["num_layers"] = refs["num_layers"][0]
    (refs["x"],), others = refs.pop("x_or_instead")
    refs.update(zip(INSTEAD_OF_X, others, strict=True))
    cta = cta_class(plan, eos_token_ids, refs)
    wg = lax.axis_index("wg")
    goes_on = cta.goes_on()

    def produce(warp: Index) -> None:
      @pl.when(warp == 0)
      def _() -> None:
        cta.produce()

    @pl.when((wg == plan.compute_wgs) & goes_on)
    def _memory_wg() -> None:
      if interpret is None:
        # One warp loads: four would meet for each load, and arrive four times.
        plgpu.warp_map(produce)
      else:
        cta.produce()

    @pl.when((wg < plan.compute_wgs) & goes_on)
    def _compute_wg() -> None:
      if interpret is None:
        mosaic.keep_plain(*(refs[name] for name in plain))
      cta.phase = QKV
      with cta.span("step"), cta.span("step_ns"):
        cta.compute()
      times.count_sm(cta.times, cta.cta, cta.team.num_threads)

    @pl.when((wg == 0) & (cta.cta == 0) & ~goes_on)
    def _nothing_to_do() -> None:
      cta.stay()

  axis: dict[str, Any] = dict(grid=(p,), grid_names=("cta",))
  if as_cluster:
    axis = dict(cluster=(p,), cluster_names=("cta",))
  return plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct(*x) for x in out_types.values()],
    scratch_types=list(scratch.values()),
    num_threads=plan.compute_wgs + 1,
    thread_name="wg",
    interpret=interpret,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    **axis,
  )


def launch(
  plan: Plan,
  operands: Operands,
  *,
  times_ref: Any = None,
  **kwargs: Any,
) -> tuple[jax.Array | None, Operands]:
  """Launches the kernel once; to be called under `jax.jit`.

  Args:
    plan: sizes and schedule.
    operands: those of `operand_shapes`; what is changed is donated.
    times_ref: a `jax.Ref` for `times`, or None.
    **kwargs: for `make_step`.

  Returns:
    Logits `[B, V]` float32 (V padded), without a meaning if there was nothing
    to do, or None if they are not asked for, and the operands that are others
    for the next launch.
  """
  timed = times_ref is not None
  refs = {name: jax.new_ref(operands[name]) for name in CHANGED}
  args = operands | refs
  *logits, progress = make_step(plan, timed=timed, **kwargs)(
    *([times_ref] if timed else []),
    *(args[name] for name in operand_shapes(plan)),
  )
  changed = {name: jax.freeze(ref) for name, ref in refs.items()}
  return logits[0] if logits else None, {"progress": progress, **changed}


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
  *,
  with_logits: bool = True,
) -> tuple[jax.Array | None, jax.Array, jax.Array, jax.Array]:
  """Runs one decode step; to be called under `jax.jit`.

  Args:
    plan: sizes and schedule.
    packed: see `steps.operands`.
    token_ids: `[B]` int32.
    positions: `[B]` int32, tokens in the cache so far, below S where active.
    active: `[B]` bool; the caches of other sequences are left alone.
    cos: `[B, H / 2]` float32, of the positions.
    sin: likewise.
    k_cache: `[L, B, K, S, H]` bfloat16; donated, it is extended in place.
    v_cache: likewise.
    times_ref: a `jax.Ref` for `times`, or None.
    with_logits: whether to return logits.

  Returns:
    Logits `[B, V]` float32 or None, the greedy choice `[B]` int32, and the
    caches. What is said of inactive sequences has no meaning, nor has anything if
    all are.
  """
  operands = steps.operands(
    plan,
    packed,
    token_ids,
    positions,
    active,
    cos[None],
    sin[None],
    1,
    k_cache,
    v_cache,
  )
  logits, changed = launch(
    plan, operands, times_ref=times_ref, with_logits=with_logits
  )
  return (
    None if logits is None else logits[:, : plan.geometry.vocab_size],
    changed["progress"][steps.TOKEN_IDS, : plan.batch],
    changed["k_cache"],
    changed["v_cache"],
  )
