"""What one CTA of the kernel knows: its refs, its share."""

import contextlib
from collections.abc import Callable
from typing import Any

from jax import lax

from pallas_kernels import times
from pallas_kernels.layouts import I32, Index, Ref
from pallas_kernels.plan import QKV, Plan


class CtaBase:
  """Refs and scalars; the parts of the kernel are subclasses.

  The attributes without a value here are the operands of
  `plan.operand_shapes`, then what `kernel.make_step` lists as outputs and as
  scratch, by the same names.
  """

  table: Ref
  num_layers: Index
  sequences: Ref
  angles: Ref
  norms: Ref
  w_qkv: Ref
  w_o: Ref
  w_gate_up: Ref
  w_down: Ref
  w_lm_head: Ref
  embedding: Ref
  words: Ref
  k_cache: Ref
  v_cache: Ref

  times: Ref | None = None
  logits: Ref
  next_ids: Ref

  ring: Ref
  x: Ref
  q: Ref
  p: Ref
  sums: Ref
  results: Ref
  results_f32: Ref
  residual: Ref
  cos_sin: Ref
  attended: Ref
  new: Ref
  best: Ref
  candidates: Ref
  produced: Ref
  consumed: Ref

  # Which phase is being traced.
  phase: int = QKV

  def __init__(self, plan: Plan, refs: dict[str, Any]):
    self.plan = plan
    self.geometry = plan.geometry
    vars(self).update(refs)
    self.cta = lax.axis_index("cta")
    self.token_ids, self.positions, self.active = (
      self.sequences.at[n] for n in range(3)
    )
    # The scalar prefetch: all that steers the stream, read once.
    self.runs = {
      matmul.name: tuple(self.table[self.cta, i, j] for j in range(2))
      for i, matmul in enumerate(plan.schedule.matmuls)
    }

  def span(self, kind: str) -> contextlib.AbstractContextManager[None]:
    """Counts the cycles of what is traced inside, if that is asked for."""
    return times.span(self.times, self.cta, self.phase, kind)

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
