"""Faults put into codes, scales and what turns them: each turns the check red."""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels import interpreter

if interpreter.missing():
  pytest.skip(interpreter.missing(), allow_module_level=True)

from interpreted_step import TINY, Case, check

from pallas_kernels.formats import BF16, Format

_LAYER = dataclasses.replace(TINY, num_hidden_layers=1)
# Of rows of 128, four groups; each has its scale and zero point.
_CASE = Case(
  _LAYER, 1, 64, (2,), layer_format=Format(4, group=32, beside="zero")
)

# Rows of the head have a scale each.
_HEAD = dataclasses.replace(
  _CASE, layer_format=BF16, head_format=Format(8, scale="float32")
)


def _change(change, *names):
  """Returns what maps the operands of these names by `change`."""

  def perturb(operands):
    return operands | {name: change(operands[name]) for name in names}

  return perturb


def _bytes_changed(change):
  """Maps the bytes of chunks."""

  def changed(chunks):
    return change(chunks.view(jnp.uint8)).view(jnp.bfloat16)

  return changed


def _entries_changed(change):
  """Maps scales `[..., 64, spans]`, int32, a row of the operand after another."""

  def changed(rows):
    *lead, num_rows, words = rows.shape
    entries = rows.reshape(*lead, 64, num_rows * words // 64)
    return change(entries).reshape(rows.shape)

  return changed


_FAULTS = {
  "nibbles are swapped": _change(
    _bytes_changed(lambda x: x >> 4 | x << 4), "w_down"
  ),
  "pieces are in another order": _change(
    _bytes_changed(
      lambda x: jnp.flip(x.reshape(*x.shape[:-1], 8, 16), -2).reshape(x.shape)
    ),
    "w_qkv",
  ),
  "scales of the next group": _change(
    _entries_changed(lambda x: jnp.roll(x, 1, axis=-1)), "s_gate_up"
  ),
  "scales of the row below": _change(
    _entries_changed(lambda x: jnp.roll(x, 8, axis=-2)), "s_o"
  ),
  "scales of the next segment": _change(
    _entries_changed(lambda x: jnp.roll(x, 1, axis=-2)), "s_qkv"
  ),
  "zeros are one too many": _change(lambda x: x + (1 << 16), "s_down"),
  "scales of the next chunk": _change(
    lambda x: jnp.roll(x, 1, axis=-3), "s_gate_up"
  ),
}


_FAULTS_OF_HEAD = {
  "scales of the row below": _change(
    _entries_changed(lambda x: jnp.roll(x, 8, axis=-2)), "s_lm_head"
  ),
  "scales of the next unit": _change(
    lambda x: jnp.roll(x, 1, axis=-3), "s_lm_head"
  ),
  "codes without a sign": _change(
    _bytes_changed(lambda x: x ^ 0x80), "w_lm_head"
  ),
}


@pytest.mark.parametrize("perturb", _FAULTS.values(), ids=_FAULTS.keys())
def test_fault_is_found(perturb):
  with pytest.raises(AssertionError, match="logits|new rows"):
    check(_CASE, perturb=perturb, detect_races=False)


@pytest.mark.parametrize(
  "perturb", _FAULTS_OF_HEAD.values(), ids=_FAULTS_OF_HEAD.keys()
)
def test_fault_of_the_head_is_found(perturb):
  with pytest.raises(AssertionError, match="logits"):
    check(_HEAD, perturb=perturb, detect_races=False)


@pytest.mark.parametrize("case", [_CASE, _HEAD], ids=["layers", "head"])
def test_without_a_fault_nothing_is_found(case):
  check(case, detect_races=False)
