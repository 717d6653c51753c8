"""What one CTA of the kernel knows: its refs, its share."""

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import times
from pallas_kernels.layouts import I32, Index, Ref, fori
from pallas_kernels.plan import QKV, Plan
from pallas_kernels.steps import ACTIVE, CLOCK, POSITIONS, TOKEN_IDS, advance
from pallas_kernels.threads import Team


class CtaBase:
  """Refs and scalars; the parts of the kernel are subclasses.

  The attributes without a value here are the operands of
  `plan.operand_shapes`, then what `kernel.make_step` lists as outputs and as
  scratch, by the same names.
  """

  table: Ref
  num_layers: Index
  progress: Ref
  angles: Ref
  norms: Ref
  w_qkv: Ref
  w_o: Ref
  w_gate_up: Ref
  w_down: Ref
  s_qkv: Ref
  s_o: Ref
  s_gate_up: Ref
  s_down: Ref
  s_lm_head: Ref
  w_lm_head: Ref
  embedding: Ref
  emitted: Ref
  words: Ref
  k_cache: Ref
  v_cache: Ref

  times: Ref | None = None
  logits: Ref | None = None
  next_progress: Ref

  ring: Ref
  scales: Ref
  x: Ref
  q: Ref
  p: Ref
  sums: Ref
  results: Ref
  results_f32: Ref
  residual: Ref
  squares: Ref
  cos_sin: Ref
  tops: Ref
  attended: Ref
  new: Ref
  best: Ref
  chosen: Ref
  produced: Ref
  consumed: Ref
  met: Ref | None = None

  # Which phase is being traced.
  phase: int = QKV

  def __init__(
    self, plan: Plan, eos_token_ids: tuple[int, ...], refs: dict[str, Any]
  ):
    self.plan = plan
    self.eos_token_ids = eos_token_ids
    self.geometry = plan.geometry
    vars(self).update(refs)
    self.cta = lax.axis_index("cta")
    # The compute warpgroups, and which of them this is.
    self.team = Team(plan.compute_wgs, self.met)
    self.wg = lax.axis_index("wg") if plan.compute_wgs > 1 else I32(0)
    self.token_ids, self.positions, self.active = (
      self.progress.at[n] for n in (TOKEN_IDS, POSITIONS, ACTIVE)
    )
    # Steps since words were zero, and how many there may be.
    self.step, self.max_steps = (self.progress[CLOCK, n] for n in range(2))
    # The scalar prefetch: all that steers the stream, read once.
    self.runs = {
      matmul.name: tuple(self.table[self.cta, i, j] for j in range(2))
      for i, matmul in enumerate(plan.schedule.matmuls)
    }

  def goes_on(self) -> Index:
    """Says whether there is anything to do in this launch."""
    active = (self.active[b] > 0 for b in range(self.plan.batch))
    return functools.reduce(operator.or_, active) & (self.step < self.max_steps)

  def stay(self) -> None:
    """Hands the progress on as it is."""
    for b in range(self.plan.batch):
      for row in (TOKEN_IDS, POSITIONS, ACTIVE):
        self.next_progress[row, b] = self.progress[row, b]
    self.tick(0)

  def standing(self) -> list[tuple[Index, Index, Index]]:
    """Reads of each sequence the token, its position, and whether it is active."""
    return [
      (self.token_ids[b], self.positions[b], self.active[b])
      for b in range(self.plan.batch)
    ]

  def proceed(
    self, b: int, before: tuple[Index, Index, Index], chosen: Index
  ) -> None:
    """Takes a sequence to its next token from where it stood."""
    token_id, position, active = advance(
      *before, chosen, self.plan.capacity, self.eos_token_ids
    )
    self.next_progress[TOKEN_IDS, b] = token_id
    self.next_progress[POSITIONS, b] = position
    self.next_progress[ACTIVE, b] = active

    @pl.when(before[-1] > 0)
    def _() -> None:
      self.emitted[self.step, b] = chosen

  def tick(self, steps: int) -> None:
    """Counts steps."""
    self.next_progress[CLOCK, 0] = self.step + steps
    self.next_progress[CLOCK, 1] = self.max_steps

  def span(self, kind: str) -> contextlib.AbstractContextManager[None]:
    """Counts the cycles of what is traced inside, if that is asked for."""
    num_threads = self.team.num_threads
    return times.span(self.times, self.cta, self.phase, kind, num_threads)

  def take_turns(self, count: Index, body: Callable[[Index], None]) -> None:
    """Calls `body` with the numbers below `count` that are this warpgroup's."""
    num_wgs = self.plan.compute_wgs
    if num_wgs == 1:
      fori(0, count, body)
      return
    mine = (count - self.wg + num_wgs - 1) // num_wgs
    fori(0, mine, lambda n: body(self.wg + n * num_wgs))

  def item(self, item: Index) -> tuple[Index, Index, Index]:
    """Returns batch index, KV head and split of an item of attention."""
    heads = self.geometry.num_key_value_heads
    splits = self.plan.splits
    return (
      item // (splits * heads),
      lax.rem(item // splits, I32(heads)),
      lax.rem(item, I32(splits)),
    )

  def for_items(self, body: Callable[[Index, Any], Any], carry: Any) -> Any:
    """Folds `body` over this CTA's items of attention."""
    plan = self.plan
    mine = (plan.num_items - self.cta + plan.num_ctas - 1) // plan.num_ctas

    def step(j: Index, carry: Any) -> Any:
      return body(self.cta + j * plan.num_ctas, carry)

    return lax.fori_loop(0, mine, step, carry)
