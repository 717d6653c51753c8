"""Tests of `pallas_kernels.schedule`: the table against brute-force counts."""

import collections
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import geometry, schedule
from pallas_kernels.geometry import Geometry
from pallas_kernels.plan import make_plan
from pallas_kernels.schedule import Matmul, make_schedule, split_of


def _geometry(d, f, num_layers, n, k, h, v, tied=True):
  return Geometry(
    hidden_size=d,
    intermediate_size=f,
    num_hidden_layers=num_layers,
    num_attention_heads=n,
    num_key_value_heads=k,
    head_dim=h,
    vocab_size=v,
    rms_norm_eps=1e-5,
    tie_word_embeddings=tied,
  )


_MODELS = {
  "llama-3.2-1b": _geometry(2048, 8192, 16, 32, 8, 64, 128256),
  "llama-3.2-3b": _geometry(3072, 8192, 28, 24, 8, 128, 128256),
  "llama-3.1-8b": _geometry(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
  "smollm2-135m": _geometry(576, 1536, 30, 9, 3, 64, 49152),
  "tiny": _geometry(256, 768, 4, 4, 2, 64, 384),
  # Nothing fits and D is not N H.
  "odd": _geometry(200, 96, 2, 6, 2, 128, 100),
}
_NUM_CTAS = (1, 2, 3, 4, 7, 78, 114, 132)
_POSITIONS = (0, 1, 63, 64, 65, 127, 128, 1000, 4095, 131071)


def _streams(matmul):
  """Returns the CTA that streams each chunk, having checked it is just one."""
  times = np.zeros(matmul.num_chunks, int)
  cta_of = np.zeros(matmul.num_chunks, int)
  for cta, (first, count, _) in enumerate(matmul.table().tolist()):
    assert 0 <= first <= first + count <= matmul.num_chunks
    assert count <= matmul.run
    times[first : first + count] += 1
    cta_of[first : first + count] = cta
  np.testing.assert_array_equal(times, 1)
  return cta_of.tolist()


def _check(matmul):
  """Checks a table against what follows from who streams which chunk."""
  table = matmul.table()
  assert table.shape == (matmul.num_ctas, 3)
  assert table.dtype == np.int32
  cta_of = _streams(matmul)
  per_tile = matmul.chunks_per_tile
  joins = collections.Counter()
  handed_on = collections.Counter()
  owners = set()
  for tile in range(matmul.num_tiles):
    # In the order of the columns; an owner adds the parts of the CTAs after it.
    ctas = list(dict.fromkeys(cta_of[tile * per_tile : (tile + 1) * per_tile]))
    owner = ctas[0]
    assert ctas == list(range(owner, owner + len(ctas)))
    assert owner == tile * per_tile // matmul.run
    owners.add(owner)
    # Only an owner's last tile goes on in other CTAs.
    assert joins[owner] == 0
    joins[owner] = len(ctas) - 1
    handed_on.update(ctas[1:])
  assert table[:, 2].tolist() == [joins[cta] for cta in range(len(table))]
  assert max(handed_on.values(), default=0) <= 1
  assert matmul.num_owners == len(owners)


@pytest.mark.parametrize("num_ctas", _NUM_CTAS)
@pytest.mark.parametrize("name", _MODELS)
def test_tables_agree_with_brute_force(name, num_ctas):
  plan = make_schedule(_MODELS[name], num_ctas)
  for matmul in plan.matmuls:
    _check(matmul)
  np.testing.assert_array_equal(
    plan.table(), np.stack([m.table() for m in plan.matmuls], axis=1)
  )


@hypothesis.given(
  tiles=st.integers(1, 60), chunks=st.integers(1, 40), p=st.integers(1, 150)
)
def test_tables_of_any_matrix_agree_with_brute_force(tiles, chunks, p):
  _check(Matmul("any", 64 * tiles, 128 * chunks, p))


def _num_cuts(matmul, run):
  return sum(
    start % matmul.chunks_per_tile != 0
    for start in range(run, matmul.num_chunks, run)
  )


@pytest.mark.parametrize("num_ctas", _NUM_CTAS)
@pytest.mark.parametrize("name", _MODELS)
def test_runs_are_nearly_even(name, num_ctas):
  for matmul in make_schedule(_MODELS[name], num_ctas).matmuls:
    even = -(-matmul.num_chunks // num_ctas)
    assert even <= matmul.run
    assert matmul.run == even or (
      matmul.run * num_ctas <= matmul.num_chunks * 1.07
    )
    # A longer run has to be worth it.
    if matmul.run > even:
      assert _num_cuts(matmul, matmul.run) < _num_cuts(matmul, even)


@pytest.mark.parametrize("name", _MODELS)
def test_sizes_are_the_models(name):
  g = _MODELS[name]
  s = make_schedule(g, 132)
  for matmul, rows, cols in (
    (
      s.qkv,
      (g.num_attention_heads + 2 * g.num_key_value_heads) * g.head_dim,
      g.hidden_size,
    ),
    (s.o, g.hidden_size, g.num_attention_heads * g.head_dim),
    (s.gate_up, 2 * g.intermediate_size, g.hidden_size),
    (s.down, g.hidden_size, g.intermediate_size),
    (s.lm_head, g.vocab_size, g.hidden_size),
  ):
    # Both of the model's paddings: to a chunk's 128 columns, whichever way the
    # matrix lies, and to a tile's 64 rows.
    assert rows <= matmul.rows < rows + 256
    assert cols <= matmul.cols < cols + 128
    assert matmul.rows % 64 == matmul.cols % 128 == 0
    assert matmul.num_chunks * 64 * 128 == matmul.rows * matmul.cols
  # What one matrix writes is what the next ones read.
  assert s.o.rows == s.down.rows == s.qkv.cols == s.gate_up.cols
  assert s.gate_up.rows == 2 * s.down.cols


def _check_splits(position, most):
  tiles = position // 64 + 1
  covered = []
  working = []
  for split in range(most):
    first, end, all_tiles, num_splits = split_of(position, split, most)
    assert all_tiles == tiles
    if first < end:
      covered.extend(range(first, end))
      working.append(split)
      # Who has the last tile writes the new token: nobody else may.
      assert (end == tiles) == (split == num_splits - 1)
  assert covered == list(range(tiles))
  assert working == list(range(num_splits))
  return num_splits


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16, 44, 132, 200])
@pytest.mark.parametrize("position", _POSITIONS)
def test_splits_cover_every_tile_once(position, most):
  num_splits = _check_splits(position, most)
  assert num_splits <= most
  # Cut where it pays and nowhere else.
  tiles = position // 64 + 1
  if tiles <= schedule.MIN_TILES_PER_SPLIT or most == 1:
    assert num_splits == 1
  else:
    assert num_splits > 1


@hypothesis.given(position=st.integers(0, 131071), most=st.integers(1, 300))
def test_any_splits_cover_every_tile_once(position, most):
  assert 1 <= _check_splits(position, most) <= most


@pytest.mark.parametrize("most", [1, 3, 16])
def test_splits_are_the_same_for_traced_integers(most):
  traced = jax.jit(functools.partial(split_of, most=most))
  for position in _POSITIONS:
    for split in range(most):
      found = traced(jnp.int32(position), jnp.int32(split))
      assert [x.dtype for x in found] == [jnp.int32] * 4
      assert list(map(int, found)) == list(split_of(position, split, most))


@pytest.mark.parametrize(
  ("name", "batch", "num_ctas", "expected"),
  [
    ("llama-3.2-1b", 1, 132, 16),
    ("llama-3.2-1b", 8, 132, 2),
    ("smollm2-135m", 1, 132, 44),
    ("smollm2-135m", 8, 7, 1),
  ],
)
def test_items_of_split_attention_have_a_cta_each(
  name, batch, num_ctas, expected
):
  heads = batch * _MODELS[name].num_key_value_heads
  splits = schedule.max_splits(_MODELS[name], batch, num_ctas)
  assert splits == expected
  assert splits == 1 or splits * heads <= num_ctas


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_width_leaves_room_for_a_ring(head_dim):
  for hidden_size in range(128, geometry.MAX_HIDDEN_SIZE + 1, 128):
    g = geometry.Geometry(
      hidden_size=hidden_size,
      intermediate_size=256,
      num_hidden_layers=1,
      num_attention_heads=1,
      num_key_value_heads=1,
      head_dim=head_dim,
      vocab_size=128,
      rms_norm_eps=1e-5,
      tie_word_embeddings=True,
    )
    geometry.check(g, 1)
    # Keys and values of wide heads take two slots.
    assert make_plan(g, 1, 64, 132).num_slots >= 3
