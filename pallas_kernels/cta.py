"""What one CTA of the kernel knows: its refs, its counters, its share."""

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layouts import I32, Index, Ref
from pallas_kernels.plan import NUM_PHASES, Plan


class CtaBase:
  """Refs and scalars; the parts of the kernel are subclasses.

  The attributes without a value here are the operands of
  `plan.operand_shapes`, then what `kernel.make_step` lists as outputs and as
  scratch, by the same names.
  """

  table: Ref
  num_layers: Index
  token_ids: Ref
  positions: Ref
  active: Ref
  cos: Ref
  sin: Ref
  norms: Ref
  w_qkv: Ref
  w_o: Ref
  w_gate_up: Ref
  w_down: Ref
  w_lm_head: Ref
  embedding: Ref
  k_cache: Ref
  v_cache: Ref

  logits: Ref
  next_ids: Ref
  residual: Ref
  qkv: Ref
  attended: Ref
  hidden: Ref
  candidates: Ref
  partial: Ref
  parts: Ref

  ring: Ref
  x: Ref
  q: Ref
  p: Ref
  sums: Ref
  staging: Ref
  halves: Ref
  narrow_half: Ref
  narrow: Ref
  row: Ref
  state: Ref
  new: Ref
  best: Ref
  best_index: Ref
  embedded: Ref
  embedded_f32: Ref
  produced: Ref
  consumed: Ref
  embedded_produced: Ref

  def __init__(self, plan: Plan, refs: dict[str, Any]):
    self.plan = plan
    self.geometry = plan.geometry
    vars(self).update(refs)
    self.cta = lax.axis_index("cta")
    # Counters in device memory, zero at launch, which only ever grow.
    self.published = pl.get_global(plgpu.SemaphoreType.REGULAR((NUM_PHASES,)))
    self.joined = pl.get_global(
      plgpu.SemaphoreType.REGULAR((NUM_PHASES * plan.num_ctas,))
    )
    # The scalar prefetch: all that steers the stream, read once.
    self.runs = {
      matmul.name: tuple(self.table[self.cta, i, j] for j in range(3))
      for i, matmul in enumerate(plan.schedule.matmuls)
    }

  def item(self, item: Index) -> tuple[Index, Index, Index]:
    """Returns batch index, KV head and split of an item of attention."""
    heads = self.geometry.num_key_value_heads
    splits = self.plan.splits
    return (
      item // (splits * heads),
      lax.rem(item // splits, I32(heads)),
      lax.rem(item, I32(splits)),
    )

  def for_items(
    self, body: Callable[[Index, Index], Index], carry: Index
  ) -> Index:
    """Folds `body` over this CTA's items of attention."""
    plan = self.plan
    mine = (plan.num_items - self.cta + plan.num_ctas - 1) // plan.num_ctas

    def step(j: Index, carry: Index) -> Index:
      return body(self.cta + j * plan.num_ctas, carry)

    return lax.fori_loop(0, mine, step, carry)
