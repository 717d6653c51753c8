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


_GEOMETRIES = {
  "576": _geometry(hidden_size=576, intermediate_size=200, head_dim=128),
  "128": _geometry(hidden_size=128),
  "200": _geometry(num_attention_heads=3, num_key_value_heads=1),
}


def _sizes(g):
  """Rows and columns of each matrix before padding, in packed order."""
  heads = g.num_attention_heads + 2 * g.num_key_value_heads
  return dict(
    qkv=(heads * g.head_dim, g.hidden_size),
    o=(g.hidden_size, g.num_attention_heads * g.head_dim),
    gate_up=(-(-g.intermediate_size // 32) * 64, g.hidden_size),
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
    assert packed.shape == (num_ctas, matmul.run, 128, 64)
    unpacked = packing.unpack_matrix(matmul, packed, out, cols)
    _assert_same_bits(unpacked, rows)
    # What else there is, is zero: positive, so that sums keep their sign.
    whole = packing.unpack_matrix(matmul, packed, matmul.rows, matmul.cols)
    padded = np.zeros((matmul.rows, matmul.cols), ml_dtypes.bfloat16)
    padded[:out, :cols] = rows
    _assert_same_bits(whole, padded)
    beyond = np.asarray(packed).reshape(-1, 128, 64)[matmul.num_chunks :]
    _assert_same_bits(beyond, np.zeros_like(beyond))


def test_layers_are_packed_one_by_one():
  matmul = make_schedule(_GEOMETRIES["200"], 5).down
  rows = _bits(2, 200, 96)
  packed = packing.pack_matrix(matmul, rows)
  for layer in range(2):
    alone = packing.pack_matrix(matmul, rows[layer])
    _assert_same_bits(packed[layer], alone)
  _assert_same_bits(packing.unpack_matrix(matmul, packed, 200, 96), rows)


@pytest.mark.parametrize("num_ctas", [1, 2, 7, 132])
def test_elements_are_where_the_kernel_looks(num_ctas):
  out, cols = 300, 456
  matmul = Matmul("any", 320, 512, num_ctas)
  rows = _bits(out, cols)
  packed = np.asarray(packing.pack_matrix(matmul, rows))
  r, c = np.meshgrid(np.arange(out), np.arange(cols), indexing="ij")
  # Chunks in order: all columns of 64 rows, 128 columns at a time; in a chunk,
  # columns 64 to 127 lie below columns 0 to 63.
  chunk = (r // 64) * (512 // 128) + c // 128
  found = packed[
    chunk // matmul.run,
    chunk % matmul.run,
    64 * (c % 128 // 64) + r % 64,
    c % 64,
  ]
  _assert_same_bits(found, rows)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_partners_meet_in_a_tile(head_dim):
  rows = _bits(2, 3 * head_dim, 40)
  permuted = packing.permute_heads(rows, head_dim)
  _assert_same_bits(packing.unpermute_heads(permuted, head_dim), rows)
  permuted = np.asarray(permuted)
  for head in range(3):
    for i in range(head_dim // 2):
      tile = head * (head_dim // 64) + i // 32
      first = rows[:, head * head_dim + i]
      second = rows[:, head * head_dim + head_dim // 2 + i]
      _assert_same_bits(permuted[:, 64 * tile + i % 32], first)
      _assert_same_bits(permuted[:, 64 * tile + 32 + i % 32], second)


@pytest.mark.parametrize("f", [96, 200, 64])
def test_gate_and_up_meet_in_a_tile(f):
  gate, up = _bits(2, f, 40), _bits(2, f, 40, seed=1)
  rows = packing.interleave(gate, up)
  for found, desired in zip(
    packing.deinterleave(rows, f), (gate, up), strict=True
  ):
    _assert_same_bits(found, desired)
  rows = np.asarray(rows)
  assert rows.shape == (2, -(-f // 32) * 64, 40)
  met = np.zeros(rows.shape[1], bool)
  for i in range(f):
    at = 64 * (i // 32) + i % 32
    _assert_same_bits(rows[:, at], gate[:, i])
    _assert_same_bits(rows[:, at + 32], up[:, i])
    met[[at, at + 32]] = True
  _assert_same_bits(rows[:, ~met], np.zeros_like(rows[:, ~met]))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_compiled_round_trip_keeps_all_bits(head_dim):
  matmul = Matmul("any", 2 * 256, 256, 3)
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
