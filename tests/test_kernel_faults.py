"""Faults put into the kernel on purpose: each must turn the check red.

What is red is named: `check` reports all that it finds, and every fault says
what must be among it.

Out of reach of the interpreter, whose semaphores always order what came before
them: a counter that moves by a relaxed operation instead of a releasing one.
That fault shows on the GPU only, as tokens that now and then differ
(bench/LOG.md). Nor does the interpreter run ahead of a `wgmma` that is not
waited for, nor know of memory scopes.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpreter

if interpreter.missing():
  pytest.skip(interpreter.missing(), allow_module_level=True)

from interpreted_step import TINY, Case, check

from pallas_kernels import kernel
from pallas_kernels.geometry import TILE

# One layer is enough unless a fault needs a second one; the interpreter's time
# goes by the operation.
_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)
_FEW_KEYS = Case(_LAYER, 1, 128, (2,))
_FULL_TILE = Case(_LAYER, 1, 128, (TILE - 1,))
_NEXT_TILE = Case(_LAYER, 1, 128, (TILE,))
# Longer than the ring has slots.
_LONG_STREAM = Case(TINY, 1, 64, (2,))
_TWO_CTAS = Case(_LAYER, 2, 64, (2,))
# Two chunks in each tile, three CTAs that cut them, and attention's columns
# padded.
_CUT_TILES = Case(
  dataclasses.replace(_LAYER, hidden_size=256, num_attention_heads=3),
  3,
  64,
  (2,),
)
# Two parts of one head's keys, five tiles and so a long and a short one.
_SPLIT_KEYS = Case(_LAYER, 2, 320, (300,))


# ---- the tools of the saboteur ---------------------------------------------


class _Moved:
  """A ref of which other elements are taken than those asked for."""

  def __init__(self, ref: Any, move: Callable[[Any], Any]):
    self._ref, self._move = ref, move

  @property
  def at(self) -> Any:
    return _Moved(self._ref.at, self._move)

  def __getitem__(self, index: Any) -> Any:
    return self._ref[self._move(index)]


class _Plus:
  """A ref of integers that are all off by some."""

  def __init__(self, ref: Any, offset: int):
    self._ref, self._offset = ref, offset

  def __getitem__(self, index: Any) -> Any:
    return self._ref[index] + self._offset


def _in(method, omitted, **attributes):
  """Returns a kernel in which one method sees another world.

  Args:
    method: its name.
    omitted: the operation of Pallas that does nothing there, or None.
    **attributes: what `self` has there instead: functions of what it had.
  """

  def faulty(self, *args):
    changed = {k: f(getattr(self, k)) for k, f in attributes.items()}
    with contextlib.ExitStack() as stack:
      if omitted is not None:
        nothing = mock.patch.object(plgpu, omitted, _nothing)
        stack.enter_context(nothing)
      for name, value in changed.items():
        stack.enter_context(mock.patch.object(self, name, value))
      return getattr(kernel.Cta, method)(self, *args)

  return type("Faulty", (kernel.Cta,), {method: faulty})


def _instead(**methods):
  """Returns a kernel with other methods."""
  return type("Faulty", (kernel.Cta,), methods)


def _nothing(*args, **kwargs):
  pass


# ---- the faults ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Fault:
  """A fault and how it shows.

  Attributes:
    case: the smallest that exposes it.
    found: what the error must say, a pattern.
    cta_class: the kernel with the fault.
    perturb: or the fault in its operands.
  """

  case: Case
  found: str
  cta_class: Any = kernel.Cta
  perturb: Any = None


def _signal_early(self, semaphore):
  # The stores have been read from their source, but have not arrived.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  plgpu.semaphore_signal(semaphore, memory_scope="gpu")


def _publish_early(self, phase):
  _signal_early(self, self.published.at[phase])


def _join_early(self, phase, owner):
  _signal_early(self, self.joined.at[phase * self.plan.num_ctas + owner])


def _wait_for_one_fewer(self, phase, count):
  kernel.Cta.wait_published(self, phase, count - 1)


def _consume(
  self, i, use, *, waits=True, slots_on=0, frees_first=False, frees_from=0
):
  """`consume` with choices that it should not have."""
  num_slots = jnp.int32(self.plan.num_slots)
  slot = lax.rem(i, num_slots)
  if waits:
    plgpu.barrier_wait(self.produced.at[slot])

  def free():
    @pl.when(i >= frees_from)
    def _():
      plgpu.barrier_arrive(self.consumed.at[slot])

  if frees_first:
    free()
  use(self.ring.at[lax.rem(i + slots_on, num_slots)])
  if not frees_first:
    free()
  return i + 1


def _consume_where(**faults):
  return _instead(consume=lambda self, i, use: _consume(self, i, use, **faults))


def _attend_to(more):
  """Masks as if the sequence were so many keys longer, and does nothing else.

  `attend_tile` takes all that it knows of the length from `positions`; the new
  key is put where it belongs.
  """

  def attend_tile(self, *args):
    with mock.patch.object(self, "positions", _Plus(self.positions, more)):
      return kernel.Cta.attend_tile(self, *args)

  def patch(self, tile, row, new):
    kernel.Cta.patch(self, tile, row - more, new)

  return _instead(attend_tile=attend_tile, patch=patch)


def _tiles_for(more):
  """Divides tiles as if the sequence were so many keys longer.

  Only the compute warpgroup does; the memory warpgroup streams the right ones.
  """
  return _in("attention_item", None, positions=lambda x: _Plus(x, more))


def _merge_nothing(self, j):
  # As if there had been no such part.
  pass


def _other_angles(operands):
  """Turns by the angles of the position after."""
  half = operands["cos"].shape[1]
  step = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)[None, :]
  cos, sin = operands["cos"], operands["sin"]
  return operands | dict(
    cos=cos * jnp.cos(step) - sin * jnp.sin(step),
    sin=sin * jnp.cos(step) + cos * jnp.sin(step),
  )


def _values_as_keys(geometry):
  # Heads from here on are not turned.
  heads = 2 * geometry.num_key_value_heads
  return dataclasses.replace(geometry, num_key_value_heads=heads)


def _other_norms(operands):
  return operands | dict(norms=jnp.roll(operands["norms"], 1, axis=0))


def _one_join_fewer(operands):
  return operands | dict(table=operands["table"].at[:, :, 2].add(-1))


def _after_next_neighbour(index):
  # Reads name the CTA only; writes name rows as well.
  return index if isinstance(index, tuple) else lax.rem(index + 1, jnp.int32(3))


def _shift_choice(self):
  # The other way, the largest would be clipped to the size of the vocabulary.
  self.best_index[...] = self.best_index[...] - jnp.int32(TILE)
  kernel.Cta.choose(self)


def _next_row(self, layer, b, head, position):
  kernel.Cta.extend_cache(self, layer, b, head, position + 1)


def _fill_with_padding(self, source, start, width, valid):
  kernel.Cta.fill_plain(self, source, start, width, None)


_FAULTS = {
  # Between CTAs.
  "published results are not awaited": _Fault(
    _TWO_CTAS, "races", _instead(wait_published=_nothing)
  ),
  "one publisher is not awaited": _Fault(
    _TWO_CTAS, "races", _instead(wait_published=_wait_for_one_fewer)
  ),
  "partial sums are not awaited": _Fault(
    _CUT_TILES, "races", _instead(wait_joined=_nothing)
  ),
  "parts of attention are not awaited": _Fault(
    _SPLIT_KEYS, "races", _instead(wait_joined=_nothing)
  ),
  "published before the store has arrived": _Fault(
    _TWO_CTAS, "races", _instead(publish=_publish_early)
  ),
  "joined before the store has arrived": _Fault(
    _CUT_TILES, "races", _instead(join=_join_early)
  ),
  # In the ring.
  "a chunk is not awaited": _Fault(
    _TWO_CTAS, "races", _consume_where(waits=False)
  ),
  "the slot after is multiplied": _Fault(
    _FEW_KEYS, "races", _consume_where(slots_on=1)
  ),
  "a slot is freed before it is read": _Fault(
    _LONG_STREAM, "races", _consume_where(frees_first=True)
  ),
  "a slot is never freed": _Fault(
    _FEW_KEYS, "deadlock: Barrier", _consume_where(frees_from=1)
  ),
  # In shared memory.
  "a tile is stored before it is committed": _Fault(
    _FEW_KEYS, "races", _in("store_tile", "commit_smem")
  ),
  "activations are not committed": _Fault(
    _FEW_KEYS, "races", _in("fill_from_row", "commit_smem")
  ),
  "new keys are stored before they are committed": _Fault(
    _FEW_KEYS, "races", _in("extend_cache", "commit_smem")
  ),
  "sums are overwritten while they are stored": _Fault(
    _FEW_KEYS, "races", _in("matmul", "wait_smem_to_gmem")
  ),
  # In what is computed.
  "one key too many": _Fault(_FEW_KEYS, "logits", _attend_to(1)),
  "one key too few": _Fault(_FEW_KEYS, "logits", _attend_to(-1)),
  "a tile of keys too many": _Fault(_FULL_TILE, "deadlock", _tiles_for(1)),
  "a tile of keys too few": _Fault(_NEXT_TILE, "deadlock", _tiles_for(-1)),
  "a part of attention is left out": _Fault(
    _SPLIT_KEYS, "logits", _instead(merge=_merge_nothing)
  ),
  "the angles of the next position": _Fault(
    _FEW_KEYS, "new rows", perturb=_other_angles
  ),
  "values are turned too": _Fault(
    _FEW_KEYS, "new rows", _in("finish_qkv", None, geometry=_values_as_keys)
  ),
  "the norm before": _Fault(_FEW_KEYS, "logits", perturb=_other_norms),
  "a partial sum is missing": _Fault(
    _CUT_TILES, "logits", perturb=_one_join_fewer
  ),
  "the partial sum of another neighbour": _Fault(
    _CUT_TILES,
    "logits",
    _in("matmul", None, partial=lambda x: _Moved(x, _after_next_neighbour)),
  ),
  "padding is multiplied": _Fault(
    _CUT_TILES, "logits", _instead(fill_plain=_fill_with_padding)
  ),
  "the vocabulary is a tile off": _Fault(
    _FEW_KEYS, "next ids", _instead(choose=_shift_choice)
  ),
  "the new key in the next row": _Fault(
    _FEW_KEYS, "other rows", _instead(extend_cache=_next_row)
  ),
}


@pytest.mark.parametrize("fault", _FAULTS.values(), ids=_FAULTS.keys())
def test_fault_is_found(fault, monkeypatch):
  is_deadlock = fault.found.startswith("deadlock")
  if is_deadlock:
    monkeypatch.setattr(interpreter, "DEADLOCK_S", 1.0)
  # What stops the interpreter comes by way of XLA.
  error = Exception if is_deadlock else AssertionError
  with pytest.raises(error, match=fault.found):
    check(fault.case, cta_class=fault.cta_class, perturb=fault.perturb)
  interpreter.reset()


@pytest.mark.parametrize(
  "case", dict.fromkeys(fault.case for fault in _FAULTS.values())
)
def test_without_a_fault_nothing_is_found(case):
  check(case, cta_class=kernel.Cta, perturb=None)
