"""Faults put into the kernel on purpose: each must turn the check red.

What is red is named: `check` reports all that it finds, and every fault says
what must be among it.

Out of reach of the interpreter: a word that is not written or read whole, since
there they always are; a `wgmma` that is not waited for; memory scopes.
"""

import contextlib
import dataclasses
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

from interpreted_step import NINE_CTAS, TINY, Case, check

from pallas_kernels import fragments, kernel, patching, steps, threads
from pallas_kernels.geometry import TILE

# One layer is enough unless a fault needs a second one; the interpreter's time
# goes by the operation.
_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)
_FEW_KEYS = Case(_LAYER, 1, 128, (2,))
_FULL_TILE = Case(_LAYER, 1, 128, (TILE - 1,))
_NEXT_TILE = Case(_LAYER, 1, 128, (TILE,))
# Longer than the ring has slots.
_LONG_STREAM = Case(TINY, 1, 64, (2,))
_LAST_SLOT = Case(_LAYER, 1, 64, (63,))
# The tokens after these are not the same ones.
_UNTIED = dataclasses.replace(_LAYER, tie_word_embeddings=False)
_OTHER_TOKEN = Case(_UNTIED, 1, 64, (2,))
_IDLE = Case(_UNTIED, 1, 64, (2, 0), (True, False))
_TWO_CTAS = Case(_LAYER, 2, 64, (2,))
_TWO_WGS = Case(_LAYER, 1, 64, (2,), compute_wgs=2)
_TWO_LAYERS = Case(TINY, 4, 128, (70,))
# Uneven runs, groups of fewer units than most.
_THREE_CTAS = Case(_LAYER, 3, 64, (2,))
# Two rounds, of which the first has nothing to patch, and so commits nothing.
_TWO_ROUNDS = Case(_LAYER, 1, 320, (300,))
# Two parts of one head's keys, five tiles and so a long and a short one.
_SPLIT_KEYS = Case(_LAYER, 2, 320, (300,))
_THREE_SPLITS = Case(_LAYER, 3, 640, (600,))


# ---- the tools of the saboteur ---------------------------------------------


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


def _words_of_the_layer_before(
  self, name, matmul, valid, block, stamp, norm=None
):
  kernel.Cta.receive_x(self, name, matmul, valid, block, stamp - 1, norm)


def _last_output(self, name, matmul, valid, block, stamp, norm=None):
  # The LM head's x by the words of every layer.
  if name == "final":
    name, stamp = "output", self.step * self.num_layers + self.num_layers
  kernel.Cta.receive_x(self, name, matmul, valid, block, stamp, norm)


def _norm_of_the_phase_before(self):
  # As if the sum of squares were another one.
  norm = kernel.Cta.norm.fget(self)
  return dataclasses.replace(norm, hidden_size=2 * norm.hidden_size)


def _send_as(change):
  """Sends results otherwise: `change` maps row, number of rows and stamp."""

  def send_results(self, name, row, num_rows, stamp, **kwargs):
    row, num_rows, stamp = change(row, num_rows, stamp)
    kernel.Cta.send_results(self, name, row, num_rows, stamp, **kwargs)

  return _instead(send_results=send_results)


def _chunks_where(*, waits=True, slots_on=0, frees_first=False, frees_from=0):
  """Takes chunks from the ring with choices that it should not have."""

  def arrived(self, i):
    num_slots = jnp.int32(self.plan.num_slots)
    slot = lax.rem(i, num_slots)
    if waits:
      plgpu.barrier_wait(self.produced.at[slot])
    if frees_first:
      plgpu.barrier_arrive(self.consumed.at[slot])
    return lax.rem(i + slots_on, num_slots)

  def free(self, i):
    @pl.when(i >= (jnp.int32(2**30) if frees_first else frees_from))
    def _():
      kernel.Cta.free(self, i)

  return _instead(arrived=arrived, free=free)


def _products(change):
  """Has other products than there are."""

  def multiply_units(self, *args):
    def store_own(products, *args, **kwargs):
      real([change(x) for x in products], *args, **kwargs)

    real = fragments.store_own
    with mock.patch.object(fragments, "store_own", store_own):
      kernel.Cta.multiply_units(self, *args)

  return _instead(multiply_units=multiply_units)


def _attend_to(more):
  """Masks as if the sequence were so many keys longer, and does nothing else.

  `attend_tiles` takes all that it knows of the length from `positions`; the new
  key is put where it belongs.
  """

  def attend_tiles(self, *args):
    def patch(ring, new, k_row, v_row, row, **kwargs):
      real(ring, new, k_row, v_row, row - more, **kwargs)

    real = patching.patch
    with (
      mock.patch.object(self, "positions", _Plus(self.positions, more)),
      mock.patch.object(patching, "patch", patch),
    ):
      return kernel.Cta.attend_tiles(self, *args)

  return _instead(attend_tiles=attend_tiles)


def _tiles_for(more):
  """Divides tiles as if the sequence were so many keys longer.

  Only the compute warpgroup does; the memory warpgroup streams the right ones.
  """
  return _in("attention_item", None, positions=lambda x: _Plus(x, more))


def _fewer_keys(self, place, upper, lower, user, in_flight, wanted=None):
  # As if half of the last tile were enough for all of it.
  wanted = None if wanted is None else wanted - TILE // 2
  return kernel.Cta.load_halves(
    self, place, upper, lower, user, in_flight, wanted
  )


def _merge_nothing(self, item, num_parts, stamp, state):
  # As if there had been no such part.
  return state


def _merge_the_next_layers(self, item, num_parts, stamp, state):
  return kernel.Cta.merge(self, item, num_parts, stamp + 1, state)


def _other_angles(operands):
  """Turns by the angles of the position after."""
  now = operands["progress"][steps.CLOCK, 0]
  cos, sin = operands["angles"][now]
  half = cos.shape[1]
  step = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)[None, :]
  return operands | dict(
    angles=operands["angles"]
    .at[now]
    .set(
      jnp.stack(
        [
          cos * jnp.cos(step) - sin * jnp.sin(step),
          sin * jnp.cos(step) + cos * jnp.sin(step),
        ]
      )
    )
  )


def _values_as_keys(geometry):
  # Heads from here on are not turned.
  heads = 2 * geometry.num_key_value_heads
  return dataclasses.replace(geometry, num_key_value_heads=heads)


def _other_norms(operands):
  return operands | dict(norms=jnp.roll(operands["norms"], 1, axis=0))


def _first_segment_missing(products):
  col = jnp.arange(products.shape[1], dtype=jnp.int32)
  return jnp.where((col > 0)[None, :], products, jnp.float32(0))


def _next_rows_residual(runs):
  return runs | dict(o=(runs["o"][0] + 1, runs["o"][1]))


def _shift_choice(self, stamp):
  # The other way, the largest would be clipped to the size of the vocabulary.
  self.best.at[1][...] = self.best[1] - jnp.float32(8)
  kernel.Cta.choose(self, stamp)


def _stay(row):
  """Leaves a row of `progress` as it was."""

  def proceed(self, b, before, chosen):
    kernel.Cta.proceed(self, b, before, chosen)
    self.next_progress[row, b] = self.progress[row, b]

  return _instead(proceed=proceed)


class _Alone(threads.Team):
  """Warpgroups that do not wait for each other."""

  def meet(self):
    pass


def _never_meet(self, *args):
  kernel.Cta.__init__(self, *args)
  self.team = _Alone(self.team.num_wgs, self.team.barrier)


def _others_turn(self, count, body):
  def other(n):
    body(jnp.where(count > 1, n ^ 1, n))

  kernel.Cta.take_turns(self, count, other)


def _one_turn_less(self, count, body):
  kernel.Cta.take_turns(self, count - self.wg, body)


def _count_nothing(self, num):
  del num
  kernel.Cta.tick(self, 0)


def _one_slot_more(plan):
  return dataclasses.replace(plan, capacity=plan.capacity + 1)


def _next_row(self, layer, b, head, position):
  kernel.Cta.extend_cache(self, layer, b, head, position + 1)


_FAULTS = {
  # Between CTAs.
  "results are not awaited": _Fault(
    _TWO_CTAS, "races", _instead(receive_x=_nothing)
  ),
  "results of the layer before are taken": _Fault(
    _TWO_LAYERS,
    "written again|is taken for",
    _instead(receive_x=_words_of_the_layer_before),
  ),
  "who has seen no layer waits for the last one's words": _Fault(
    NINE_CTAS, "is taken for", _instead(receive_x=_last_output)
  ),
  "results bear the next layer's stamp": _Fault(
    _TWO_CTAS, "written again|deadlock", _send_as(lambda r, n, s: (r, n, s + 1))
  ),
  "results go to the next unit's place": _Fault(
    _TWO_CTAS, "is sent with|deadlock", _send_as(lambda r, n, s: (r + 8, n, s))
  ),
  "one unit's results are not sent": _Fault(
    _TWO_CTAS, "deadlock", _send_as(lambda r, n, s: (r, n - 8, s))
  ),
  "results of units that are another's are sent": _Fault(
    _THREE_CTAS,
    "is sent with",
    _send_as(lambda r, n, s: (r, n + 8, s)),
  ),
  "padding is awaited": _Fault(
    _TWO_CTAS, "deadlock", _instead(_whole=lambda *args: True)
  ),
  # In the ring.
  "a chunk is not awaited": _Fault(
    _TWO_CTAS,
    "no threads observed|for the first time",
    _chunks_where(waits=False),
  ),
  "the slot after is multiplied": _Fault(
    _FEW_KEYS, "races", _chunks_where(slots_on=1)
  ),
  "a slot is freed before it is read": _Fault(
    _LONG_STREAM, "races", _chunks_where(frees_first=True)
  ),
  "a slot is never freed": _Fault(
    _FEW_KEYS, "deadlock: Barrier", _chunks_where(frees_from=1)
  ),
  # Between compute warpgroups. Without a meeting, one of them may also read what
  # shared memory held before under another name; that stops it, and others wait.
  "warpgroups do not meet": _Fault(
    _TWO_WGS, "races|deadlock", _instead(__init__=_never_meet)
  ),
  "a unit of the other warpgroup's is taken": _Fault(
    _TWO_WGS, "deadlock", _instead(take_turns=_others_turn)
  ),
  "one of the second warpgroup's units is left out": _Fault(
    _TWO_WGS, "deadlock", _instead(take_turns=_one_turn_less)
  ),
  # In shared memory.
  "activations are not committed": _Fault(
    _FEW_KEYS, "races", _in("compute", "commit_smem")
  ),
  "queries and new keys are not committed": _Fault(
    _TWO_ROUNDS, "races", _in("receive_new", "commit_smem")
  ),
  "weights of keys are not committed": _Fault(
    _FEW_KEYS, "races", _in("attend_tiles", "commit_smem")
  ),
  # In what is computed.
  "one key too many": _Fault(_FEW_KEYS, "logits", _attend_to(1)),
  "one key too few": _Fault(_FEW_KEYS, "logits", _attend_to(-1)),
  "a tile of keys too many": _Fault(_FULL_TILE, "deadlock", _tiles_for(1)),
  "a tile of keys too few": _Fault(_NEXT_TILE, "deadlock", _tiles_for(-1)),
  "half of the last tile is not loaded": _Fault(
    _FULL_TILE, "logits", _instead(load_halves=_fewer_keys)
  ),
  "a part of attention is left out": _Fault(
    _SPLIT_KEYS, "logits", _instead(merge=_merge_nothing)
  ),
  "one part of attention is left out": _Fault(
    _THREE_SPLITS,
    "logits",
    _instead(
      merge=lambda self, item, n, *args: kernel.Cta.merge(
        self, item, n - 1, *args
      )
    ),
  ),
  "the next layer's parts are awaited": _Fault(
    _SPLIT_KEYS, "deadlock", _instead(merge=_merge_the_next_layers)
  ),
  "the angles of the next position": _Fault(
    _FEW_KEYS, "new rows", perturb=_other_angles
  ),
  "values are turned too": _Fault(
    _FEW_KEYS, "new rows", _in("finish_qkv", None, geometry=_values_as_keys)
  ),
  "the norm before": _Fault(_FEW_KEYS, "logits", perturb=_other_norms),
  "the RMS of something else": _Fault(
    _FEW_KEYS, "logits", _instead(norm=property(_norm_of_the_phase_before))
  ),
  "a segment meets its neighbour's columns": _Fault(
    _FEW_KEYS, "logits", _products(lambda x: jnp.roll(x, 1, axis=1))
  ),
  "a partial sum is missing": _Fault(
    _FEW_KEYS, "logits", _products(_first_segment_missing)
  ),
  "the residual of the next rows": _Fault(
    _FEW_KEYS, "logits", _in("embed", None, runs=_next_rows_residual)
  ),
  "the vocabulary is a unit off": _Fault(
    _FEW_KEYS, "next ids", _instead(choose=_shift_choice)
  ),
  "the new key in the next row": _Fault(
    _FEW_KEYS, "other rows", _instead(extend_cache=_next_row)
  ),
  # From step to step.
  "stamps are those of the first step": _Fault(
    _TWO_CTAS, "is taken for", _in("compute", None, step=lambda x: x - 1)
  ),
  "the angles of the first step": _Fault(
    _FEW_KEYS, "new rows", _in("load_angles", None, step=lambda x: x - 1)
  ),
  "tokens stay": _Fault(_OTHER_TOKEN, "next ids", _stay(steps.TOKEN_IDS)),
  "positions stay": _Fault(_FEW_KEYS, "positions", _stay(steps.POSITIONS)),
  "a full cache ends nothing": _Fault(
    _LAST_SLOT, "activity", _in("proceed", None, plan=_one_slot_more)
  ),
  "what is idle goes on": _Fault(
    _IDLE, "kept ids", _in("standing", None, active=lambda x: _Plus(x, 1))
  ),
  "tokens go to the first step's row": _Fault(
    _FEW_KEYS, "emitted", _in("proceed", None, step=lambda x: x - 1)
  ),
  "steps are not counted": _Fault(
    _FEW_KEYS, "clock", _instead(tick=_count_nothing)
  ),
}


@pytest.mark.parametrize("fault", _FAULTS.values(), ids=_FAULTS.keys())
def test_fault_is_found(fault, monkeypatch):
  # What stops the interpreter is no assertion, and comes by way of XLA.
  compared = {
    *("logits", "next ids", "new rows", "other rows", "races"),
    *("kept ids", "positions", "activity", "clock", "emitted"),
  }
  found = set(fault.found.split("|"))
  if not found & compared:
    monkeypatch.setattr(interpreter, "DEADLOCK_S", 1.0)
  error = AssertionError if found <= compared else Exception
  with pytest.raises(error, match=fault.found):
    check(fault.case, cta_class=fault.cta_class, perturb=fault.perturb)
  interpreter.reset()


@pytest.mark.parametrize(
  "case", dict.fromkeys(fault.case for fault in _FAULTS.values())
)
def test_without_a_fault_nothing_is_found(case):
  check(case, cta_class=kernel.Cta, perturb=None)
