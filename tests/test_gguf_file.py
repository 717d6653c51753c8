"""Tests of `ffjax.gguf_file`, `ffjax.gguf_config` and `ffjax.gguf_header`.

The files are written and, for the expected values, read by the `gguf` package;
`ffjax` parses the header itself.
"""

import os
import pathlib
import struct
import sys
import warnings

import gguf
import ml_dtypes
import numpy as np
import pytest

from ffjax.errors import CheckpointError, ConfigError
from ffjax.gguf_file import open_gguf

Type = gguf.GGMLQuantizationType

_SMOLLM2 = (
  pathlib.Path(__file__).parent.parent
  / "checkpoints/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)

# hidden, heads, KV heads, MLP width, vocabulary, layers
_SMALL = (32, 2, 1, 64, 8, 1)
_SIZES = (256, 8, 2, 256, 40, 2)

_REMOVE = object()


def _metadata(sizes):
  hidden, heads, kv_heads, width, vocab, layers = sizes
  return {
    "llama.block_count": layers,
    "llama.context_length": 128,
    "llama.embedding_length": hidden,
    "llama.feed_forward_length": width,
    "llama.attention.head_count": heads,
    "llama.attention.head_count_kv": kv_heads,
    "llama.attention.layer_norm_rms_epsilon": 2.0**-16,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": hidden // heads,
    "llama.vocab_size": vocab,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(vocab)],
    "tokenizer.ggml.token_type": [1] * vocab,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
  }


def _shapes(sizes, *, output=False, biases=False):
  hidden, heads, kv_heads, width, vocab, layers = sizes
  kv = hidden // heads * kv_heads
  shapes = {
    "token_embd.weight": (vocab, hidden),
    "output_norm.weight": (hidden,),
  }
  if output:
    shapes["output.weight"] = (vocab, hidden)
  for layer in range(layers):
    matrices = {
      "attn_q": (hidden, hidden),
      "attn_k": (kv, hidden),
      "attn_v": (kv, hidden),
      "attn_output": (hidden, hidden),
      "ffn_gate": (width, hidden),
      "ffn_up": (width, hidden),
      "ffn_down": (hidden, width),
    }
    for name, shape in matrices.items():
      shapes[f"blk.{layer}.{name}.weight"] = shape
      if biases:
        shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
    for name in ("attn_norm", "ffn_norm"):
      shapes[f"blk.{layer}.{name}.weight"] = (hidden,)
  return shapes


def _stored(shape, kind, rng):
  values = rng.standard_normal(shape).astype(np.float32)
  try:
    return gguf.quantize(values, kind)
  except NotImplementedError:
    # The package only reads these; any bytes are some numbers.
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return rng.integers(
      0, 256, (*shape[:-1], shape[-1] // block * block_bytes), np.uint8
    )


def _add_value(writer, key, value):
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, int):
    (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  else:
    writer.add_array(key, value)


def _write(
  path,
  sizes=_SMALL,
  *,
  kind=Type.F32,
  changes=None,
  tensors=None,
  architecture="llama",
  endianess=gguf.GGUFEndian.LITTLE,
  **shape_options,
):
  """Writes a model; `changes` and `tensors` replace, add or `_REMOVE`."""
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
  for key, value in (_metadata(sizes) | (changes or {})).items():
    if value is not _REMOVE:
      _add_value(writer, key, value)
  arrays = {}
  for name, shape in _shapes(sizes, **shape_options).items():
    # As llama.cpp does, keep vectors in float32.
    one = Type.F32 if len(shape) == 1 else kind
    arrays[name] = (_stored(shape, one, rng), one)
  for name, array in (tensors or {}).items():
    arrays[name] = array if isinstance(array, tuple) else (array, Type.F32)
  for name, (array, one) in arrays.items():
    if array is not _REMOVE:
      writer.add_tensor(name, array, raw_dtype=one)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def _expected(path):
  """Returns Hugging Face name to array, as the `gguf` package reads them."""
  reader = gguf.GGUFReader(path)
  heads = reader.fields["llama.attention.head_count"].contents()
  kv_field = reader.fields.get("llama.attention.head_count_kv")
  kv_heads = kv_field.contents() if kv_field else heads
  found = {}
  for tensor in reader.tensors:
    with np.errstate(all="ignore"):
      values = gguf.dequantize(tensor.data, tensor.tensor_type)
    parts = tensor.name.split(".")
    if parts[0] == "blk":
      name = f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
      if parts[2] in ("attn_q", "attn_k"):
        num = heads if parts[2] == "attn_q" else kv_heads
        rest = values.shape[1:]
        values = (
          values.reshape(num, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
        )
    elif tensor.name == "rope_freqs.weight":
      continue
    else:
      name = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
      }[tensor.name]
    found[name] = values
  return found


def _check_tensors(opened, expected):
  assert {entry.name for entry in opened.entries} == set(expected)
  for entry in opened.entries:
    values = entry.read(0, entry.shape[0])
    assert values.shape == entry.shape == expected[entry.name].shape
    assert values.dtype == entry.dtype
    np.testing.assert_array_equal(
      values.astype(np.float32), expected[entry.name], err_msg=entry.name
    )


def test_config(tmp_path):
  path = _write(tmp_path / "a.gguf", _SIZES, output=True)
  opened = open_gguf(str(path))
  assert opened.config == {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2.0**-16,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }
  assert opened.tokenizer_metadata == {
    key: value
    for key, value in _metadata(_SIZES).items()
    if key.startswith("tokenizer.")
  }


def test_absent_keys_have_llama_cpp_defaults(tmp_path):
  absent = (
    "llama.attention.head_count_kv",
    "llama.rope.freq_base",
    "llama.rope.dimension_count",
    "llama.vocab_size",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.tokens",
  )
  sizes = (32, 2, 2, 64, 8, 1)
  path = _write(
    tmp_path / "a.gguf", sizes, changes=dict.fromkeys(absent, _REMOVE)
  )
  config = open_gguf(path).config
  assert config["num_key_value_heads"] == 2
  assert config["rope_theta"] == 10000.0
  assert config["head_dim"] == 16
  assert config["vocab_size"] == 8
  assert config["tie_word_embeddings"] is True
  assert config["bos_token_id"] is config["eos_token_id"] is None


def test_head_size_may_differ_from_width_over_heads(tmp_path):
  rng = np.random.default_rng(1)
  shapes = {"attn_q": (16, 32), "attn_k": (8, 32), "attn_v": (8, 32)}
  shapes["attn_output"] = (32, 16)
  path = _write(
    tmp_path / "a.gguf",
    changes={
      "llama.attention.key_length": 8,
      "llama.attention.value_length": 8,
      "llama.rope.dimension_count": 8,
    },
    tensors={
      f"blk.0.{name}.weight": rng.standard_normal(shape).astype(np.float32)
      for name, shape in shapes.items()
    },
  )
  opened = open_gguf(path)
  assert opened.config["head_dim"] == 8
  _check_tensors(opened, _expected(path))


_DTYPES = {Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}


@pytest.mark.parametrize(
  "kind",
  [
    Type.F32,
    Type.F16,
    Type.BF16,
    Type.Q8_0,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
    Type.IQ4_XS,
  ],
  ids=lambda kind: kind.name,
)
def test_tensors(tmp_path, kind):
  path = _write(
    tmp_path / "a.gguf", _SIZES, kind=kind, output=True, biases=True
  )
  opened = open_gguf(path)
  expected = _expected(path)
  _check_tensors(opened, expected)
  assert opened.config["attention_bias"] is opened.config["mlp_bias"] is True
  for entry in opened.entries:
    kept = (
      np.float32 if len(entry.shape) == 1 else _DTYPES.get(kind, np.float32)
    )
    assert entry.dtype == np.dtype(kept)
    assert entry.path == path


def test_q_and_k_rows_fit_rotated_halves(tmp_path):
  # Row r of each head holds r, so the order itself can be read off.
  head = np.tile(np.arange(16, dtype=np.float32)[:, None], (1, 32))
  path = _write(
    tmp_path / "a.gguf",
    tensors={
      "blk.0.attn_q.weight": np.concatenate([head, head + 16]),
      "blk.0.attn_k.weight": head,
    },
  )
  entries = {entry.name: entry for entry in open_gguf(path).entries}
  evens_then_odds = [*range(0, 16, 2), *range(1, 16, 2)]
  k = entries["model.layers.0.self_attn.k_proj.weight"].read(0, 16)
  assert k[:, 0].tolist() == evens_then_odds
  q = entries["model.layers.0.self_attn.q_proj.weight"].read(0, 32)
  assert q[16:, 0].tolist() == [row + 16 for row in evens_then_odds]


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q4_1, Type.Q6_K])
def test_partial_reads(tmp_path, kind):
  path = _write(tmp_path / "a.gguf", _SIZES, kind=kind, biases=True)
  rng = np.random.default_rng(2)
  for entry in open_gguf(path).entries:
    full = entry.read(0, entry.shape[0])
    ranges = [sorted(rng.integers(0, entry.shape[0] + 1, 2)) for _ in range(8)]
    for start, stop in [*ranges, (0, 1), (5, 5)]:
      part = entry.read(int(start), int(stop))
      assert part.dtype == entry.dtype
      np.testing.assert_array_equal(part, full[start:stop])
    for start, stop in [(-1, 1), (0, entry.shape[0] + 1), (3, 2)]:
      with pytest.raises(CheckpointError, match="has no rows"):
        entry.read(start, stop)


def test_quantised_vectors(tmp_path):
  bias = np.random.default_rng(3).standard_normal(32).astype(np.float32)
  packed = (gguf.quantize(bias, Type.Q8_0), Type.Q8_0)
  path = _write(
    tmp_path / "a.gguf", biases=True, tensors={"blk.0.attn_q.bias": packed}
  )
  opened = open_gguf(path)
  _check_tensors(opened, _expected(path))
  entry = next(e for e in opened.entries if e.name.endswith("q_proj.bias"))
  np.testing.assert_array_equal(entry.read(3, 20), entry.read(0, 32)[3:20])


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"llama.rope.scaling.type": "none"}, None),
    (
      {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
      None,
    ),
    (
      {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
      {"rope_type": "linear", "factor": 4.0},
    ),
    (
      {"llama.rope.scaling.factor": 2.0},
      {"rope_type": "linear", "factor": 2.0},
    ),
    ({"llama.rope.scale_linear": 8.0}, {"rope_type": "linear", "factor": 8.0}),
    ({"llama.rope.scaling.factor": 1.0}, None),
  ],
)
def test_rope_scaling(tmp_path, changes, expected):
  path = _write(tmp_path / "a.gguf", changes=changes)
  assert open_gguf(path).config["rope_scaling"] == expected


def _llama3_factors(head_dim, theta, factor, low=1.0, high=4.0, context=8192):
  # Frequency by frequency, as Llama 3.1's own code does it.
  factors = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * theta ** (i / head_dim)
    if wavelength < context / high:
      factors.append(1.0)
    elif wavelength > context / low:
      factors.append(factor)
    else:
      smooth = (context / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling(tmp_path, factor):
  factors = _llama3_factors(32, 500000.0, factor)
  # All three branches take part.
  assert factors[0] == 1
  assert factors[-1] == factor
  assert any(1 < value < factor for value in factors)
  path = _write(
    tmp_path / "a.gguf",
    _SIZES,
    changes={"llama.rope.freq_base": 500000.0},
    tensors={"rope_freqs.weight": factors},
  )
  opened = open_gguf(path)
  assert opened.config["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  assert not [e for e in opened.entries if "rope" in e.name]


def test_rope_factors_of_one_scale_nothing(tmp_path):
  ones = np.ones(8, np.float32)
  path = _write(tmp_path / "a.gguf", tensors={"rope_freqs.weight": ones})
  assert open_gguf(path).config["rope_scaling"] is None


@pytest.mark.parametrize(
  "factors",
  [
    _llama3_factors(32, 500000.0, 8.0, low=2.0),
    _llama3_factors(32, 500000.0, 8.0, context=4096),
    _llama3_factors(32, 500000.0, 8.0) * np.float32(1.001),
    _llama3_factors(32, 500000.0, 8.0)[:-1],
    np.zeros(16, np.float32),
    np.full(16, np.nan, np.float32),
    np.full(16, np.inf, np.float32),
    -np.ones(16, np.float32),
    np.ones((16, 1), np.float32),
  ],
)
def test_other_rope_factors_are_refused(tmp_path, factors):
  path = _write(
    tmp_path / "a.gguf",
    _SIZES,
    changes={"llama.rope.freq_base": 500000.0},
    tensors={"rope_freqs.weight": factors},
  )
  with pytest.raises(ConfigError, match="rope_freqs.weight"):
    open_gguf(path)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("general.alignment", 48),
    ("general.quantization_version", 1),
    ("general.type", "adapter"),
    ("llama.attention.causal", False),
    ("llama.attention.head_count", 0),
    ("llama.attention.head_count", [2, 2]),
    ("llama.attention.head_count", 3),
    ("llama.attention.head_count_kv", -1),
    ("llama.attention.layer_norm_rms_epsilon", float("nan")),
    ("llama.attention.layer_norm_rms_epsilon", 0.0),
    ("llama.attention.layer_norm_rms_epsilon", "1e-5"),
    ("llama.attention.sliding_window", 64),
    ("llama.attention.value_length", 8),
    ("llama.block_count", 2),
    ("llama.block_count", 2**31 - 1),
    ("llama.context_length", 2.5),
    ("llama.context_length", True),
    ("llama.embedding_length", 2**32 - 1),
    ("llama.expert_count", 8),
    ("llama.feed_forward_length", [64]),
    ("llama.logit_scale", 2.0),
    ("llama.rope.dimension_count", 8),
    ("llama.rope.freq_base", float("inf")),
    ("llama.rope.freq_base", -1.0),
    ("llama.rope.scaling.attn_factor", 2.0),
    ("llama.rope.scaling.factor", 0.0),
    ("llama.rope.scaling.type", "yarn"),
    ("llama.rope.scaling.type", "longrope"),
    ("llama.tensor_data_layout", "other"),
    ("llama.vocab_size", 9),
    ("split.count", 2),
    ("tokenizer.ggml.bos_token_id", 8),
    ("tokenizer.ggml.eos_token_id", -1),
    ("tokenizer.ggml.tokens", ["a"]),
  ],
)
def test_metadata_that_is_not_supported(tmp_path, key, value):
  path = _write(tmp_path / "a.gguf", changes={key: value})
  with pytest.raises((ConfigError, CheckpointError), match=key) as caught:
    open_gguf(path)
  assert str(path) in str(caught.value)


def test_linear_scaling_without_factor(tmp_path):
  changes = {"llama.rope.scaling.type": "linear"}
  path = _write(tmp_path / "a.gguf", changes=changes)
  with pytest.raises(CheckpointError, match="llama.rope.scaling.factor"):
    open_gguf(path)


def test_linear_scaling_along_with_factors(tmp_path):
  path = _write(
    tmp_path / "a.gguf",
    changes={"llama.rope.scaling.factor": 2.0},
    tensors={"rope_freqs.weight": np.ones(8, np.float32)},
  )
  with pytest.raises(ConfigError, match="llama.rope.scaling.factor"):
    open_gguf(path)


def test_odd_head_size(tmp_path):
  changes = {
    "llama.attention.key_length": 5,
    "llama.attention.value_length": 5,
    "llama.rope.dimension_count": 5,
  }
  path = _write(tmp_path / "a.gguf", changes=changes)
  with pytest.raises(ConfigError, match="is odd"):
    open_gguf(path)


@pytest.mark.parametrize(
  "key",
  [
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
  ],
)
def test_missing_metadata(tmp_path, key):
  path = _write(tmp_path / "a.gguf", changes={key: _REMOVE})
  with pytest.raises(CheckpointError, match=key):
    open_gguf(path)


def test_other_architecture(tmp_path):
  # The architecture is the reason, not the tensor that comes with it.
  tensors = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
  path = _write(tmp_path / "a.gguf", architecture="qwen2", tensors=tensors)
  with pytest.raises(ConfigError, match="general.architecture 'qwen2'"):
    open_gguf(path)


@pytest.mark.parametrize(
  "name",
  [
    "blk.0.attn_q_norm.weight",
    "blk.0.ffn_gate_exps.weight",
    "blk.0.attn_norm.bias",
    "blk.00.attn_q.weight",
    "blk.0.attn_q.scale",
    "rope_factors_long.weight",
    "output.bias",
  ],
)
def test_tensor_that_is_not_supported(tmp_path, name):
  tensors = {name: np.ones((32, 32), np.float32)}
  path = _write(tmp_path / "a.gguf", tensors=tensors)
  with pytest.raises(CheckpointError, match=f"{name}' is not supported"):
    open_gguf(path)


@pytest.mark.parametrize(
  ("name", "array", "problem"),
  [
    ("token_embd.weight", (_REMOVE, None), "token_embd.weight"),
    ("token_embd.weight", np.ones(8, np.float32), "1 dimensions, not 2"),
    ("output_norm.weight", np.ones((1, 32), np.float32), "2 dimensions, not 1"),
    ("blk.0.attn_v.bias", np.ones((32, 1), np.float32), "2 dimensions, not 1"),
    ("blk.0.attn_q.weight", np.ones((30, 32), np.float32), "30 rows, not 2"),
    ("blk.0.attn_k.bias", np.ones(32, np.float32), "32 rows, not 1 heads"),
    ("blk.0.attn_v.weight", np.ones((16, 32), np.int32), "type I32"),
    ("blk.0.attn_v.weight", np.ones((16, 32), np.float64), "type F64"),
    ("blk.5.attn_v.weight", np.ones((16, 32), np.float32), "block_count"),
  ],
)
def test_wrong_tensors(tmp_path, name, array, problem):
  if not isinstance(array, tuple):
    kinds = {"int32": Type.I32, "float64": Type.F64, "float32": Type.F32}
    array = (array, kinds[array.dtype.name])
  path = _write(tmp_path / "a.gguf", tensors={name: array})
  with pytest.raises((CheckpointError, ConfigError), match=problem) as caught:
    open_gguf(path)
  assert str(path) in str(caught.value)


def test_package_missing(tmp_path, monkeypatch):
  path = _write(tmp_path / "a.gguf")
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(CheckpointError, match=r"pip install 'ffjax\[gguf\]'"):
    open_gguf(path)


def test_file_missing(tmp_path):
  with pytest.raises(CheckpointError, match="none.gguf"):
    open_gguf(tmp_path / "none.gguf")
  with pytest.raises(CheckpointError, match="cannot be read"):
    open_gguf(tmp_path)


def test_later_part_of_a_split_file(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
  writer.kv_data[0].clear()
  writer.add_uint16("split.count", 3)
  writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(CheckpointError, match="split.count is 3"):
    open_gguf(tmp_path / "a.gguf")


def test_big_endian(tmp_path):
  path = _write(tmp_path / "a.gguf", endianess=gguf.GGUFEndian.BIG)
  with pytest.raises(CheckpointError, match="big-endian"):
    open_gguf(path)


def test_file_changes_after_opening(tmp_path):
  path = _write(tmp_path / "a.gguf")
  entry = open_gguf(path).entries[0]
  content = path.read_bytes()
  path.write_bytes(content[:-100])
  with pytest.raises(CheckpointError, match="changed"):
    entry.read(0, 1)
  path.write_bytes(content)
  os.utime(path, ns=(0, 0))
  with pytest.raises(CheckpointError, match="changed"):
    entry.read(0, 1)
  path.unlink()
  with pytest.raises(CheckpointError, match="cannot be read"):
    entry.read(0, 1)


def _string(text):
  return struct.pack("<Q", len(text)) + text.encode()


def _array(item_type, count):
  return _string("x") + struct.pack("<IIQ", 9, item_type, count)


@pytest.mark.parametrize(
  ("num_tensors", "num_keys", "rest", "problem"),
  [
    (2**60, 0, b"", "do not fit"),
    (0, 2**63, b"", "do not fit"),
    (2**64 - 1, 2**64 - 1, b"", "do not fit"),
    (0, 1, struct.pack("<Q", 2**62), "absurd"),
    (0, 1, struct.pack("<Q", 2**20), "beyond the end"),
    (0, 1, _array(0, 2**60), "absurd"),
    (0, 1, _array(8, 2**23), "beyond the end"),
    (0, 1, _array(12, 2**23), "beyond the end"),
    # A list of lists would let a small file nest without bound.
    (0, 1, _array(9, 1), "unknown type 9"),
    (0, 1, _array(77, 0), "unknown type 77"),
    (0, 1, _string("x") + struct.pack("<IQ", 13, 0), "unknown type 13"),
    (0, 1, _string("x") + struct.pack("<IB", 7, 2), "neither true nor false"),
    (0, 1, _string("x") + struct.pack("<IQ", 8, 1) + b"\xff", "not UTF-8"),
    (0, 2, 2 * (_string("x") + struct.pack("<IB", 0, 1)), "occurs twice"),
    (1, 0, _string("t") + struct.pack("<I", 2**31), "dimensions"),
    (1, 0, _string("t") + struct.pack("<I", 0), "dimensions"),
    (1, 0, _string("t") + struct.pack("<IQIQ", 1, 0, 0, 0), "size 0"),
    (1, 0, _string("t") + struct.pack("<IQIQ", 1, 4, 99, 0), "type 99"),
    (1, 0, _string("t") + struct.pack("<IQIQ", 1, 33, 8, 0), "whole blocks"),
    (1, 0, _string("t") + struct.pack("<IQIQ", 1, 8, 0, 32), "wrong offset"),
    (
      1,
      0,
      _string("t") + struct.pack("<IQIQ", 1, 2**63, 0, 0),
      "beyond the end",
    ),
    (
      2,
      0,
      2 * (_string("t") + struct.pack("<IQIQ", 1, 8, 0, 0)),
      "occurs twice",
    ),
    (0, 0, b"", "after the last tensor"),
  ],
)
def test_damaged_header(tmp_path, num_tensors, num_keys, rest, problem):
  path = tmp_path / "a.gguf"
  counts = struct.pack("<QQ", num_tensors, num_keys)
  path.write_bytes(b"GGUF\x03\0\0\0" + counts + rest + bytes(64))
  with pytest.raises(CheckpointError, match=problem) as caught:
    open_gguf(path)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize(
  ("start", "problem"),
  [
    (b"", "beyond the end"),
    (b"GGML\x03\0\0\0", "magic"),
    (b"GGUF\x01\0\0\0", "version 1"),
    (b"GGUF\x04\0\0\0", "version 4"),
    (b"GGUF\x03\0", "beyond the end"),
  ],
)
def test_damaged_start(tmp_path, start, problem):
  path = tmp_path / "a.gguf"
  path.write_bytes(start)
  with pytest.raises(CheckpointError, match=problem):
    open_gguf(path)


def test_every_truncation_is_noticed(tmp_path):
  content = _write(tmp_path / "a.gguf").read_bytes()
  path = tmp_path / "cut.gguf"
  header = gguf.GGUFReader(tmp_path / "a.gguf").data_offset
  # The last tensor is a whole number of alignments, so no byte is padding.
  for length in [*range(header), *range(header, len(content), 97)]:
    path.write_bytes(content[:length])
    with pytest.raises(CheckpointError, match="cut.gguf"):
      open_gguf(path)


_CONFIG_KEYS = {
  "hidden_size": "llama.embedding_length",
  "intermediate_size": "llama.feed_forward_length",
  "num_hidden_layers": "llama.block_count",
  "num_attention_heads": "llama.attention.head_count",
  "num_key_value_heads": "llama.attention.head_count_kv",
  "head_dim": "llama.rope.dimension_count",
  "vocab_size": "llama.vocab_size",
  "max_position_embeddings": "llama.context_length",
  "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
  "rope_theta": "llama.rope.freq_base",
  "bos_token_id": "tokenizer.ggml.bos_token_id",
  "eos_token_id": "tokenizer.ggml.eos_token_id",
}


def _damaged(content, header, rng):
  content = bytearray(content)
  kind = rng.integers(5)
  at = int(rng.integers(header))
  if kind == 0:
    return content[: int(rng.integers(len(content)))]
  if kind == 1:
    content[int(rng.integers(len(content)))] ^= 1 << rng.integers(8)
  elif kind == 2:
    content[at] ^= 1 << rng.integers(8)
  elif kind == 3:
    content[at] = rng.integers(256)
  else:
    content[at : at + 8] = struct.pack("<Q", 1 << int(rng.integers(64)))
  return content


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_noticed_or_what_the_file_now_says(tmp_path, seed):
  sizes = (32, 2, 1, 32, 8, 1)
  source = _write(tmp_path / "a.gguf", sizes, kind=Type.Q8_0, biases=True)
  content = source.read_bytes()
  header = gguf.GGUFReader(source).data_offset
  path = tmp_path / "damaged.gguf"
  rng = np.random.default_rng(seed)
  num_loaded = 0
  for _ in range(600):
    path.write_bytes(_damaged(content, header, rng))
    try:
      opened = open_gguf(path)
      arrays = [entry.read(0, entry.shape[0]) for entry in opened.entries]
    except (CheckpointError, ConfigError):
      continue
    num_loaded += 1
    assert len(arrays) == len(opened.entries)
    fields = gguf.GGUFReader(path).fields
    for name, key in _CONFIG_KEYS.items():
      if key in fields:
        assert opened.config[name] == fields[key].contents(), key
    assert opened.tokenizer_metadata == {
      key: field.contents()
      for key, field in fields.items()
      if key.startswith("tokenizer.")
    }
    with warnings.catch_warnings():
      # Values with a damaged exponent overflow in the package, too.
      warnings.simplefilter("ignore", RuntimeWarning)
      _check_tensors(opened, _expected(path))
  assert 0 < num_loaded < 500


def test_smollm2():
  if not _SMOLLM2.exists():
    pytest.skip("no SmolLM2; python checkpoints/get_smollm2.py fetches it")
  opened = open_gguf(_SMOLLM2)
  config = opened.config
  assert config["hidden_size"] == 576
  assert config["num_hidden_layers"] == 30
  assert config["num_key_value_heads"] == 3
  assert config["rope_theta"] == 100000.0
  assert config["tie_word_embeddings"] is True
  assert len(opened.entries) == 272
  shapes = {entry.name: entry.shape for entry in opened.entries}
  assert shapes["model.embed_tokens.weight"] == (49152, 576)
  assert shapes["model.layers.29.mlp.down_proj.weight"] == (576, 1536)
  for entry in opened.entries:
    rows = entry.read(0, 2)
    assert np.isfinite(rows).all()
    assert np.abs(rows).max() > 0
