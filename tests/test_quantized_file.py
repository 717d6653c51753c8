"""Tests of `ffjax.quantization_config`, `quantized_file` and `quantized_leaf`.

Files are packed here, code by code, as the descriptions of the formats say, and
what is loaded is compared with scale * (code - zero) in NumPy; in the last tests
also with what the `compressed-tensors` package makes of the same files.
"""

import copy
import json
import pathlib

import chex
import flax.traverse_util
import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import ffjax
from ffjax import checkpoint, params, quantized
from ffjax.config import LlamaConfig
from ffjax.errors import CheckpointError, ConfigError
from ffjax.quantized import QuantizedMatrix

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

_RAW = dict(
  architectures=["LlamaForCausalLM"],
  model_type="llama",
  vocab_size=24,
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=32,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  torch_dtype="float16",
)
_UP = "model.layers.0.mlp.up_proj"


def pack_words(codes, bits, order=None):
  """Packs `[..., n]` codes into int32 words along the last axis, by hand."""
  per_word = 32 // bits
  order = order or range(per_word)
  padding = -codes.shape[-1] % per_word
  codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
  words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), np.uint64)
  for place, column in enumerate(order):
    words |= codes[..., column::per_word].astype(np.uint64) << (bits * place)
  return words.astype(np.uint32).view(np.int32)


class Matrix:
  """Random codes, zero points and scales of one matrix, and its weights."""

  def __init__(self, shape, rng, *, bits=4, group, symmetric, zeros=(1, 16)):
    out, columns = shape
    self.bits = bits
    self.group = columns if group == -1 else group
    groups = columns // self.group
    middle = 2 ** (bits - 1)
    self.codes = rng.integers(0, 2**bits, shape)
    self.zeros = rng.integers(*zeros, (out, groups))
    if symmetric:
      self.zeros = np.full((out, groups), middle)
    self.scales = rng.uniform(0.01, 0.02, (out, groups)).astype(np.float16)
    self.group_of = np.arange(columns) // self.group

  def shuffle(self, rng):
    """Makes the groups those of act-order: not neighbours."""
    self.group_of = rng.permutation(self.group_of)

  @property
  def weights(self):
    values = self.codes - self.zeros[:, self.group_of]
    scales = self.scales.astype(np.float32)[:, self.group_of]
    return values.astype(np.float32) * scales


def gptq(m, *, stored_less=1, g_idx=True):
  # Words as a whole are less: a zero point of 0 borrows from the next one.
  ones = {4: 0x11111111, 8: 0x01010101}[m.bits]
  zeros = pack_words(m.zeros.T, m.bits).view(np.uint32)
  tensors = {
    # Along the columns of the matrix, which are its rows here.
    "qweight": np.ascontiguousarray(pack_words(m.codes, m.bits).T),
    "qzeros": (zeros - np.uint32(stored_less * ones)).view(np.int32),
    "scales": np.ascontiguousarray(m.scales.T),
  }
  if g_idx:
    tensors["g_idx"] = m.group_of.astype(np.int32)
  return tensors


def awq(m):
  order = (0, 2, 4, 6, 1, 3, 5, 7)
  return {
    "qweight": pack_words(m.codes.T, 4, order),
    "qzeros": pack_words(m.zeros.T, 4, order),
    "scales": np.ascontiguousarray(m.scales.T),
  }


def compressed(m, *, symmetric, packed_zeros=True, dtype=BF16, g_idx=False):
  m.scales = m.scales.astype(dtype)
  tensors = {
    "weight_packed": pack_words(m.codes, m.bits),
    "weight_scale": m.scales,
    "weight_shape": np.asarray(m.codes.shape, np.int64),
  }
  if not symmetric and packed_zeros:
    words = pack_words(m.zeros.T, m.bits)
    tensors["weight_zero_point"] = np.ascontiguousarray(words.T)
  elif not symmetric:
    tensors["weight_zero_point"] = (m.zeros - 8).astype(np.int8)
  if g_idx:
    tensors["weight_g_idx"] = m.group_of.astype(np.int32)
  return tensors


def write(directory, quantization, tensors_of, *, extra=None, **fields):
  """Writes a checkpoint; returns the dense tensors it stands for.

  Args:
    directory: where to.
    quantization: `quantization_config`, or None.
    tensors_of: makes, of a shape and a generator, a matrix's weights
      and the tensors it is stored as.
    extra: more tensors, or None in place of one.
    **fields: of `config.json`.
  """
  raw = {**_RAW, **fields}
  rng = np.random.default_rng(0)
  stored, dense = {}, {}
  for leaf in params.leaves(LlamaConfig.from_dict(raw)):
    for name in leaf.names:
      if leaf.stacked and len(leaf.tensor_shape) == 2:
        dense[name], made = tensors_of(leaf.tensor_shape, rng)
        module = name.removesuffix(".weight")
        stored.update({f"{module}.{key}": x for key, x in made.items()})
      else:
        values = rng.standard_normal(leaf.tensor_shape) / 8
        stored[name] = dense[name] = values.astype(np.float16)
  stored.update(extra or {})
  stored = {name: x for name, x in stored.items() if x is not None}
  if quantization is not None:
    raw["quantization_config"] = quantization
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps(raw))
  safetensors.numpy.save_file(stored, directory / "model.safetensors")
  return dense


def check(model, dense, name=None):
  """Compares all weights; returns the first quantised leaf."""
  flat = flax.traverse_util.flatten_dict(model.params)
  quantised = []
  for leaf in params.leaves(model.config):
    found = flat[leaf.path]
    if isinstance(found, QuantizedMatrix):
      quantised.append(found)
      assert found.shape == leaf.shape
      found = quantized.dequantize(found)
    expected = [dense[x] for x in leaf.names]
    np.testing.assert_array_equal(
      np.asarray(found, np.float32),
      np.asarray(expected if leaf.stacked else expected[0], np.float32),
      err_msg=str(leaf.path),
    )
  if name is None:
    assert not quantised
    return None
  assert {x.format.name for x in quantised} == {name}
  assert len(quantised) == 7
  return quantised[0]


def _gptq_config(**fields):
  return {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "damp_percent": 0.1,
    "true_sequential": True,
    **fields,
  }


def _awq_config(**fields):
  return {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": None,
    **fields,
  }


def _compressed_config(layout="pack-quantized", activations=None, **weights):
  return {
    "quant_method": "compressed-tensors",
    "format": layout,
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "global_compression_ratio": 1.5,
    "config_groups": {
      "group_0": {
        "targets": ["Linear"],
        "input_activations": activations,
        "output_activations": None,
        "weights": {
          "num_bits": 4,
          "type": "int",
          "symmetric": True,
          "strategy": "group",
          "group_size": 32,
          "dynamic": False,
          "actorder": None,
          "observer": "minmax",
          "observer_kwargs": {},
          **weights,
        },
      }
    },
  }


@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
  ("group", "symmetric", "name"),
  [
    (32, True, "int4_g32"),
    (64, True, "int4_g64"),
    (32, False, "int4_g32_asym"),
    # Of rows of 64 and 128, whole: several groups with equal scales.
    (-1, True, None),
  ],
)
def test_gptq(tmp_path, group, symmetric, name, version, g_idx):
  def make(shape, rng):
    m = Matrix(shape, rng, group=group, symmetric=symmetric, zeros=(0, 16))
    return m.weights, gptq(m, stored_less=version == "gptq", g_idx=g_idx)

  config = _gptq_config(
    group_size=group, sym=symmetric, checkpoint_format=version
  )
  dense = write(tmp_path, config, make)
  model = ffjax.load(tmp_path)
  if name is None:
    names = sorted(format.name for format in model.formats)
    assert names == ["int4_g128", "int4_g64"]
  else:
    found = check(model, dense, name)
    assert found.columns is None
    assert (found.zeros is None) == symmetric
    assert found.scales.dtype == np.float16
  check(ffjax.load(tmp_path, keep_quantized=False), dense)
  plain = ffjax.load(tmp_path, "bfloat16", keep_quantized=False)
  assert plain.matrix_dtypes == {BF16}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64])
def test_gptq_with_act_order(tmp_path, group, symmetric):
  layers = []

  def make(shape, rng):
    m = Matrix(shape, rng, group=group, symmetric=symmetric)
    # In the second layer of each kind there is nothing to reorder.
    layers.append(shape)
    if len(layers) % 2:
      m.shuffle(rng)
    return m.weights, gptq(m)

  config = _gptq_config(group_size=group, sym=symmetric, desc_act=True)
  dense = write(tmp_path, config, make)
  name = f"int4_g{group}" + ("" if symmetric else "_asym")
  model = ffjax.load(tmp_path)
  check(model, dense, name)
  check(ffjax.load(tmp_path, keep_quantized=False), dense)
  for leaf in jax.tree.leaves(
    model.params, is_leaf=lambda x: isinstance(x, QuantizedMatrix)
  ):
    if isinstance(leaf, QuantizedMatrix) and leaf.columns is not None:
      columns = np.asarray(leaf.columns)
      assert (np.sort(columns) == np.arange(columns.shape[-1])).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_of_rows_that_do_not_fill_a_word(tmp_path, symmetric):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=symmetric)
    return m.weights, gptq(m)

  heads = dict(num_attention_heads=8, num_key_value_heads=1, head_dim=12)
  config = _gptq_config(sym=symmetric)
  dense = write(tmp_path, config, make, hidden_size=96, **heads)
  check(
    ffjax.load(tmp_path), dense, "int4_g32" + ("" if symmetric else "_asym")
  )


@pytest.mark.parametrize("g_idx", [None, -1])
@pytest.mark.parametrize("layout", ["gptq", "pack-quantized"])
def test_an_order_that_is_not_there(tmp_path, layout, g_idx):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=True)
    if layout == "gptq":
      return m.weights, gptq(m, g_idx=False) | index("g_idx", shape)
    tensors = compressed(m, symmetric=True)
    return m.weights, tensors | index("weight_g_idx", shape)

  def index(name, shape):
    return {} if g_idx is None else {name: np.full(shape[1], -1, np.int32)}

  config = _gptq_config(desc_act=True)
  if layout != "gptq":
    config = _compressed_config(actorder="group")
  write(tmp_path, config, make)
  message = "g_idx is missing, but the config says"
  if (layout, g_idx) == ("gptq", -1):
    message = "g_idx does not make groups of 32"
  with pytest.raises(CheckpointError, match=message):
    ffjax.load(tmp_path)
  # Columns that were only quantised in another order are where they were.
  if layout != "gptq":
    dense = write(tmp_path, _compressed_config(actorder="weight"), make)
    check(ffjax.load(tmp_path), dense, "int4_g32")


def test_gptq_of_8_bits(tmp_path):
  def make(shape, rng):
    m = Matrix(shape, rng, bits=8, group=32, symmetric=True)
    return m.weights, gptq(m)

  dense = write(tmp_path, _gptq_config(bits=8), make)
  check(ffjax.load(tmp_path), dense, "int8_g32")


def test_a_file_beside_the_config(tmp_path):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=False)
    return m.weights, gptq(m)

  dense = write(tmp_path, None, make)
  with pytest.raises(CheckpointError, match="has dtype I32"):
    ffjax.load(tmp_path)
  config = _gptq_config(sym=False)
  del config["quant_method"]
  (tmp_path / "quantize_config.json").write_text(json.dumps(config))
  check(ffjax.load(tmp_path), dense, "int4_g32_asym")


def test_biases_that_add_nothing(tmp_path):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=True)
    return m.weights, gptq(m)

  name = f"{_UP}.bias"
  extra = {name: np.zeros(128, np.float16)}
  dense = write(tmp_path, _gptq_config(), make, extra=extra)
  check(ffjax.load(tmp_path), dense, "int4_g32")
  extra[name][3] = 1
  write(tmp_path, _gptq_config(), make, extra=extra)
  with pytest.raises(CheckpointError, match="up_proj.bias is not a tensor of"):
    ffjax.load(tmp_path)


@pytest.mark.parametrize("group", [32, 64])
def test_awq(tmp_path, group):
  def make(shape, rng):
    m = Matrix(shape, rng, group=group, symmetric=False, zeros=(0, 16))
    return m.weights, awq(m)

  dense = write(tmp_path, _awq_config(group_size=group), make)
  check(ffjax.load(tmp_path), dense, f"int4_g{group}_asym")
  check(ffjax.load(tmp_path, keep_quantized=False), dense)
  # AutoAWQ's own file.
  names = {"w_bit": 4, "q_group_size": group, "version": "GEMM"}
  write(tmp_path, None, make)
  (tmp_path / "quant_config.json").write_text(
    json.dumps({"zero_point": True, **names})
  )
  check(ffjax.load(tmp_path), dense, f"int4_g{group}_asym")


@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_pack_quantized(tmp_path, group, bits, g_idx):
  def make(shape, rng):
    m = Matrix(shape, rng, bits=bits, group=group, symmetric=True)
    if g_idx:
      m.shuffle(rng)
    tensors = compressed(m, symmetric=True, g_idx=g_idx)
    return m.weights, tensors

  config = _compressed_config(
    num_bits=bits, group_size=group, actorder="group" if g_idx else None
  )
  dense = write(tmp_path, config, make)
  found = check(ffjax.load(tmp_path), dense, f"int{bits}_g{group}")
  assert found.scales.dtype == BF16
  assert found.codes.dtype == np.uint8


@pytest.mark.parametrize("packed_zeros", [True, False])
def test_pack_quantized_with_zero_points(tmp_path, packed_zeros):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=False, zeros=(0, 16))
    tensors = compressed(m, symmetric=False, packed_zeros=packed_zeros)
    return m.weights, tensors

  dense = write(tmp_path, _compressed_config(symmetric=False), make)
  check(ffjax.load(tmp_path), dense, "int4_g32_asym")


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_say_nothing(tmp_path, bits):
  def make(shape, rng):
    m = Matrix(shape, rng, bits=bits, group=32, symmetric=True)
    tensors = compressed(m, symmetric=True)
    tensors["weight_zero_point"] = np.zeros(m.zeros.shape, np.int8)
    return m.weights, tensors

  dense = write(tmp_path, _compressed_config(num_bits=bits), make)
  check(ffjax.load(tmp_path), dense, f"int{bits}_g32")


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ({"weight_shape": np.asarray([128, 64], np.float32)}, "has dtype float32"),
    (
      {"weight_zero_point": np.full((128, 2), -9, np.int8)},
      "weight_zero_point has -9 to -9, but zero points of 4 bits are -8 to 7",
    ),
    (
      {"weight_zero_point": np.full((128, 2), 8, np.int8)},
      "weight_zero_point has 8 to 8, but",
    ),
    (
      {"weight_scale": np.full((128, 2), 3e38, BF16)},
      "up_proj.weight holds values that are not finite",
    ),
  ],
)
def test_damaged_compressed_files(tmp_path, extra, message):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=False)
    return m.weights, compressed(m, symmetric=False, packed_zeros=False)

  extra = {f"{_UP}.{name}": x for name, x in extra.items()}
  write(tmp_path, _compressed_config(symmetric=False), make, extra=extra)
  with pytest.raises(CheckpointError, match=message):
    ffjax.load(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_quantized_by_channel(tmp_path, bits):
  def make(shape, rng):
    m = Matrix(shape, rng, bits=bits, group=-1, symmetric=True)
    tensors = compressed(m, symmetric=True, dtype=np.float32)
    return m.weights, tensors

  config = _compressed_config(
    num_bits=bits, strategy="channel", group_size=None
  )
  dense = write(tmp_path, config, make)
  model = ffjax.load(tmp_path)
  check(ffjax.load(tmp_path, keep_quantized=False), dense)
  names = {format.name for format in model.formats}
  assert names == ({"int8"} if bits == 8 else {"int4_g64", "int4_g128"})


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_codes_of_a_byte(tmp_path, kind, strategy):
  def make(shape, rng):
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    bits[bits & 0x7F == 0x7F] = 0
    codes = bits.view(np.int8 if kind == "int" else FP8)
    rows = shape[0] if strategy == "channel" else 1
    scales = rng.uniform(0.01, 0.02, (rows, 1)).astype(BF16)
    weights = codes.astype(np.float32) * scales.astype(np.float32)
    stored = scales if strategy == "channel" else scales.reshape(1)
    return weights, {"weight": codes, "weight_scale": stored}

  config = _compressed_config(
    f"{kind}-quantized",
    {"dynamic": True, "num_bits": 8, "strategy": "token"},
    num_bits=8,
    type=kind,
    strategy=strategy,
    group_size=None,
  )
  dense = write(tmp_path, config, make)
  name = "int8" if kind == "int" else "fp8"
  found = check(ffjax.load(tmp_path), dense, name)
  assert found.scales.shape[-1] == 1
  check(ffjax.load(tmp_path, keep_quantized=False), dense)


def _changed(config, path, value):
  config = copy.deepcopy(config)
  inner = config
  *outer, last = path.split(".")
  for key in outer:
    inner = inner[key]
  inner[last] = value
  return config


_GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
  ("config", "path", "value", "message"),
  [
    (_gptq_config(), "quant_method", "bitsandbytes", "'bitsandbytes'"),
    (_gptq_config(), "quant_method", "fp8", "quant_method='fp8' is not supp"),
    (_gptq_config(), "quant_method", [], r"quant_method=\[\] is not supp"),
    (_gptq_config(), "bits", 3, "bits=3 is not supported"),
    (_gptq_config(), "bits", True, "bits=True is not supported"),
    (_gptq_config(bits=8), "sym", False, "sym=False is not supported with"),
    (_gptq_config(), "group_size", 16, "group_size=16 is not supported"),
    (_gptq_config(), "group_size", 48, "group_size=48 is not supported"),
    (_gptq_config(), "checkpoint_format", "marlin", "'marlin' is not supp"),
    (_gptq_config(), "is_marlin_format", True, "is_marlin_format=True is not"),
    (_gptq_config(), "dynamic", {"-:x": {}}, "dynamic=.* is not supported"),
    (_gptq_config(), "pack_dtype", "int16", "pack_dtype='int16' is not"),
    (_awq_config(), "version", "gemv", "version='gemv' is not supported"),
    (_awq_config(), "bits", 8, "bits=8 is not supported"),
    (_awq_config(), "novel", 1, "novel=1 is not supported"),
    (_compressed_config(), "format", "nvfp4-pack-quantized", "format='nvfp4"),
    (_compressed_config(), "format", "marlin-24", "format='marlin-24' is not"),
    (_compressed_config(), "kv_cache_scheme", {"a": 1}, "kv_cache_scheme="),
    (_compressed_config(), "sparsity_config", {"a": 1}, "sparsity_config="),
    (_compressed_config(), "config_groups", {}, "must have one group"),
    (_compressed_config(), f"{_GROUP}.targets", ["re:.*q"], "targets="),
    (
      _compressed_config(),
      f"{_GROUP}.input_activations",
      {"dynamic": False},
      r"input_activations: dynamic=False is not supported",
    ),
    (_compressed_config(), f"{_GROUP}.weights.num_bits", 2, "num_bits=2 is"),
    (_compressed_config(), f"{_GROUP}.weights.type", "float", "type='float'"),
    (_compressed_config(), f"{_GROUP}.weights.strategy", "block", "'block'"),
    (_compressed_config(), f"{_GROUP}.weights.group_size", None, "does not go"),
    (_compressed_config(), f"{_GROUP}.weights.dynamic", True, "dynamic=True"),
    (_compressed_config(), f"{_GROUP}.weights.actorder", "x", "actorder='x'"),
    (_compressed_config(), f"{_GROUP}.weights", None, "must be an object"),
    (_compressed_config(), f"{_GROUP}.weights.block_structure", [2], "block_"),
  ],
)
def test_unknown_variants(tmp_path, config, path, value, message):
  raw = {**_RAW, "quantization_config": _changed(config, path, value)}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  with pytest.raises(ConfigError, match=f"config.json: quant.*{message}"):
    ffjax.load(tmp_path)


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ({f"{_UP}.scales": None}, "up_proj.scales is missing"),
    ({f"{_UP}.qweight": None}, "has dtype int32, and is no part of a matrix"),
    (
      {f"{_UP}.qzeros": np.zeros((2, 3), np.int32)},
      r"qzeros has shape \[2, 3\], but that of a matrix of \[128, 64\] is \[2, 16",
    ),
    ({f"{_UP}.scales": np.zeros((2, 128), np.int32)}, "scales has dtype int32"),
    (
      {f"{_UP}.g_idx": np.zeros(64, np.int32)},
      "g_idx does not make groups of 32",
    ),
    ({f"{_UP}.g_idx": np.zeros(63, np.int32)}, r"g_idx has shape \[63\]"),
    (
      {f"{_UP}.weight": np.zeros((128, 64), np.float16)},
      "there is .*up_proj.weight beside .*up_proj.qweight",
    ),
    (
      {f"{_UP}.qweight": np.zeros((0, 128), np.int32)},
      r"qweight is not a matrix, but of shape \[0, 128\]",
    ),
    (
      {f"{_UP}.scales": np.ones((2, 128), np.float32)},
      "1.mlp.up_proj.weight is int4_g32 with scales of float16, but .* float32",
    ),
    (
      {f"{_UP}.qzeros": np.zeros((2, 16), np.int32)},
      "qzeros is not 8 throughout, as a symmetric",
    ),
    (
      {f"{_UP}.scales": np.full((2, 128), np.inf, np.float16)},
      "up_proj.weight holds values that are not finite",
    ),
    (
      {f"{_UP}.{x}": None for x in ("qweight", "qzeros", "scales", "g_idx")}
      | {f"{_UP}.weight": np.zeros((128, 64), np.float16)},
      r"0\.mlp\.up_proj\.weight is F16, but .*1\.mlp\.up_proj.* is int4_g32: ",
    ),
  ],
)
def test_damaged_files(tmp_path, extra, message):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=True)
    return m.weights, gptq(m)

  write(tmp_path, _gptq_config(), make, extra=extra)
  with pytest.raises(CheckpointError, match=message):
    ffjax.load(tmp_path)


@pytest.mark.parametrize("fault", ["nibbles", "zeros", "groups", "order"])
def test_faults_show(tmp_path, fault):
  # That the comparisons above can fail: what a wrong reader would make.
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=False, zeros=(0, 16))
    weights = m.weights
    if fault == "nibbles":
      m.codes = m.codes.reshape(shape[0], -1, 2)[..., ::-1].reshape(shape)
    elif fault == "zeros":
      m.zeros = np.clip(m.zeros + 1, 0, 15)
    elif fault == "groups":
      m.scales = np.roll(m.scales, 1, axis=1)
    tensors = awq(m)
    if fault == "order":
      tensors["qweight"] = pack_words(m.codes.T, 4)
    return weights, tensors

  dense = write(tmp_path, _awq_config(), make)
  with pytest.raises(AssertionError, match="Mismatched elements"):
    check(ffjax.load(tmp_path), dense, "int4_g32_asym")


def test_checkpoint_says_what_it_will_give(tmp_path):
  def make(shape, rng):
    m = Matrix(shape, rng, group=32, symmetric=True)
    return m.weights, gptq(m)

  write(tmp_path, _gptq_config(), make)
  opened = checkpoint.open_checkpoint(tmp_path)
  for arguments in ((), ("bfloat16",), ("bfloat16", False), (None, False)):
    shapes = opened.shapes(*arguments)
    model = opened.load(
      *arguments[:1], keep_quantized=(*arguments, None, None)[1]
    )
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, model)
    assert (shapes.dtype, shapes.formats) == (model.dtype, model.formats)
  seen = []
  model = opened.load(progress=lambda *x: seen.append(x))
  assert seen[0][0] == 0
  assert seen[-1][0] == seen[-1][1]
  stored = sum(x.nbytes for x in jax.tree.leaves(model.params))
  assert seen[-1][1] == stored


# GGUF ------------------------------------------------------------------------

Type = gguf.GGMLQuantizationType


def write_gguf(path, kind, kinds=None):
  """Writes a model, matrices of type `kind` but for those in `kinds`."""
  rng = np.random.default_rng(0)
  hidden, heads, width, vocab, layers = 64, 2, 128, 24, 2
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(layers)
  writer.add_context_length(64)
  writer.add_embedding_length(hidden)
  writer.add_feed_forward_length(width)
  writer.add_head_count(heads)
  writer.add_head_count_kv(1)
  writer.add_layer_norm_rms_eps(1e-5)
  shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
  for layer in range(layers):
    for name, shape in {
      "attn_q": (hidden, hidden),
      "attn_k": (hidden // 2, hidden),
      "attn_v": (hidden // 2, hidden),
      "attn_output": (hidden, hidden),
      "ffn_gate": (width, hidden),
      "ffn_up": (width, hidden),
      "ffn_down": (hidden, width),
    }.items():
      shapes[f"blk.{layer}.{name}"] = shape
    for name in ("attn_norm", "ffn_norm"):
      shapes[f"blk.{layer}.{name}"] = (hidden,)
  shapes["output_norm"] = (hidden,)
  for name, shape in shapes.items():
    values = rng.standard_normal(shape).astype(np.float32)
    one = (kinds or {}).get(name, kind) if len(shape) == 2 else Type.F32
    data = values if one == Type.F32 else gguf.quantize(values, one)
    writer.add_tensor(f"{name}.weight", data, raw_dtype=one)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


_KINDS = {
  Type.Q4_0: "int4_g32",
  Type.Q4_1: "int4_g32_asym",
  Type.Q8_0: "int8_g32",
}


def _dense(model):
  return {
    name: np.asarray(leaf)[layer] if leaf.ndim > 1 else np.asarray(leaf)
    for item in params.leaves(model.config)
    for leaf in [flax.traverse_util.flatten_dict(model.params)[item.path]]
    for layer, name in enumerate(item.names)
    if item.stacked
  }


@pytest.mark.parametrize("kind", list(_KINDS), ids=lambda kind: kind.name)
def test_gguf_in_its_own_bits(tmp_path, kind):
  path = write_gguf(tmp_path / "a.gguf", kind)
  plain = ffjax.load(path)
  assert plain.formats == frozenset()
  dense = _dense(plain)  # By the gguf package.
  model = ffjax.load(path, keep_quantized=True)
  assert {format.name for format in model.formats} == {_KINDS[kind]}
  # What is not of the layers is rounded, as in any bfloat16 model.
  assert model.matrix_dtypes == {BF16}
  assert model.dtype == BF16
  for item in params.leaves(model.config):
    found = flax.traverse_util.flatten_dict(model.params)[item.path]
    if isinstance(found, QuantizedMatrix):
      assert found.scales.dtype == np.float16
      expected = [dense[name] for name in item.names]
      np.testing.assert_array_equal(quantized.dequantize(found), expected)
  as_float32 = ffjax.load(path, "float32", keep_quantized=True)
  assert as_float32.dtype == np.float32


def test_gguf_layers_of_related_types(tmp_path):
  mixed = {"blk.1.ffn_down": Type.Q4_1, "blk.0.attn_q": Type.Q4_1}
  path = write_gguf(tmp_path / "a.gguf", Type.Q4_0, mixed)
  dense = _dense(ffjax.load(path))
  model = ffjax.load(path, keep_quantized=True)
  names = {format.name for format in model.formats}
  assert names == {"int4_g32", "int4_g32_asym"}
  for item in params.leaves(model.config):
    found = flax.traverse_util.flatten_dict(model.params)[item.path]
    if isinstance(found, QuantizedMatrix):
      expected = [dense[name] for name in item.names]
      np.testing.assert_array_equal(quantized.dequantize(found), expected)


def test_gguf_layers_of_other_types(tmp_path):
  path = write_gguf(
    tmp_path / "a.gguf", Type.Q4_0, {"blk.1.ffn_down": Type.Q8_0}
  )
  with pytest.raises(
    CheckpointError,
    match=r"layers\.1\.mlp\.down_proj\.weight is Q8_0, but"
    r" model\.layers\.0\.mlp\.down_proj\.weight is Q4_0: .*alike",
  ):
    ffjax.load(path, keep_quantized=True)
  assert ffjax.load(path).formats == frozenset()
  # A kind that is all of a type that ffjax lacks is dequantised.
  path = write_gguf(
    tmp_path / "b.gguf",
    Type.Q4_0,
    {f"blk.{layer}.ffn_down": Type.Q5_0 for layer in range(2)},
  )
  model = ffjax.load(path, keep_quantized=True)
  assert model.params["layers"]["mlp"]["down_proj"]["weight"].dtype == BF16
  assert {format.name for format in model.formats} == {"int4_g32"}


def test_smollm2_keeps_its_bits():
  path = (
    pathlib.Path(__file__).parents[1]
    / "checkpoints/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  )
  if not path.exists():
    pytest.skip("no SmolLM2: `python checkpoints/get_smollm2.py` fetches it")
  reader = gguf.GGUFReader(path)
  layers = ffjax.load(path, keep_quantized=True).params["layers"]
  for module, name, theirs in (
    ("self_attn", "o_proj", "attn_output"),
    ("mlp", "down_proj", "ffn_down"),
  ):
    found = np.asarray(quantized.dequantize(layers[module][name]["weight"]))
    for layer in (0, 29):
      (tensor,) = (
        x for x in reader.tensors if x.name == f"blk.{layer}.{theirs}.weight"
      )
      expected = gguf.dequantize(tensor.data, tensor.tensor_type)
      np.testing.assert_array_equal(found[layer], expected)
