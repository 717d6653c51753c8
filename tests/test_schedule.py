"""Tests of `pallas_kernels.schedule`: the table against brute-force counts."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import geometry, schedule, tuning
from pallas_kernels.formats import Format
from pallas_kernels.geometry import Geometry
from pallas_kernels.plan import make_plan, operand_shapes
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
  "odd": _geometry(203, 97, 2, 6, 2, 128, 101),
}
_NUM_CTAS = (1, 2, 3, 4, 7, 78, 114, 132)
_POSITIONS = (0, 1, 63, 64, 65, 127, 128, 1000, 4095, 131071)


def _check(matmul):
  """Checks a table, CTA by CTA, against who should take which unit."""
  table = matmul.table()
  assert table.shape == (matmul.num_ctas, 2)
  assert table.dtype == np.int32
  assert matmul.num_units * 8 == matmul.rows
  assert matmul.chunks_per_unit * 1024 == matmul.cols
  assert matmul.run_chunks == matmul.run * matmul.chunks_per_unit
  times = np.zeros(matmul.num_units, int)
  for cta, (first, count) in enumerate(table.tolist()):
    assert 0 <= first <= first + count <= matmul.num_units
    # Arrays of packed weights are no longer than this.
    assert count <= matmul.run
    times[first : first + count] += 1
    # This is where packed weights are, so the table has to agree.
    for unit in range(first, first + count):
      assert divmod(unit, matmul.run) == (cta, unit - first)
  np.testing.assert_array_equal(times, 1)


@pytest.mark.parametrize("num_ctas", _NUM_CTAS)
@pytest.mark.parametrize("name", _MODELS)
def test_tables_agree_with_brute_force(name, num_ctas):
  plan = make_schedule(_MODELS[name], num_ctas)
  for matmul in plan.matmuls:
    _check(matmul)
  table = plan.table()
  assert table.shape == (num_ctas, 5, 2)
  np.testing.assert_array_equal(
    table, np.stack([m.table() for m in plan.matmuls], axis=1)
  )


@hypothesis.given(
  units=st.integers(1, 500), chunks=st.integers(1, 40), p=st.integers(1, 150)
)
def test_tables_of_any_matrix_agree_with_brute_force(units, chunks, p):
  _check(Matmul("any", 8 * units, 1024 * chunks, p))


@pytest.mark.parametrize("num_ctas", _NUM_CTAS)
@pytest.mark.parametrize("name", _MODELS)
def test_runs_are_even(name, num_ctas):
  for matmul in make_schedule(_MODELS[name], num_ctas).matmuls:
    counts = matmul.table()[:, 1]
    most = math.ceil(matmul.num_units / num_ctas)
    # The slowest CTA is what a phase waits for.
    assert counts.max() == matmul.run == most
    # Full runs, then what is left, then none.
    num_full, rest = divmod(matmul.num_units, most)
    expected = [most] * num_full + [rest]
    expected += [0] * (num_ctas - len(expected))
    assert counts.tolist() == expected[:num_ctas]


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
    # Padding, to a unit's 8 rows and to a chunk's 1024 columns, and no more.
    assert rows <= matmul.rows < rows + 8
    assert cols <= matmul.cols < cols + 1024
    assert matmul.rows % 8 == matmul.cols % 1024 == 0


@pytest.mark.parametrize("name", _MODELS)
def test_what_one_matrix_writes_is_what_the_next_one_reads(name):
  g = _MODELS[name]
  for num_ctas in _NUM_CTAS:
    plan = make_plan(g, 3, 1024, num_ctas)
    s = plan.schedule
    words = {key: words for key, (_, words) in plan.exchanges.items()}
    # Four to a word, of gate and up one for both; words come in pairs.
    assert 4 * words["qkv"] == s.qkv.rows
    assert 4 * words["middle"] == s.o.rows
    assert 0 <= 4 * words["hidden"] - s.gate_up.rows // 2 <= 4
    assert 4 * words["output"] == 4 * words["final"] == s.down.rows
    assert all(first % 2 == 0 for first, _ in plan.exchanges.values())
    # Columns beyond what is written are padding.
    heads_width = g.num_attention_heads * g.head_dim
    for written, matmuls in (
      (heads_width, [s.o]),
      (s.o.rows, [s.gate_up]),
      (s.gate_up.rows // 2, [s.down]),
      (s.down.rows, [s.qkv, s.lm_head]),
    ):
      for matmul in matmuls:
        assert written <= matmul.cols < written + 1024
    assert 4 * words["attended"] == heads_width
    # A CTA keeps its rows of the residual stream to itself.
    np.testing.assert_array_equal(s.o.table(), s.down.table())


@pytest.mark.parametrize("name", _MODELS)
def test_exchanges_do_not_overlap(name):
  g = _MODELS[name]
  for batch, num_ctas, capacity in ((1, 132, 4096), (8, 132, 64), (3, 2, 512)):
    plan = make_plan(g, batch, capacity, num_ctas)
    rows = dict.fromkeys(("qkv", "attended", "middle", "hidden"), batch)
    rows |= dict(output=batch, final=batch, candidates=2 * batch)
    if plan.splits > 1:
      rows["parts"] = batch * g.num_key_value_heads * plan.splits
    taken = np.zeros(plan.num_words, int)
    for exchange, num_rows in rows.items():
      first, row_words = plan.exchanges[exchange]
      assert first + num_rows * row_words <= plan.num_words
      taken[first : first + num_rows * row_words] += 1
    np.testing.assert_array_equal(taken, 1)


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
  if tiles <= tuning.TILES_AT_ONCE or most == 1:
    assert num_splits == 1
  else:
    assert num_splits > 1


@pytest.mark.parametrize(
  ("tiles", "most", "per_split", "num_splits"),
  [
    (4, 16, 4, 1),
    (5, 16, 3, 2),
    (64, 16, 4, 16),
    (65, 16, 8, 9),
    (128, 16, 8, 16),
    (18, 2, 9, 2),
  ],
)
def test_rounds_are_few_and_then_splits_are(tiles, most, per_split, num_splits):
  first, end, _, found = split_of(64 * tiles - 1, 0, most)
  assert (first, end, found) == (0, per_split, num_splits)


@pytest.mark.parametrize("most", [1, 2, 16, 44])
def test_no_other_splits_take_fewer_rounds_or_fewer_splits(most):
  def rounds(per_split):
    return math.ceil(per_split / tuning.TILES_AT_ONCE)

  for tiles in range(1, 300):
    _, per_split, _, num_splits = split_of(64 * tiles - 1, 0, most)
    best = min(
      (rounds(n), math.ceil(tiles / n))
      for n in range(1, tiles + 1)
      if math.ceil(tiles / n) <= most
    )
    assert (rounds(per_split), num_splits) == best


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


@pytest.mark.parametrize("capacity", [64, 256, 320, 4096])
@pytest.mark.parametrize("name", _MODELS)
def test_a_small_cache_has_no_splits_that_never_work(name, capacity):
  most = schedule.max_splits(_MODELS[name], 1, 132)
  splits = make_plan(_MODELS[name], 1, capacity, 132).splits
  assert 1 <= splits <= most
  assert splits == most or splits == math.ceil(capacity / 256)
  # Positions are cut as if there were more.
  for position in range(0, capacity, 64):
    num_splits = split_of(position, 0, most)[3]
    assert split_of(position, 0, splits)[3] == num_splits <= splits


@pytest.mark.parametrize("num_ctas", [78, 114, 132])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_width_leaves_room_for_a_ring(head_dim, batch, num_ctas):
  # The MLP may have far more columns than shared memory holds at once.
  for mlp_width in (256, 65536):
    for hidden_size in range(8, geometry.MAX_HIDDEN_SIZE + 1, 8):
      g = _geometry(hidden_size, mlp_width, 1, 8, 1, head_dim, 128)
      geometry.check(g, batch)
      # Keys and values of wide heads take two slots.
      assert make_plan(g, batch, 1024, num_ctas).num_slots >= 3


def test_a_plan_without_room_for_a_ring_is_refused():
  g = _geometry(8192, 256, 1, 8, 1, 128, 128)
  with pytest.raises(
    geometry.UnsupportedError, match="8192 with batch 8 on 1 CTAs .* 0 slots"
  ):
    make_plan(g, 8, 64, 1)


@pytest.mark.parametrize(
  "layer_format", [Format(), Format(8), Format(4, group=128)]
)
def test_blocks_cover_every_chunk(layer_format):
  for batch in (1, 3, 8):
    for g in _MODELS.values():
      plan = make_plan(g, batch, 64, 132, layer_format=layer_format)
      for matmul in plan.schedule.matmuls:
        num_blocks = plan.num_blocks(matmul)
        per_block = plan.block_chunks(matmul)
        assert per_block * matmul.tiles <= plan.x_tiles
        # As even as can be, and the last one is not empty.
        assert per_block == math.ceil(matmul.chunks_per_unit / num_blocks)
        assert (num_blocks - 1) * per_block < matmul.chunks_per_unit
        # What is normed is normed as a whole.
        if matmul.name not in ("o", "down"):
          assert num_blocks == 1


# Tiles of 1,024 columns in a chunk are then others in the layers and in the head.
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize(
  ("layer_format", "head_format"),
  [
    (Format(), Format(8)),
    (Format(4, group=128), Format(8)),
    (Format(4, group=128), Format(8, group=32)),
    (Format(8), Format(4, group=32, beside="zero")),
  ],
)
def test_a_head_of_another_format(name, batch, layer_format, head_format):
  plan = make_plan(
    _MODELS[name],
    batch,
    64,
    132,
    layer_format=layer_format,
    head_format=head_format,
  )
  head, qkv = plan.schedule.lm_head, plan.schedule.qkv
  assert (head.format, qkv.format) == (head_format, layer_format)
  # The same activations, all at once, are in shared memory for either.
  for matmul in (head, qkv):
    assert plan.num_blocks(matmul) == 1
    assert matmul.chunks_per_unit * matmul.tiles * 1024 == head.cols
  for matmul in plan.schedule.matmuls:
    f = matmul.format
    assert f.chunk_rows(matmul.tiles) <= geometry.CHUNK_ROWS
    if f.is_packed:
      assert f.scale_rows(matmul.tiles) <= plan.scale_rows
  assert plan.num_slots >= 3
  # Tokens are looked up in bfloat16, as with a head in bfloat16.
  plain = make_plan(_MODELS[name], batch, 64, 132)
  assert plan.embedding == plain.embedding
  shapes = operand_shapes(plan)
  assert shapes["embedding"] == operand_shapes(plain)["w_lm_head"]
  assert len(shapes["s_lm_head"][0]) == 4


@pytest.mark.parametrize("device_kind", [None, "some GPU", "NVIDIA H200"])
@pytest.mark.parametrize("hidden_size", [1, 576, 2048, 4096, 8192])
def test_every_device_and_width_has_chunks_in_flight(device_kind, hidden_size):
  chunks = tuning.in_flight(device_kind, hidden_size)
  # One at a time would leave memory idle; the smallest ring has 3 slots.
  assert chunks >= 2
  assert chunks >= tuning.in_flight(device_kind, 1)
  # Where nobody waits for words, there is no reason for fewer.
  assert tuning.head_in_flight(device_kind) >= chunks


def test_a_plan_takes_the_chunks_in_flight_of_its_device(monkeypatch):
  monkeypatch.setitem(tuning._IN_FLIGHT, "a new GPU", {1: 3, 4096: 5})
  monkeypatch.setitem(tuning._HEAD_IN_FLIGHT, "a new GPU", 6)

  def in_flight(name, kind):
    plan = make_plan(_MODELS[name], 1, 64, 132, kind)
    return plan.in_flight, plan.head_in_flight

  for kind in (None, "NVIDIA H100 80GB HBM3", "NVIDIA H200"):
    assert in_flight("llama-3.2-1b", kind) == (2, 4)
    assert in_flight("llama-3.1-8b", kind) == (3, 4)
  assert in_flight("llama-3.2-1b", "a new GPU") == (3, 6)
  assert in_flight("llama-3.1-8b", "a new GPU") == (5, 6)


def test_a_second_warpgroup_computes_where_it_was_faster(monkeypatch):
  def wgs(name, batch, **kwargs):
    return make_plan(_MODELS[name], batch, 64, 132, **kwargs).compute_wgs

  int4 = Format(4, group=128)
  assert wgs("llama-3.2-1b", 1) == 1
  assert wgs("llama-3.2-1b", 8) == 2
  assert wgs("llama-3.2-1b", 1, layer_format=int4) == 2
  assert wgs("llama-3.2-1b", 8, layer_format=int4) == 1
  assert wgs("llama-3.1-8b", 1, layer_format=int4) == 1
  assert wgs("llama-3.2-1b", 1, compute_wgs=2) == 2
  assert wgs("llama-3.2-1b", 8, device_kind="NVIDIA H200") == 2
  monkeypatch.setitem(tuning._TWO_COMPUTE_WGS, "a new GPU", {(2048, False, 1)})
  assert wgs("llama-3.2-1b", 1, device_kind="a new GPU") == 2
  assert wgs("llama-3.2-1b", 8, device_kind="a new GPU") == 1


def test_the_ring_has_the_slots_that_memory_leaves_or_fewer():
  plan = make_plan(_MODELS["llama-3.2-1b"], 1, 64, 132)
  assert 8 <= plan.num_slots < tuning.MOST_SLOTS
  assert dataclasses.replace(plan, most_slots=5).num_slots == 5
