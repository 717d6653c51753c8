"""The emulator on codes of 4 and 8 bits, set against plain `jnp`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import emulator, interpreter

if interpreter.missing() is not None:
  pytest.skip(interpreter.missing(), allow_module_level=True)

from interpreted_step import (
  TINY,
  WIDE,
  Case,
  assert_close,
  interpret,
  make_step,
  pack,
  plan_of,
  reference,
)
from test_kernel_codes import FORMATS

from pallas_kernels.formats import BF16
from pallas_kernels.plan import LM_HEAD, QKV

# Several chunks in a row, of 4 bits too, and padding of rows and columns.
_LONG = dataclasses.replace(
  WIDE, hidden_size=1152, intermediate_size=4224, num_hidden_layers=1
)


def _check(case):
  s = make_step(case)
  trace = emulator.run(plan_of(case), pack(case, plan_of(case), s))
  logits, *new = map(np.asarray, reference(case, s))
  ours = trace.logits[:, : case.geometry.vocab_size]
  assert_close(ours, logits)
  np.testing.assert_array_equal(trace.next_ids, ours.argmax(-1))
  for cache, entries in zip((trace.k_cache, trace.v_cache), new, strict=True):
    for b, position in enumerate(case.positions):
      actual = cache[:, b, :, position].astype(np.float32)
      assert_close(actual, entries[:, b])
  return trace


@pytest.mark.parametrize("name", FORMATS)
def test_step(name):
  _check(Case(TINY, 3, 64, (5,), layer_format=FORMATS[name]))


@pytest.mark.parametrize(
  ("name", "num_ctas"),
  [("int4_g128", 5), ("q4_1", 132), ("int8", 1), ("fp8", 5)],
)
def test_three_sequences_of_padded_rows(name, num_ctas):
  active = (True,) * 3
  case = Case(_LONG, num_ctas, 128, (5, 64, 0), active, FORMATS[name])
  assert plan_of(case).schedule.down.chunks_per_unit > 1
  _check(case)


# An LM head of its own and one that is the embedding, of several chunks in a row,
# with layers of other codes and of none.
@pytest.mark.parametrize(
  ("geometry", "layer_format", "head_format", "num_ctas"),
  [
    (TINY, "int4_g128", "int8", 3),
    (_LONG, "int8", "int8_g32", 5),
    (_LONG, None, "int8", 132),
  ],
)
def test_head(geometry, layer_format, head_format, num_ctas):
  layers = BF16 if layer_format is None else FORMATS[layer_format]
  formats = layers, FORMATS[head_format]
  case = Case(geometry, num_ctas, 128, (5, 64), (True,) * 2, *formats)
  trace = _check(case)
  s = make_step(case)
  operands = pack(case, plan_of(case), s)
  wrong = {**operands, "s_lm_head": jnp.roll(operands["s_lm_head"], 1, axis=-1)}
  found = emulator.run(plan_of(case), wrong)
  assert (found.logits != trace.logits).any()


def test_number_of_ctas_changes_nothing():
  traces = []
  for num_ctas in (1, 7):
    case = Case(TINY, num_ctas, 64, (5,), layer_format=FORMATS["int4_g64"])
    operands = pack(case, plan_of(case), make_step(case))
    traces.append(emulator.run(plan_of(case), operands))
  np.testing.assert_array_equal(traces[0].logits, traces[1].logits)


def test_a_step_stops_after_a_phase():
  case = Case(TINY, 2, 64, (5,), layer_format=FORMATS["int8_g32"])
  operands = pack(case, plan_of(case), make_step(case))
  begin = emulator.run(plan_of(case), operands, (0, QKV))
  assert not np.isnan(begin.qkv).any()
  assert np.isnan(begin.attended).all()
  end = emulator.run(plan_of(case), operands, (1, LM_HEAD))
  assert not np.isnan(end.logits).any()


def test_is_close_to_the_interpreter():
  case = Case(TINY, 3, 64, (5,), layer_format=FORMATS["int4_g128"])
  s = make_step(case)
  (logits, changed), _ = interpret(case, s, detect_races=False)
  trace = _check(case)
  assert_close(trace.logits[:, : TINY.vocab_size], logits)
  np.testing.assert_array_equal(trace.next_ids, logits.argmax(-1))
  for ours, name in ((trace.k_cache, "k_cache"), (trace.v_cache, "v_cache")):
    assert_close(ours.astype(np.float32), changed[name].astype(np.float32))
  np.testing.assert_array_equal(trace.progress[:, 0], changed["progress"][:, 0])


def test_scales_of_another_layer_are_seen():
  case = Case(TINY, 2, 64, (5,), layer_format=FORMATS["int4_g64"])
  operands = pack(case, plan_of(case), make_step(case))
  right = emulator.run(plan_of(case), operands)
  wrong = {**operands, "s_down": operands["s_down"][::-1]}
  found = emulator.run(plan_of(case), wrong)
  assert (found.logits != right.logits).any()
