"""Packed models of quantised matrices: the same bits, the same weights."""

import dataclasses
import functools
import gc

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_outputs import reference_outputs
from test_packed import (
  Gpu,
  assert_fused_agrees,
  assert_same_bits,
  copied,
  emulated_step,
  install,
  on_host,
  random_model,
  shows_memory,
)

import ffjax
from ffjax import (
  device_memory,
  implementation,
  packed,
  packing,
  params,
  quantized,
  quantized_model,
)
from ffjax.errors import CheckpointError, RequestError
from ffjax.quantized import FORMATS, QuantizedMatrix
from pallas_kernels.plan import make_plan, operand_shapes

# Rows and columns that do not fill their units and chunks.
_SIZES = dict(
  vocab_size=41,
  hidden_size=128,
  intermediate_size=1152,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=64,
)
_OTHERS = {
  # As GGUF has them, and a checkpoint of INT8 from PyTorch.
  "float16 scales": ("int8_g32", "float16", None),
  "minimums": ("int4_g32_asym", "float16", "minimums"),
  "float16 zeros": ("int4_g128_asym", "float16", "zeros"),
  "float32 scales": ("int8", "float32", None),
}
# Of layers, LM head and embedding; None is bfloat16. The last is that of a head of
# its own.
_HEADS = [
  (None, "int8", "int8"),
  ("int4_g128", "int8", "int8"),
  ("fp8", "int8_g32", "int8_g32"),
  ("int8", "int8", None),
  ("int8_g64", None, "int4_g32_asym"),
]
_DOWN = ("layers", "mlp", "down_proj", "weight")
_HEAD = ("lm_head", "weight")
_VALUE = ("layers", "self_attn", "v_proj", "weight")


@pytest.fixture
def config(make_config):
  return make_config(**_SIZES)


def changed(model, change, paths=None):
  """Returns a model with other quantised matrices, all or those of `paths`."""
  flat = flax.traverse_util.flatten_dict(model.params)
  for path, leaf in flat.items():
    if isinstance(leaf, QuantizedMatrix) and (paths is None or path in paths):
      flat[path] = change(leaf)
  return model.replace(params=flax.traverse_util.unflatten_dict(flat))


def with_scales(dtype, beside):
  def change(leaf):
    scales = np.asarray(leaf.scales).astype(dtype)
    return dataclasses.replace(
      leaf,
      scales=jnp.asarray(scales),
      zeros=leaf.zeros if beside == "zeros" else None,
      minimums=jnp.asarray(-scales) if beside == "minimums" else None,
    )

  return change


def _random_matrix(rng, shape, format):
  """As `ffjax.quantized.random_matrix`, but compiles nothing."""
  *outer, columns = shape
  grouped = (*outer, format.num_groups(columns))
  row_bytes = columns * format.bits // 8
  codes = rng.integers(0, 256, (*outer, row_bytes), np.uint8)
  if format.is_float:
    codes &= 0xBF  # Below 2.
  scales = rng.uniform(0.5, 1.5, grouped) * 0.5 / 2**format.bits
  zeros = None if format.symmetric else rng.integers(0, 17, grouped, np.uint8)
  return QuantizedMatrix(
    codes=jnp.asarray(codes),
    scales=jnp.asarray(scales, jnp.bfloat16),
    zeros=zeros if zeros is None else jnp.asarray(zeros),
    minimums=None,
    columns=None,
    format=format,
  )


@functools.cache
def _matrices(config, name, head, embedding):
  rng = np.random.default_rng(0)
  formats = {} if name is None else params.matrix_formats(config, name)
  shapes = {leaf.path: leaf.shape for leaf in params.leaves(config)}
  tied = config.tie_word_embeddings
  for module, own in (
    ("embed_tokens", head if tied else embedding),
    ("lm_head", None if tied else head),
  ):
    if own is not None:
      formats[module, "weight"] = FORMATS[own]
  made = {
    path: _random_matrix(rng, shapes[path], format)
    for path, format in formats.items()
  }
  return jax.tree.map(np.asarray, made)


def quantised(config, name, head=None, embedding=None):
  """Returns a random model, by the name of a format or of `_OTHERS`.

  Args:
    config: the model.
    name: of the layers' format; None if they are bfloat16.
    head: the LM head's likewise.
    embedding: the embedding's, if it is not the LM head.
  """
  name, dtype, beside = _OTHERS.get(name, (name, None, None))
  model = random_model(config)
  flat = flax.traverse_util.flatten_dict(model.params)
  made = _matrices(config, name, head, embedding)
  flat |= jax.tree.map(jnp.asarray, made)
  model = model.replace(params=flax.traverse_util.unflatten_dict(flat))
  if dtype is None:
    return model
  return changed(model, with_scales(jnp.dtype(dtype), beside))


@pytest.mark.parametrize("name", [*FORMATS, *_OTHERS])
def test_unpack_undoes_pack_and_no_byte_more_is_read(config, name):
  _check_round_trip(quantised(config, name))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("names", _HEADS, ids=str)
def test_unpack_undoes_pack_of_heads(make_config, names, tied):
  config = make_config(**_SIZES, tie_word_embeddings=tied)
  made = _check_round_trip(quantised(config, *names))
  _, head, embedding = names
  looked_up = head if tied else embedding
  assert (made.params.table is None) == (looked_up is None)
  assert ("lm_head" in made.params.scales) == (head is not None)


def _check_round_trip(model):
  expected = on_host(copied(model))
  made = ffjax.pack(model, num_ctas=5)
  assert all(x.is_deleted() for x in jax.tree.leaves(model.params))
  assert made.formats == expected.formats
  assert made.dtype == expected.dtype
  read_bytes = (x.weight_bytes_per_step(3) for x in (made, expected))
  assert len(set(read_bytes)) == 1
  for path in flax.traverse_util.flatten_dict(expected.params):
    assert made.leaf_dtype(path) == expected.leaf_dtype(path)
  again = ffjax.unpack(made)
  assert all(x.is_deleted() for x in jax.tree.leaves(made.params))
  assert_same_bits(again.params, expected.params)
  return made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "names", [("int4_g64",), ("int8",), ("minimums",), *_HEADS], ids=str
)
def test_all_operands_are_what_the_kernel_takes(make_config, names, tied):
  config = make_config(**_SIZES, tie_word_embeddings=tied)
  made = ffjax.pack(quantised(config, *names), num_ctas=3)
  plan = make_plan(
    packed.geometry_of(config),
    2,
    64,
    3,
    layer_format=made.params.chunk_format,
    head_format=made.params.head_chunk_format,
  )
  shapes = operand_shapes(plan)
  operands = made.params.operands()
  norms = operands.pop("norms")
  assert norms.size == np.prod(shapes["norms"][0])
  found = {
    key if key in shapes else f"w_{key}": (x.shape, x.dtype)
    for key, x in operands.items()
  }
  assert found == {key: shapes[key] for key in found}
  assert {key for key in shapes if key.startswith(("w_", "s_"))} <= set(found)


# Codes pass for bfloat16 there, and the loops of older XLA change its NaNs. The
# kernel, which is what models are packed for, needs a newer one anyway.
@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="codes in loops need JAX 0.11"
)
@pytest.mark.parametrize("name", ["int4_g128_asym", "fp8"])
def test_reference_reads_the_same_weights(config, name):
  model = quantised(config, name)
  expected = reference_outputs(model, "bfloat16")
  found = reference_outputs(ffjax.pack(model, num_ctas=3), "bfloat16")
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
  assert float(jnp.std(expected[0])) > 1e-2


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="codes in loops need JAX 0.11"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
  "names",
  [(None, "int8", "int8"), ("float32 scales", "int8_g32", "int4_g32_asym")],
  ids=str,
)
def test_reference_reads_the_same_head(
  make_config, names, tied, dtype, monkeypatch
):
  config = make_config(**_SIZES, num_hidden_layers=1, tie_word_embeddings=tied)
  model = quantised(config, *names)

  def run(model):
    return reference_outputs(
      model, dtype, token_ids=((1, 40, 9, 7), (3, 2, 0, 0))
    )

  expected = run(model)
  made = ffjax.pack(model, num_ctas=3)
  # Three blocks of the LM head, the last one not whole.
  monkeypatch.setattr(packed, "_BLOCK_BYTES", 16 * 1024 * 2)
  chex.assert_trees_all_close(run(made), expected, rtol=1e-5, atol=1e-5)
  assert float(jnp.std(expected[0])) > 1e-2
  # A unit's scales at its neighbour are seen.
  scales = {
    name: jnp.roll(x, name == "lm_head", axis=-3)
    for name, x in made.params.scales.items()
  }
  params = dataclasses.replace(made.params, scales=scales)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(
      run(made.replace(params=params)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="codes in loops need JAX 0.11"
)
@pytest.mark.parametrize(
  ("names", "tied"),
  [
    ((None, "int8"), True),
    (("int4_g128", "int8"), True),
    (("fp8", "int8_g32", "int8"), False),
  ],
  ids=str,
)
def test_emulated_kernel_agrees_with_the_reference(
  make_config, names, tied, monkeypatch
):
  config = make_config(**{**_SIZES, "vocab_size": 77}, tie_word_embeddings=tied)
  monkeypatch.setattr(device_memory, "default_device", Gpu)
  monkeypatch.setattr(implementation, "_machine_lacks", lambda: None)
  install(monkeypatch, emulated_step)
  made = ffjax.pack(quantised(config, *names), num_ctas=4)
  assert_fused_agrees(made)
  # Scales of the next unit are seen.
  scales = dict(made.params.scales)
  scales["lm_head"] = jnp.roll(scales["lm_head"], 1, axis=-3)

  def with_other_scales(plan, weights, *args):
    return emulated_step(
      plan, {**weights, "s_lm_head": scales["lm_head"]}, *args
    )

  install(monkeypatch, with_other_scales)
  with pytest.raises(AssertionError):
    assert_fused_agrees(made)


def test_a_table_counts_when_packing_has_to_fit(make_config, monkeypatch):
  config = make_config(
    **{**_SIZES, "vocab_size": 5000}, tie_word_embeddings=True
  )
  model = quantised(config, "int8", "int8")
  sources, packed_bytes = (
    sum(x.nbytes for x in jax.tree.leaves(x.params))
    for x in (model, ffjax.pack(copied(model), num_ctas=3))
  )
  # At the end, that much more is there than before.
  grown = packed_bytes - sources
  assert grown > 5000 * 1024 * 2
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: grown - 1)
  with pytest.raises(RequestError, match="packing: .* padding takes"):
    ffjax.pack(model, num_ctas=3)
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))


def _one_array_for_both(model):
  """Returns an untied model whose embedding is its LM head, in new wrappers."""
  embedding = jax.tree.map(lambda x: x, model.params["lm_head"])
  return model.replace(params={**model.params, "embed_tokens": embedding})


@pytest.mark.parametrize(
  "kind", ["tied", "untied", "one array", "on host", "head only"]
)
@pytest.mark.parametrize("vocab_size", [41, 5000])
def test_no_more_memory_is_taken_than_was_asked_for(
  make_config, kind, vocab_size, monkeypatch
):
  """Wherever in the order of groups the table is made."""
  config = make_config(
    **{**_SIZES, "vocab_size": vocab_size},
    tie_word_embeddings=kind == "tied",
  )
  embedding = None if kind == "head only" else "int4_g32_asym"
  model = quantised(config, "int4_g64", "int8", embedding)
  if kind == "one array":
    model = _one_array_for_both(model)
  expected = on_host(copied(model))
  if kind == "on host":
    model = expected
  gc.collect()
  order, live, asked = [], [], []
  begin = sum(x.nbytes for x in jax.live_arrays())

  def group_name(args):
    return next(getattr(x, "name", x) for x in args if isinstance(x, named))

  named = (str, packing._Group)

  def watch(name, called):
    function = getattr(packing, name)

    def watched(*args, **kwargs):
      made = jax.block_until_ready(function(*args, **kwargs))
      order.append(called or group_name(args))
      live.append(sum(x.nbytes for x in jax.live_arrays()) - begin)
      return made

    monkeypatch.setattr(packing, name, watched)

  watch("_pack_table", "table")
  watch("_pack_group", None)
  watch("_unpack_group", None)
  monkeypatch.setattr(
    device_memory, "require", lambda num_bytes, _: asked.append(num_bytes)
  )
  # Those are gone whenever it is looked.
  monkeypatch.setattr(packing, "_TEMPORARY_LAYERS", 0)
  made = ffjax.pack(model, num_ctas=3)
  groups = list(packed.groups(config))
  assert sorted(x for x in order if x != "table") == sorted(groups)
  if kind == "head only":
    assert "table" not in order
  else:
    looked_up = "lm_head" if kind == "tied" else "embedding"
    at = order.index("table")
    assert order[at + 1] == looked_up
    # With its table, that is the largest group only of a large vocabulary.
    assert (at == 0) == (vocab_size == 5000)
  if kind == "on host":
    assert max(live) <= asked[0]
  else:
    assert max(live) == asked[0]
    assert all(x.is_deleted() for x in jax.tree.leaves(model.params))
  left = sum(x.nbytes for x in jax.tree.leaves(made.params))
  assert sum(x.nbytes for x in jax.live_arrays()) - begin == left - (
    0 if kind == "on host" else sum(_sizes_of(expected, kind))
  )
  order.clear()
  live.clear()
  begin = sum(x.nbytes for x in jax.live_arrays())
  again = ffjax.unpack(made)
  assert sorted(order) == sorted(groups)
  assert max(live) <= asked[1]
  assert all(x.is_deleted() for x in jax.tree.leaves(made.params))
  assert_same_bits(again.params, expected.params)


def _sizes_of(model, kind):
  """Returns the bytes of each array, of one that is there twice once."""
  params = dict(model.params)
  if kind == "one array":
    del params["embed_tokens"]
  return [x.nbytes for x in jax.tree.leaves(params)]


def test_memory_in_pieces_leaves_the_table_when_unpacking(
  make_config, monkeypatch
):
  config = make_config(**_SIZES, tie_word_embeddings=True)
  made = ffjax.pack(quantised(config, "int4_g64", "int8"), num_ctas=3)

  def in_pieces(shapes, what):
    raise RequestError(f"{what} takes an array")

  monkeypatch.setattr(device_memory, "zeros", in_pieces)
  with pytest.raises(RequestError, match="unpacking takes an array"):
    ffjax.unpack(made)
  assert not any(x.is_deleted() for x in jax.tree.leaves(made.params))


@pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="codes in loops need JAX 0.11"
)
def test_what_is_looked_up_is_rounded_once(make_config):
  config = make_config(**_SIZES, tie_word_embeddings=True)
  model = quantised(config, None, "int8")
  token_ids = jnp.arange(config.vocab_size, dtype=jnp.int32)
  exact, rounded = (
    np.asarray(quantized_model.embed(model.params, token_ids, dtype))
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert (exact != rounded.astype(np.float32)).any()
  made = ffjax.pack(model, num_ctas=3).params
  for expected in (exact, rounded):
    ours = packed.embed(made, config, token_ids, expected.dtype)
    assert_same_bits(ours, expected)


@shows_memory
def test_a_head_of_true_size_takes_no_temporary_arrays():
  config = ffjax.preset("llama-3.2-1b")
  head = jax.eval_shape(
    lambda key: quantized.random_matrix(
      key,
      (config.vocab_size, config.hidden_size),
      FORMATS["int8"],
      jnp.bfloat16,
    ),
    jax.random.key(0),
  )
  chunk_format = packed.chunk_format_of(head)
  table = packing._pack_table.lower(head, config, 132)
  packs = packing._pack_whole.lower((head,), config, "lm_head", 132)
  unpacks = packing._unpack_whole.lower(
    packs.out_info,
    packing._Group(
      config, "lm_head", ("bfloat16",) * 3, head.format, chunk_format
    ),
  )
  for lowered in (table, packs, unpacks):
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2**26


@pytest.mark.parametrize(
  "names",
  [
    ("int4_g32_asym",),
    ("float32 scales",),
    (None, "int8", "int8_g32"),
  ],
  ids=str,
)
def test_single_tensors_are_those_of_the_tree(config, names):
  model = quantised(config, *names)
  host = on_host(copied(model))
  made = ffjax.pack(model, num_ctas=3)
  for leaf in params.leaves(config):
    for layer in range(config.num_hidden_layers if leaf.stacked else 1):
      ours = packing.tensor(made, leaf.path, layer)
      assert_same_bits(ours, packing.tensor(host, leaf.path, layer))


# ---- what cannot be packed -------------------------------------------------


def _with_zeros_in_the_head(config):
  def change(leaf):
    zeros = jnp.ones(leaf.scales.shape, jnp.uint8)
    return dataclasses.replace(leaf, zeros=zeros)

  return changed(quantised(config, "int8", "int8_g64"), change, [_HEAD])


def _with_order(config):
  def change(leaf):
    columns = jnp.arange(leaf.shape[-1], dtype=jnp.int32)[::-1]
    columns = jnp.broadcast_to(columns, (len(leaf.codes), leaf.shape[-1]))
    return dataclasses.replace(leaf, columns=columns)

  return changed(quantised(config, "int4_g64"), change, [_DOWN])


def _with_two_formats(config):
  model = quantised(config, "int4_g64")
  other = quantised(config, "int8_g64")
  flat, others = (
    flax.traverse_util.flatten_dict(x.params) for x in (model, other)
  )
  flat[_VALUE] = others[_VALUE]
  return model.replace(params=flax.traverse_util.unflatten_dict(flat))


def _half_quantised(config):
  def change(leaf):
    return quantized.dequantize(leaf).astype("bfloat16")

  return changed(quantised(config, "int4_g64"), change, [_DOWN])


def _with_two_dtypes_of_scales(config):
  change = with_scales(jnp.dtype("float16"), None)
  return changed(quantised(config, "int8"), change, [_VALUE])


def _with_zeros_and_minimums(config):
  change = with_scales(jnp.dtype("float16"), "zeros")
  model = changed(quantised(config, "int4_g64_asym"), change)
  change = with_scales(jnp.dtype("float16"), "minimums")
  return changed(model, change, [_DOWN])


def _with_float32(beside):
  def make(config):
    change = with_scales(jnp.dtype("float32"), beside)
    return changed(quantised(config, "int4_g64_asym"), change)

  return make


def _with_zeros_of_8_bits(config):
  def change(leaf):
    zeros = jnp.ones(leaf.scales.shape, jnp.uint8)
    return dataclasses.replace(leaf, zeros=zeros)

  return changed(quantised(config, "int8_g64"), change)


_REFUSED = {
  "head": (
    _with_zeros_in_the_head,
    r"lm_head\.weight as int8_g64 with bfloat16 scales and a zero beside each",
  ),
  "act-order": (
    _with_order,
    r"order of columns of layers\.mlp\.down_proj\.weight \(act-order\)",
  ),
  "two formats": (
    _with_two_formats,
    "one format in all layers, and there are int4_g64 with bfloat16 scales and"
    " int8_g64 with bfloat16 scales",
  ),
  "half": (
    _half_quantised,
    "there are bfloat16 and int4_g64 with bfloat16 scales",
  ),
  "two dtypes of scales": (
    _with_two_dtypes_of_scales,
    "there are int8 with bfloat16 scales and int8 with float16 scales",
  ),
  "zeros and minimums": (
    _with_zeros_and_minimums,
    "a minimum beside each and int4_g64_asym with float16 scales and a zero",
  ),
  "float32 zeros": (
    _with_float32("zeros"),
    "int4_g64_asym with float32 scales and a zero beside each",
  ),
  "float32 minimums": (
    _with_float32("minimums"),
    "int4_g64_asym with float32 scales and a minimum beside each",
  ),
  "8 bits with zeros": (
    _with_zeros_of_8_bits,
    "int8_g64 with bfloat16 scales and a zero beside each",
  ),
}


@pytest.mark.parametrize(
  ("make", "message"), _REFUSED.values(), ids=_REFUSED.keys()
)
def test_what_the_kernel_does_not_take(make_config, make, message):
  model = make(make_config(**{**_SIZES, "num_hidden_layers": 1}))
  with pytest.raises(RequestError, match=f"cannot be packed: .*{message}"):
    ffjax.pack(model, num_ctas=4)
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.params))
  # Shapes and dtypes say it, before a checkpoint is read.
  shapes = jax.eval_shape(lambda: model)
  assert packing.why_not_model(shapes) == packing.why_not_model(model)
  assert implementation.resolve("auto", model).name == "reference"


@pytest.mark.parametrize("name", ["int4_g32_asym", "int4_g128", "fp8"])
def test_save_writes_the_same_files(config, name, tmp_path):
  model = ffjax.random_model(config, 0, "bfloat16", name)
  ffjax.save(model, tmp_path / "tree")
  model = ffjax.pack(model, num_ctas=4)
  ffjax.save(model, tmp_path / "packed")
  for path in (tmp_path / "tree").iterdir():
    other = tmp_path / "packed" / path.name
    assert path.read_bytes() == other.read_bytes(), path.name


def test_what_is_packed_and_cannot_be_saved(config, tmp_path):
  for make, message in (
    (
      lambda: ffjax.random_model(config, 0, "bfloat16", head_format="int8"),
      "embed_tokens.weight is quantised",
    ),
    (
      lambda: changed(
        ffjax.random_model(config, 0, "bfloat16", "int4_g32_asym"),
        # In the last layer only.
        lambda x: dataclasses.replace(x, zeros=x.zeros.at[-1, 0, 0].set(16)),
        [_DOWN],
      ),
      "a zero point is 16",
    ),
  ):
    model = ffjax.pack(make(), num_ctas=4)
    with pytest.raises(CheckpointError, match=message):
      ffjax.save(model, tmp_path / "made")
  assert not (tmp_path / "made").exists()


def test_what_is_packed_is_not_quantised_again(config):
  made = ffjax.pack(quantised(config, "fp8"), num_ctas=2)
  with pytest.raises(RequestError, match="the model is packed"):
    ffjax.quantize(made, "int8")
  assert ffjax.pack(made) is made
