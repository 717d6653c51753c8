"""Tests of `ffjax.quantized`, `ffjax.quantizing` and the reference on both.

What codes mean is written out here in NumPy, weight by weight or from the
format's own description; GGUF's is the `gguf` package's.
"""

import dataclasses

import chex
import flax.traverse_util
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_outputs import reference_outputs

import ffjax
from ffjax import decode, params, quantized, rounding
from ffjax.errors import RequestError
from ffjax.quantized import FORMATS, QuantizedMatrix

_SCALE_DTYPES = ("float32", "bfloat16", "float16")


def random_matrix(name, shape, seed=0, dtype="float16", **parts):
  """Makes a matrix of random codes; `parts` are which optional ones it has."""
  format = FORMATS[name]
  rng = np.random.default_rng(seed)
  *outer, columns = shape
  grouped = (*outer, format.num_groups(columns))
  codes = rng.integers(
    0, 256, (*outer, columns * format.bits // 8), dtype=np.uint8
  )
  if format.is_float:
    codes[codes & 0x7F == 0x7F] = 1  # NaN
  order = rng.permuted(
    np.broadcast_to(np.arange(columns), (*outer[:-1], columns)), axis=-1
  )
  numbers = [
    (rng.standard_normal(grouped) / 16).astype(jnp.dtype(dtype))
    for _ in range(2)
  ]
  zeros = rng.integers(0, 17, grouped, dtype=np.uint8)
  return QuantizedMatrix(
    codes=codes,
    scales=numbers[0],
    zeros=zeros if parts.get("zeros") else None,
    minimums=numbers[1] if parts.get("minimums") else None,
    columns=order.astype(np.int32) if parts.get("columns") else None,
    format=format,
  )


def weights_by_hand(m):
  """Returns the weights of one matrix `[out, in]`, one after another."""
  format = m.format
  out, columns = m.shape
  size = format.group_size or columns
  found = np.empty((out, columns), np.float32)
  for row in range(out):
    for column in range(columns):
      group = column // size
      scale = np.float32(m.scales[row, group])
      if format.bits == 4:
        code = int(m.codes[row, column // 2]) >> (4 * (column % 2)) & 15
      elif format.is_float:
        byte = m.codes[row, column : column + 1]
        code = np.float32(byte.view(ml_dtypes.float8_e4m3fn)[0])
      else:
        code = int(m.codes[row, column].astype(np.int8))
      if m.minimums is not None:
        weight = scale * np.float32(code) + np.float32(m.minimums[row, group])
      else:
        zero = 8 if format.bits == 4 else 0
        if m.zeros is not None:
          zero = int(m.zeros[row, group])
        weight = scale * np.float32(code - zero)
      at = column if m.columns is None else m.columns[column]
      found[row, at] = weight
  return found


_KINDS = [
  *((name, {"zeros": not FORMATS[name].symmetric}) for name in FORMATS),
  ("int4_g32_asym", {"minimums": True}),
  ("int4_g64", {"columns": True}),
  ("int4_g32_asym", {"zeros": True, "columns": True}),
  ("int8_g32", {"columns": True}),
]


@pytest.mark.parametrize("dtype", _SCALE_DTYPES)
@pytest.mark.parametrize(("name", "parts"), _KINDS)
def test_weights_are_what_the_format_says(name, parts, dtype):
  m = random_matrix(name, (2, 3, 256), dtype=dtype, **parts)
  assert m.shape == (2, 3, 256)
  assert m.ndim == 3
  assert m.num_bytes == sum(x.nbytes for x in jax.tree.leaves(m))
  for dequantize in (quantized.dequantize, jax.jit(quantized.dequantize)):
    found = np.asarray(dequantize(m))
    assert found.dtype == np.float32
    for layer in range(2):
      one = jax.tree.map(lambda x: x[layer], m)  # noqa: B023
      # A compiler may round once less where the product is not exact.
      ulp = 2.0**-20 if parts.get("minimums") and dtype == "float32" else 0
      np.testing.assert_allclose(found[layer], weights_by_hand(one), 0, ulp)


@pytest.mark.parametrize(("name", "parts"), _KINDS)
def test_rows(name, parts):
  if "columns" in parts:
    return
  m = random_matrix(name, (9, 256), **parts)
  at = np.asarray([[3, 0], [8, 3]], np.int32)
  found = quantized.dequantize(quantized.rows(jax.tree.map(jnp.asarray, m), at))
  np.testing.assert_array_equal(found, quantized.dequantize(m)[at])


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_off_by_one_shows(name):
  # What faults in the kernel or an importer would do to these very weights.
  m = random_matrix(name, (4, 256), zeros=not FORMATS[name].symmetric)
  right = np.asarray(quantized.dequantize(m))
  wrong = {"scales": np.roll(m.scales, 1, axis=-1)}
  if FORMATS[name].group_size is None:
    wrong = {"scales": np.roll(m.scales, 1, axis=0)}
  if FORMATS[name].bits == 4:
    wrong["codes"] = (m.codes >> 4) | (m.codes << 4)
  if m.zeros is not None:
    wrong["zeros"] = m.zeros + np.uint8(1)
  for field, value in wrong.items():
    found = quantized.dequantize(dataclasses.replace(m, **{field: value}))
    assert np.mean(np.asarray(found) != right) > 0.8, field


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_nearest_value_is_chosen(name, dtype):
  format = FORMATS[name]
  rng = np.random.default_rng(1)
  weights = rng.standard_normal((2, 3, 256)) * rng.uniform(0.01, 1, (2, 3, 1))
  weights = jnp.asarray(weights).astype(dtype)
  m = rounding.quantize_leaf(weights, format)
  assert m.shape == weights.shape
  assert m.scales.dtype == jnp.dtype(dtype)
  assert (m.zeros is None) == format.symmetric
  as_float = np.asarray(weights, np.float32)
  error = np.abs(np.asarray(quantized.dequantize(m)) - as_float)
  size = format.group_size or 256
  scales = np.repeat(np.asarray(m.scales, np.float32), size, axis=-1)
  if format.is_float:
    # Half a unit in the last of 3 places, or in that of subnormal numbers.
    most = np.maximum(np.abs(as_float) / 16, scales * 2.0**-10)
  else:
    most = scales / 2
  # Beyond rounding, scales and zeros themselves are rounded.
  slack = 1 + 2**format.bits * float(jnp.finfo(dtype).eps)
  if not format.symmetric:
    slack += 1
  assert (error <= most * slack).all()
  # Anything coarser would be no use: all codes are used in a row of 256.
  assert error.mean() > most.mean() / 10


@pytest.mark.parametrize("name", list(FORMATS))
def test_zeros_stay_zero(name):
  weights = jnp.zeros((4, 256), "bfloat16").at[1, 3].set(1.0)
  found = quantized.dequantize(rounding.quantize_leaf(weights, FORMATS[name]))
  np.testing.assert_allclose(found, np.asarray(weights, np.float32), atol=0.07)
  assert not np.asarray(found)[[0, 2, 3]].any()


_GGUF = {
  "int4_g32": (gguf.GGMLQuantizationType.Q4_0, "<f2", 0),
  "int4_g32_asym": (gguf.GGMLQuantizationType.Q4_1, "<f2", 1),
  "int8_g32": (gguf.GGMLQuantizationType.Q8_0, "<f2", 0),
}


@pytest.mark.parametrize("name", list(_GGUF))
def test_bits_of_gguf_are_what_its_package_says(name):
  kind, _, num_minimums = _GGUF[name]
  m = random_matrix(name, (5, 256), minimums=bool(num_minimums))
  blocks = []
  for row in range(5):
    for group in range(8):
      block = m.scales[row, group].tobytes()
      if num_minimums:
        block += m.minimums[row, group].tobytes()
      if FORMATS[name].bits == 8:
        block += m.codes[row, 32 * group :][:32].tobytes()
      else:
        # The first half of a block is in the low nibbles.
        pairs = m.codes[row, 16 * group :][:16]
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(2, 16)
        block += (codes[0] | codes[1] << 4).tobytes()
      blocks.append(np.frombuffer(block, np.uint8))
  raw = np.concatenate(blocks).reshape(5, -1)
  expected = gguf.dequantize(raw, kind)
  np.testing.assert_array_equal(quantized.dequantize(m), expected)


def dequantized_model(model, dtype="bfloat16"):
  """Returns the model with plain matrices."""
  flat = flax.traverse_util.flatten_dict(model.params)
  plain = {
    path: quantized.dequantize(leaf).astype(dtype)
    if isinstance(leaf, QuantizedMatrix)
    else leaf
    for path, leaf in flat.items()
  }
  return model.replace(params=flax.traverse_util.unflatten_dict(plain))


_WIDE = dict(
  hidden_size=128,
  intermediate_size=256,
  head_dim=32,
  num_attention_heads=4,
  num_key_value_heads=2,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_format", [None, "int8", "int8_g64"])
@pytest.mark.parametrize("tied", [False, True])
def test_reference_is_the_model_of_the_dequantised_weights(
  make_config, dtype, head_format, tied, monkeypatch
):
  # So that the LM head takes several blocks, the last one smaller.
  monkeypatch.setattr("ffjax.quantized_model._BLOCK_BYTES", 2000)
  config = make_config(
    **_WIDE, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
  )
  model = ffjax.random_model(config, 0, dtype)
  made = ffjax.quantize(model, "int4_g64_asym", head_format=head_format)
  # Of matrices that are all quantised, none asks for float32.
  assert made.dtype == (jnp.bfloat16 if head_format else dtype)
  names = {"int4_g64_asym"} | ({head_format} - {None})
  assert {format.name for format in made.formats} == names
  assert made.matrix_dtypes == (set() if head_format else {jnp.dtype(dtype)})
  (logits, cache), (expected, expected_cache) = (
    reference_outputs(x, dtype) for x in (made, dequantized_model(made, dtype))
  )
  assert logits.dtype == jnp.float32
  chex.assert_trees_all_close(
    (logits, cache), (expected, expected_cache), rtol=1e-5, atol=1e-5
  )
  # And not the model of other weights.
  other, _ = reference_outputs(model, dtype)
  assert float(jnp.abs(other - logits).max()) > 1e-3


@pytest.mark.parametrize("name", ["int4_g32", "int8", "fp8"])
def test_decoding(make_config, name):
  config = make_config(**_WIDE)
  model = ffjax.random_model(config, 3, "bfloat16", name, "int8")
  plain = dequantized_model(model)
  outs = [decode.generate(x, [[1, 2], [3]], 6) for x in (model, plain)]
  assert outs[0].token_ids == outs[1].token_ids
  found = decode.compare(model, [[1, 2, 3]], max_new_tokens=2)
  assert found.mean_kl < 1e-3


def test_sizes_are_of_what_is_stored(make_config):
  config = make_config(**_WIDE)
  made = ffjax.random_model(config, 0, "bfloat16", "int4_g32_asym", "int8")
  d, f, v, layers = 128, 256, config.vocab_size, config.num_hidden_layers
  weights = d * (128 + 64 + 64 + 128) + 3 * d * f
  # Half a byte; 2 bytes of scale and 1 of zero point for 32.
  layer_bytes = weights // 2 + 3 * (weights // 32) + 2 * 2 * d
  rows = v * d + 2 * v
  expected = layers * layer_bytes + 2 * d + rows + 2 * (d + 2)
  assert made.weight_bytes_per_step(2) == expected
  path = ("layers", "mlp", "up_proj", "weight")
  assert made.leaf_dtype(path) == jnp.bfloat16
  assert made.leaf_dtype(("norm", "weight")) == jnp.bfloat16


@pytest.mark.parametrize("name", list(FORMATS))
def test_random_models(make_config, name):
  config = make_config(**_WIDE, tie_word_embeddings=True)
  one, same, other = (
    ffjax.random_model(config, seed, "float16", name) for seed in (0, 0, 1)
  )
  chex.assert_trees_all_equal(one, same)
  quantised = ffjax.quantize(ffjax.random_model(config, 0, "float16"), name)
  chex.assert_trees_all_equal_shapes_and_dtypes(one, quantised)
  for path in (
    ("layers", "self_attn", "k_proj", "weight"),
    ("layers", "mlp", "down_proj", "weight"),
  ):
    matrices = [
      np.asarray(
        quantized.dequantize(flax.traverse_util.flatten_dict(x.params)[path])
      )
      for x in (one, other)
    ]
    assert np.isfinite(matrices).all()
    assert (matrices[0] != matrices[1]).mean() > 0.8
    assert 0.01 < matrices[0].std() < 0.04
    assert (matrices[0][0] != matrices[0][1]).mean() > 0.8


def test_what_is_refused(make_config):
  config = make_config(**_WIDE)
  model = ffjax.random_model(config)
  for name in ("int3", "int4", "INT8", None, 4):
    with pytest.raises(RequestError, match="does not exist .there are: int4_g"):
      ffjax.quantize(model, name)
  with pytest.raises(RequestError, match="head_format='fp8' is not supported"):
    ffjax.quantize(model, "int8", head_format="fp8")
  narrow = ffjax.random_model(make_config(**{**_WIDE, "hidden_size": 96}))
  with pytest.raises(
    RequestError,
    match=r"int4_g64 takes multiples of 64 columns, and model\.layers\.0\."
    r".*\.weight has 96",
  ):
    ffjax.quantize(narrow, "int4_g64")
  made = ffjax.quantize(model, "int8")
  with pytest.raises(
    RequestError, match=r"weight is quantised already \(int8\)"
  ):
    ffjax.quantize(made, "int4_g32")


def test_matrices_below_layers_are_all_that_is_quantised(make_config):
  config = make_config(**_WIDE, attention_bias=True)
  formats = params.matrix_formats(config, "int8")
  assert len(formats) == 7
  assert {path[0] for path in formats} == {"layers"}
  assert {path[-1] for path in formats} == {"weight"}
