"""Tests of `pallas_kernels.packing`: inverses bit for bit, and where things go.

Matrices here are random bits, so that NaN payloads, negative zeros and
subnormal numbers are among them.
"""

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import packing
from pallas_kernels.geometry import Geometry
from pallas_kernels.schedule import Matmul, make_schedule


def _bits(*shape, seed=0):
  rng = np.random.default_rng(seed)
  bits = rng.integers(0, 2**16, size=shape, dtype=np.uint16)
  return bits.view(ml_dtypes.bfloat16)


def _assert_same_bits(actual, desired):
  actual, desired = np.asarray(actual), np.asarray(desired)
  assert actual.dtype == desired.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(actual.view(np.uint16), desired.view(np.uint16))


def test_random_bits_have_what_copies_may_lose():
  x = _bits(128, 576)
  as_float = x.astype(np.float32)
  bits = x.view(np.uint16)
  assert len(np.unique(bits[np.isnan(as_float)])) > 100
  assert np.isinf(as_float).any()
  assert (bits == 0x8000).any()
  assert ((bits & 0x7F80 == 0) & (bits & 0x7F != 0)).any()


def _geometry(**fields):
  sizes = dict(
    hidden_size=200,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=100,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
  )
  return Geometry(**{**sizes, **fields})


# Names are widths. Of 1024, all sizes are whole units and chunks.
_GEOMETRIES = {
  "1100": _geometry(hidden_size=1100, intermediate_size=2050, head_dim=128),
  "1024": _geometry(
    hidden_size=1024,
    intermediate_size=1024,
    num_attention_heads=8,
    head_dim=128,
    vocab_size=96,
  ),
  "203": _geometry(
    hidden_size=203,
    intermediate_size=97,
    num_attention_heads=3,
    num_key_value_heads=1,
  ),
}


def _sizes(g):
  """Rows and columns of each matrix before padding, in packed order."""
  heads = g.num_attention_heads + 2 * g.num_key_value_heads
  return dict(
    qkv=(heads * g.head_dim, g.hidden_size),
    o=(g.hidden_size, g.num_attention_heads * g.head_dim),
    gate_up=(2 * g.intermediate_size, g.hidden_size),
    down=(g.hidden_size, g.intermediate_size),
    lm_head=(g.vocab_size, g.hidden_size),
  )


@pytest.mark.parametrize("num_ctas", [1, 3, 132])
@pytest.mark.parametrize("name", _GEOMETRIES)
def test_matrices_come_back_and_padding_is_zero(name, num_ctas):
  g = _GEOMETRIES[name]
  for matmul in make_schedule(g, num_ctas).matmuls:
    out, cols = _sizes(g)[matmul.name]
    rows = _bits(out, cols)
    packed = packing.pack_matrix(matmul, rows)
    assert packed.shape == (num_ctas, matmul.run_chunks, 128, 64)
    unpacked = packing.unpack_matrix(matmul, packed, out, cols)
    _assert_same_bits(unpacked, rows)
    # What else there is, is zero: positive, so that sums keep their sign.
    whole = packing.unpack_matrix(matmul, packed, matmul.rows, matmul.cols)
    padded = np.zeros((matmul.rows, matmul.cols), ml_dtypes.bfloat16)
    padded[:out, :cols] = rows
    _assert_same_bits(whole, padded)
    num_chunks = matmul.num_units * matmul.chunks_per_unit
    beyond = np.asarray(packed).reshape(-1, 128, 64)[num_chunks:]
    _assert_same_bits(beyond, np.zeros_like(beyond))


def test_layers_are_packed_one_by_one():
  matmul = make_schedule(_GEOMETRIES["203"], 5).down
  rows = _bits(2, 203, 97)
  packed = packing.pack_matrix(matmul, rows)
  for layer in range(2):
    alone = packing.pack_matrix(matmul, rows[layer])
    _assert_same_bits(packed[layer], alone)
  _assert_same_bits(packing.unpack_matrix(matmul, packed, 203, 97), rows)


@pytest.mark.parametrize("num_ctas", [1, 2, 7, 132])
def test_elements_are_where_the_kernel_looks(num_ctas):
  out, cols = 299, 2900
  matmul = Matmul("any", 304, 3072, num_ctas)
  rows = _bits(out, cols)
  packed = np.asarray(packing.pack_matrix(matmul, rows))
  r, c = np.meshgrid(np.arange(out), np.arange(cols), indexing="ij")
  # Columns are 8 segments. Chunks in order: all columns of 8 rows, 128 columns
  # of each segment at a time; in a chunk, all rows' and segments' columns 64 to
  # 127 lie below their columns 0 to 63.
  segment, c = np.divmod(c, 3072 // 8)
  chunk, c = np.divmod(c, 128)
  half, c = np.divmod(c, 64)
  unit, r = np.divmod(r, 8)
  cta, unit = np.divmod(unit, matmul.run)
  found = packed[cta, unit * 3 + chunk, 64 * half + 8 * r + segment, c]
  _assert_same_bits(found, rows)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_partners_are_neighbours(head_dim):
  rows = _bits(2, 3 * head_dim, 40)
  permuted = packing.permute_heads(rows, head_dim)
  _assert_same_bits(packing.unpermute_heads(permuted, head_dim), rows)
  permuted = np.asarray(permuted)
  for head in range(3):
    first, second = np.split(rows[:, head * head_dim :][:, :head_dim], 2, 1)
    for i in range(head_dim // 2):
      at = head * head_dim + 2 * i
      _assert_same_bits(permuted[:, at], first[:, i])
      _assert_same_bits(permuted[:, at + 1], second[:, i])


@pytest.mark.parametrize("f", [96, 97, 1])
def test_gate_and_up_are_neighbours(f):
  gate, up = _bits(2, f, 40), _bits(2, f, 40, seed=1)
  rows = np.asarray(packing.interleave(gate, up))
  assert rows.shape == (2, 2 * f, 40)
  _assert_same_bits(rows[:, 0::2], gate)
  _assert_same_bits(rows[:, 1::2], up)
  # With a matrix's padding or without.
  padded = np.pad(rows, ((0, 0), (0, -2 * f % 8), (0, 0)))
  for both in (rows, padded):
    found = packing.deinterleave(both, f)
    for x, desired in zip(found, (gate, up), strict=True):
      _assert_same_bits(x, desired)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_compiled_round_trip_keeps_all_bits(head_dim):
  matmul = Matmul("any", 2 * 256, 1024, 3)
  gate, up = _bits(2, 256, 200), _bits(2, 256, 200, seed=1)

  @jax.jit
  def pack(gate, up):
    gate = packing.permute_heads(gate, head_dim)
    return packing.pack_matrix(matmul, packing.interleave(gate, up))

  @jax.jit
  def unpack(packed):
    rows = packing.unpack_matrix(matmul, packed, 512, 200)
    gate, up = packing.deinterleave(rows, 256)
    return packing.unpermute_heads(gate, head_dim), up

  for found, desired in zip(unpack(pack(gate, up)), (gate, up), strict=True):
    _assert_same_bits(found, desired)
