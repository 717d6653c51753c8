"""The kernel on codes of 4 and 8 bits, in Pallas' interpreter."""

import dataclasses

import pytest

from pallas_kernels import interpreter
from pallas_kernels.formats import BF16, Format

if interpreter.missing() is not None:
  pytest.skip(interpreter.missing(), allow_module_level=True)

from interpreted_step import TINY, WIDE, Case, check, plan_of

# Each kind of code, of scale, and of what is beside it.
FORMATS = {
  "int4_g128": Format(4, group=128),
  "int4_g64": Format(4, group=64, scale="float16"),
  "int4_g32_asym": Format(4, group=32, beside="zero"),
  "q4_1": Format(4, group=32, scale="float16", beside="minimum"),
  "int8": Format(8, scale="float32"),
  "int8_g32": Format(8, group=32, scale="float16"),
  "fp8": Format(8, is_float=True),
}
# Two sequences, heads of 128.
_WIDE = dataclasses.replace(
  WIDE,
  hidden_size=128,
  num_hidden_layers=1,
  num_attention_heads=2,
  vocab_size=64,
)
# Widths of the MLP, whose rows are then several chunks, the last one padded: 5 of
# 128 columns of each segment of 4 bits, and 3 of 8 bits.
_LONG = {"int4_g32_asym": 4224, "fp8": 2176}


@pytest.mark.parametrize("name", FORMATS)
def test_step(name):
  check(Case(TINY, 3, 64, (5,), layer_format=FORMATS[name]), detect_races=False)


def test_two_compute_warpgroups():
  case = Case(TINY, 3, 64, (5,), layer_format=FORMATS["int4_g32_asym"])
  check(dataclasses.replace(case, compute_wgs=2), detect_races=False)


# One scale of each of the head's rows, or eight of it in a chunk, beside layers of
# other codes and of none.
@pytest.mark.parametrize(
  ("layer_format", "head_format"),
  [("int4_g128", "int8"), (None, "int8"), ("fp8", "int8_g32")],
)
def test_head(layer_format, head_format):
  layers = BF16 if layer_format is None else FORMATS[layer_format]
  geometry = dataclasses.replace(TINY, num_hidden_layers=1)
  case = Case(
    geometry, 3, 64, (5,), layer_format=layers, head_format=FORMATS[head_format]
  )
  check(case, detect_races=False)


def test_head_of_its_own():
  # Rows that are not whole units, three chunks in each, and CTAs without any.
  geometry = dataclasses.replace(
    _WIDE, hidden_size=2176, intermediate_size=320, vocab_size=42
  )
  formats = FORMATS["int4_g64"], FORMATS["int8"]
  case = Case(geometry, 5, 64, (5, 9), (True, True), *formats)
  assert plan_of(case).schedule.lm_head.chunks_per_unit == 3
  check(case, detect_races=False)


@pytest.mark.parametrize("name", _LONG)
def test_long_rows(name):
  geometry = dataclasses.replace(_WIDE, intermediate_size=_LONG[name])
  case = Case(geometry, 5, 64, (5, 9), (True, True), FORMATS[name])
  assert plan_of(case).schedule.down.chunks_per_unit > 1
  check(case, detect_races=False)
