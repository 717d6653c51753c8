"""Tests of `ffjax.config` and `ffjax.presets`."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffjax.config import LlamaConfig, RopeScaling
from ffjax.errors import ConfigError
from ffjax.presets import PRESETS, preset

_MINIMAL = {
  "model_type": "llama",
  "vocab_size": 96,
  "hidden_size": 64,
  "intermediate_size": 80,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}

# As published with Llama-3.2-1B-Instruct.
_INSTRUCT_1B = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009],
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "initializer_range": 0.02,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0",
  "use_cache": True,
  "vocab_size": 128256,
}
_RENAMED = ("rope_scaling", "rope_theta", "torch_dtype")
_INSTRUCT_1B_TRANSFORMERS_5 = {
  **{k: v for k, v in _INSTRUCT_1B.items() if k not in _RENAMED},
  "dtype": "bfloat16",
  "pad_token_id": None,
  "rope_parameters": {**_INSTRUCT_1B["rope_scaling"], "rope_theta": 500000.0},
  "transformers_version": "5.0.0",
}


def _read(**changes):
  raw = {**_MINIMAL, **changes}
  return LlamaConfig.from_dict(
    {key: value for key, value in raw.items() if value is not ...}
  )


def test_minimal_config_has_transformers_defaults():
  assert _read() == LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=None,
    eos_token_ids=(),
    dtype=None,
  )


@pytest.mark.parametrize("raw", [_INSTRUCT_1B, _INSTRUCT_1B_TRANSFORMERS_5])
def test_published_config_is_the_preset(raw, tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(raw), "utf-8")
  assert LlamaConfig.from_json(path) == dataclasses.replace(
    preset("llama-3.2-1b"), eos_token_ids=(128001, 128008, 128009)
  )


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trip(name):
  config = preset(name)
  raw = config.to_dict()
  assert LlamaConfig.from_dict(raw) == config
  assert LlamaConfig.from_dict(json.loads(json.dumps(raw))) == config
  assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
  ("name", "num_params"),
  [
    ("llama-3.2-1b", 1_235_814_400),
    ("llama-3.2-3b", 3_212_749_824),
    ("llama-3.1-8b", 8_030_261_248),
    ("llama-3.1-70b", 70_553_706_496),
  ],
)
def test_preset_num_params(name, num_params):
  assert preset(name).num_params == num_params


@pytest.mark.parametrize(
  ("name", "gigabytes"),
  [("llama-3.2-1b", 2.472), ("llama-3.2-3b", 6.425), ("llama-3.1-8b", 15.01)],
)
def test_preset_weight_bytes_per_step(name, gigabytes):
  config = preset(name)
  found = config.weight_bytes_per_step(2)
  # Known to four digits.
  assert found / 1e9 == pytest.approx(gigabytes, rel=5e-4)
  # Another sequence adds one row of the embedding.
  more = config.weight_bytes_per_step(2, batch=2) - found
  assert more == 2 * config.hidden_size
  assert config.weight_bytes_per_step(4) == 2 * found


def test_kv_bytes_per_token():
  # 2 arrays x 16 layers x 8 heads x 64 elements x 2 bytes.
  assert preset("llama-3.2-1b").kv_bytes_per_token(2) == 32768


def test_preset_names():
  assert preset("Llama-3.2-1B") is preset("llama-3.2-1b")
  with pytest.raises(ConfigError, match=r"no preset 'gpt-2'.*llama-3\.2-1b"):
    preset("gpt-2")


_SCALINGS = st.one_of(
  st.none(),
  st.builds(
    lambda factor: RopeScaling(rope_type="linear", factor=factor),
    st.floats(0.1, 100),
  ),
  st.builds(
    lambda factor, low, span, original: RopeScaling(
      rope_type="llama3",
      factor=factor,
      low_freq_factor=low,
      high_freq_factor=low + span,
      original_max_position_embeddings=original,
    ),
    st.floats(0.1, 100),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.integers(1, 2**20),
  ),
)


@st.composite
def _configs(draw):
  sizes = st.integers(1, 2**20)
  kv_heads = draw(st.integers(1, 64))
  vocab_size = draw(sizes)
  token_ids = st.integers(0, vocab_size - 1)
  return LlamaConfig(
    vocab_size=vocab_size,
    hidden_size=draw(sizes),
    intermediate_size=draw(sizes),
    num_hidden_layers=draw(sizes),
    num_attention_heads=kv_heads * draw(st.integers(1, 16)),
    num_key_value_heads=kv_heads,
    head_dim=2 * draw(sizes),
    max_position_embeddings=draw(sizes),
    rms_norm_eps=draw(st.floats(1e-12, 1)),
    rope_theta=draw(st.floats(1e-3, 1e9)),
    rope_scaling=draw(_SCALINGS),
    tie_word_embeddings=draw(st.booleans()),
    attention_bias=draw(st.booleans()),
    mlp_bias=draw(st.booleans()),
    bos_token_id=draw(st.none() | token_ids),
    eos_token_ids=tuple(draw(st.lists(token_ids, max_size=4, unique=True))),
    dtype=draw(st.sampled_from([None, "float32", "bfloat16", "float16"])),
  )


@given(_configs())
def test_round_trip(config):
  raw = json.loads(json.dumps(config.to_dict()))
  assert LlamaConfig.from_dict(raw) == config


@pytest.mark.parametrize(
  ("changes", "field", "expected"),
  [
    ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
    ({"torch_dtype": "torch.float16"}, "dtype", "float16"),
    ({"dtype": "float32"}, "dtype", "float32"),
    ({"dtype": "float32", "torch_dtype": "float32"}, "dtype", "float32"),
    ({"dtype": None, "torch_dtype": "float16"}, "dtype", "float16"),
    ({"eos_token_id": 3}, "eos_token_ids", (3,)),
    ({"eos_token_id": [5, 3, 5]}, "eos_token_ids", (5, 3)),
    ({"eos_token_id": []}, "eos_token_ids", ()),
    ({"eos_token_id": None}, "eos_token_ids", ()),
    ({"bos_token_id": 0}, "bos_token_id", 0),
    ({"bos_token_id": [7]}, "bos_token_id", 7),
    ({"bos_token_id": None}, "bos_token_id", None),
    ({"head_dim": 6}, "head_dim", 6),
    ({"head_dim": None}, "head_dim", 16),
    ({"num_key_value_heads": 2}, "num_key_value_heads", 2),
    ({"num_key_value_heads": None}, "num_key_value_heads", 4),
    ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
    ({"tie_word_embeddings": None}, "tie_word_embeddings", False),
    ({"attention_bias": True}, "attention_bias", True),
    ({"mlp_bias": True}, "mlp_bias", True),
    ({"rms_norm_eps": 1}, "rms_norm_eps", 1.0),
    ({"max_position_embeddings": 99}, "max_position_embeddings", 99),
    ({"hidden_act": "swish"}, "hidden_size", 64),
    (
      {"model_type": ..., "architectures": ["LlamaForCausalLM"]},
      "head_dim",
      16,
    ),
    ({"rope_theta": 5}, "rope_theta", 5.0),
    ({"rope_theta": None}, "rope_theta", 10000.0),
    ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta", 7.0),
    (
      {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0}},
      "rope_theta",
      7.0,
    ),
    # Switched off, or of no consequence for a forward pass.
    ({"quantization_config": None}, "head_dim", 16),
    ({"sliding_window": None, "use_sliding_window": False}, "head_dim", 16),
    ({"layer_types": [], "quirks": {}, "note": ""}, "head_dim", 16),
    ({"_name_or_path": "x", "unsloth_version": "1"}, "head_dim", 16),
    ({"pad_token_id": -1, "use_cache": True}, "head_dim", 16),
  ],
)
def test_accepted_spellings(changes, field, expected):
  assert getattr(_read(**changes), field) == expected


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize(
  ("scaling", "expected"),
  [
    ({"rope_type": "default"}, None),
    ({"rope_type": "default", "partial_rotary_factor": 1.0}, None),
    ({"rope_type": "linear", "factor": 4}, RopeScaling("linear", 4.0)),
    (_LLAMA3, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
    (
      {
        "rope_type": "llama3",
        "factor": 2,
        "low_freq_factor": 3,
        "high_freq_factor": 5,
        "original_max_position_embeddings": 64.0,
      },
      RopeScaling("llama3", 2.0, 3.0, 5.0, 64),
    ),
  ],
)
def test_accepted_rope_spellings(key, type_key, scaling, expected):
  scaling = dict(scaling)
  scaling[type_key] = scaling.pop("rope_type")
  assert _read(**{key: scaling}).rope_scaling == expected


@pytest.mark.parametrize("scaling", [None, {}])
def test_rope_scaling_switched_off(scaling):
  assert _read(rope_scaling=scaling).rope_scaling is None
  assert _read(rope_parameters=scaling).rope_scaling is None


def test_both_rope_types_may_agree():
  both = {"rope_type": "linear", "type": "linear", "factor": 2.0}
  assert _read(rope_scaling=both, rope_parameters=both).rope_scaling == (
    RopeScaling("linear", 2.0)
  )


def _rope(**changes):
  raw = {**_LLAMA3, **changes}
  return {
    "rope_scaling": {k: v for k, v in raw.items() if v is not ...},
  }


_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "max_position_embeddings",
)
_REQUIRED = tuple(_MINIMAL)[1:]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    *(({key: ...}, f"{key} is missing") for key in _REQUIRED),
    *(({key: None}, f"{key} is missing") for key in _REQUIRED),
    *(({key: "64"}, f"{key}='64' must be an integer") for key in _SIZES),
    *(({key: 64.0}, f"{key}=64.0 must be an integer") for key in _SIZES),
    *(({key: True}, f"{key}=True must be an integer") for key in _SIZES),
    *(({key: [64]}, f"{key}=[64] must be an integer") for key in _SIZES),
    *(({key: 2**31}, f"{key}=2147483648 is too large") for key in _SIZES),
    *(
      ({"head_dim": 16, key: size}, f"{key}={size} must be positive")
      for key in _SIZES
      for size in (0, -1)
    ),
    ({"head_dim": 5}, "head_dim=5 must be even"),
    ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
    ({"model_type": "qwen3"}, "model_type='qwen3' is not supported"),
    ({"model_type": None}, "model_type=None is not supported"),
    ({"model_type": ["llama"]}, "model_type=['llama'] is not supported"),
    ({"model_type": ...}, "model_type is missing"),
    (
      {"architectures": ["MistralForCausalLM"]},
      "architectures=['MistralForCausalLM'] is not supported",
    ),
    ({"architectures": []}, "architectures=[] is not supported"),
    ({"architectures": 1}, "architectures=1 is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ({"hidden_act": None}, "hidden_act=None is not supported"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number"),
    ({"rms_norm_eps": None}, "rms_norm_eps=None must be a number"),
    ({"rms_norm_eps": True}, "rms_norm_eps=True must be a number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0.0 must be positive"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 must be positive"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be finite"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is too large"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ({"attention_bias": "no"}, "attention_bias='no' must be true or false"),
    ({"mlp_bias": 0}, "mlp_bias=0 must be true or false"),
    ({"bos_token_id": [1, 2]}, "bos_token_id=[1, 2] must be one id"),
    ({"bos_token_id": "1"}, "bos_token_id='1' must be an integer"),
    ({"bos_token_id": 96}, "bos_token_id=96 is outside the vocabulary of 96"),
    ({"eos_token_id": -1}, "eos_token_id=-1 is outside the vocabulary of 96"),
    ({"eos_token_id": [2, 96]}, "eos_token_id=96 is outside the vocabulary"),
    ({"eos_token_id": [2, None]}, "eos_token_id=[2, None] must be an integer"),
    ({"eos_token_id": [[2]]}, "eos_token_id=[[2]] must be an integer"),
    ({"eos_token_id": {}}, "eos_token_id={} must be an integer"),
    ({"eos_token_id": True}, "eos_token_id=True must be an integer"),
    ({"torch_dtype": "int8"}, "torch_dtype='int8' is not supported"),
    ({"dtype": "float64"}, "dtype='float64' is not supported"),
    ({"dtype": 16}, "dtype=16 must be a string"),
    (
      {"dtype": "float16", "torch_dtype": "bfloat16"},
      "torch_dtype and dtype disagree",
    ),
    ({"rope_theta": "big"}, "rope_theta='big' must be a number"),
    ({"rope_theta": 0}, "rope_theta=0.0 must be positive"),
    ({"rope_theta": float("inf")}, "rope_theta=inf must be finite"),
    (
      {"rope_theta": 2.0, "rope_parameters": {"rope_theta": 3.0}},
      "rope_theta=2.0 disagrees with rope_parameters.rope_theta=3.0",
    ),
    ({"rope_scaling": 4.0}, "rope_scaling=4.0 must be an object or null"),
    ({"rope_parameters": []}, "rope_parameters=[] must be an object or null"),
    (
      {**_rope(), "rope_parameters": {**_LLAMA3, "factor": 8.0}},
      "rope_scaling and rope_parameters disagree",
    ),
    (_rope(rope_type="yarn"), "rope_scaling.rope_type='yarn' is not supported"),
    (_rope(rope_type=3), "rope_scaling.rope_type=3 is not supported"),
    (
      _rope(rope_type=["llama3"]),
      "rope_scaling.rope_type=['llama3'] is not supported",
    ),
    (
      _rope(type="linear"),
      "rope_scaling.rope_type and rope_scaling.type disagree",
    ),
    (_rope(rope_type=...), "rope_scaling.factor=32.0 is not a key"),
    *(
      (_rope(**{key: ...}), f"rope_scaling.{key} is missing for 'llama3'")
      for key in tuple(_LLAMA3)[1:]
    ),
    *(
      (_rope(**{key: -2}), f"rope_scaling.{key}=-2.0 must be positive")
      for key in tuple(_LLAMA3)[1:]
    ),
    (_rope(factor="8"), "rope_scaling.factor='8' must be a number"),
    (_rope(low_freq_factor=4), "rope_scaling.high_freq_factor must be greater"),
    (
      _rope(original_max_position_embeddings=8.5),
      "rope_scaling.original_max_position_embeddings must be an integer",
    ),
    (_rope(attention_factor=2.0), "rope_scaling.attention_factor=2.0 is not a"),
    (
      {"rope_parameters": {"partial_rotary_factor": 0.5}},
      "rope_parameters.partial_rotary_factor=0.5 is not a key",
    ),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    ({"sliding_window": 4096}, "sliding_window=4096 is not a key that ffjax"),
    ({"layer_types": ["full_attention"]}, "layer_types=['full_attention']"),
    ({"embedding_multiplier": 12}, "embedding_multiplier=12 is not a key"),
    ({"logit_scale": 0}, "logit_scale=0 is not a key"),
    ({"residual_scale": 0.0}, "residual_scale=0.0 is not a key"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not"),
  ],
)
def test_errors_name_the_key(changes, message):
  with pytest.raises(ConfigError) as caught:
    _read(**changes)
  assert message in str(caught.value)
  assert str(caught.value).startswith("config.json: ")
  assert "\n" not in str(caught.value)


_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]),
      inner,
      max_size=4,
    )
  ),
  max_leaves=6,
)


@settings(max_examples=1000)
@given(
  st.dictionaries(st.sampled_from(sorted(_INSTRUCT_1B_TRANSFORMERS_5)), _JSON)
)
def test_any_json_is_a_config_or_a_config_error(changes):
  raw = {**_INSTRUCT_1B_TRANSFORMERS_5, **changes}
  try:
    config = LlamaConfig.from_dict(raw)
  except ConfigError:
    return
  assert LlamaConfig.from_dict(config.to_dict()) == config


def test_checks_also_run_without_json():
  config = preset("llama-3.2-1b")
  with pytest.raises(ConfigError, match="head_dim=-2 must be positive"):
    dataclasses.replace(config, head_dim=-2)
  with pytest.raises(ConfigError, match="eos_token_id=128256 is outside"):
    dataclasses.replace(config, eos_token_ids=(128256,))
  with pytest.raises(ConfigError, match="rope_type='yarn' is not supported"):
    RopeScaling(rope_type="yarn", factor=2.0)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"[]", "expected a JSON object"),
    (b"null", "expected a JSON object"),
    (b"{}", "model_type is missing"),
  ],
)
def test_files_that_are_no_config(content, message, tmp_path):
  path = tmp_path / "config.json"
  path.write_bytes(content)
  with pytest.raises(ConfigError) as caught:
    LlamaConfig.from_json(path)
  assert str(caught.value).startswith(f"{path}: ")
  assert message in str(caught.value)


def test_file_that_cannot_be_read(tmp_path):
  with pytest.raises(ConfigError, match="no such file"):
    LlamaConfig.from_json(tmp_path / "config.json")
  with pytest.raises(ConfigError, match="cannot be read"):
    LlamaConfig.from_json(tmp_path)
