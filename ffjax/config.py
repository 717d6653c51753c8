"""Llama configuration, spelled as in a Hugging Face `config.json`.

Start of the data flow: a checkpoint's `config.json` becomes a `LlamaConfig`,
and everything after it (params, cache, packed weights, kernel) takes its sizes
from there. A value that would change the result and that ffjax does not
implement is an error, never ignored.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ffjax import json_file
from ffjax.errors import ConfigError

# Keys of config.json that do not change a forward pass. Everything else must
# be understood or be switched off (null, false, empty).
_HARMLESS_KEYS = frozenset(
  """
  architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens
  chunk_size_feed_forward diversity_penalty do_sample early_stopping
  embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id id2label
  initializer_range is_llama_config keys_to_ignore_at_inference label2id
  length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
  num_beams num_return_sequences output_attentions output_hidden_states
  output_scores pad_token_id prefix pretraining_tp problem_type
  remove_invalid_values repetition_penalty resid_pdrop return_dict
  return_dict_in_generate sep_token_id suppress_tokens task_specific_params
  temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
  torchscript transformers.js_config transformers_version typical_p
  use_bfloat16 use_cache
  """.split()
)
_HARMLESS_PREFIXES = ("_", "unsloth_")

_ROPE_KEYS = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
}

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rope frequencies are stretched for longer contexts.

  Attributes:
    rope_type: `"linear"` divides every frequency by `factor`; `"llama3"`
      divides only the slow ones, with a smooth ramp between.
    factor: the divisor.
    low_freq_factor: llama3 only; wavelengths above
      `original_max_position_embeddings / low_freq_factor` are divided.
    high_freq_factor: llama3 only; wavelengths below
      `original_max_position_embeddings / high_freq_factor` are kept.
    original_max_position_embeddings: llama3 only; positions trained on first.

  Source: `modeling_rope_utils.py` in Hugging Face transformers.

  Raises:
    ConfigError: if `rope_type` is another one.
  """

  rope_type: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self) -> None:
    if self.rope_type not in ("linear", "llama3"):
      raise ConfigError(
        f"rope_type={self.rope_type!r} is not supported (supported: linear,"
        " llama3; None in place of a RopeScaling is plain rope)"
      )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes and constants of a Llama model; hashable, so it can be static.

  Axis letters used in ffjax for these sizes: D `hidden_size`, F
  `intermediate_size`, L `num_hidden_layers`, N `num_attention_heads`, K
  `num_key_value_heads`, G = N / K, H `head_dim`, V `vocab_size`.

  Attributes:
    vocab_size: V.
    hidden_size: D.
    intermediate_size: F.
    num_hidden_layers: L.
    num_attention_heads: N.
    num_key_value_heads: K, a divisor of N.
    head_dim: H, even; N * H need not be D.
    max_position_embeddings: the longest sequence, in tokens.
    rms_norm_eps: added to the mean square before the root.
    rope_theta: base of the rope frequencies.
    rope_scaling: None for plain rope.
    tie_word_embeddings: whether the LM head is the embedding matrix.
    attention_bias: whether q, k, v and o projections have biases.
    mlp_bias: whether gate, up and down projections have biases.
    bos_token_id: token that begins a sequence, or None.
    eos_token_ids: tokens that end a sequence; may be empty.
    dtype: dtype that the checkpoint states for its weights, or None.

  Raises:
    ConfigError: if sizes are not positive or do not fit together.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  dtype: str | None = None

  def __post_init__(self) -> None:
    for name in (
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
      "num_attention_heads",
      "num_key_value_heads",
      "head_dim",
      "max_position_embeddings",
    ):
      if getattr(self, name) <= 0:
        raise ConfigError(f"{name}={getattr(self, name)} must be positive")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ConfigError(
        f"num_attention_heads={self.num_attention_heads} is not a multiple of"
        f" num_key_value_heads={self.num_key_value_heads}"
      )
    if self.head_dim % 2:
      raise ConfigError(f"head_dim={self.head_dim} must be even for rope")
    for name in ("rms_norm_eps", "rope_theta"):
      value = getattr(self, name)
      if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} must be positive and finite")
    ids = dict.fromkeys(self.eos_token_ids, "eos_token_id")
    if self.bos_token_id is not None:
      ids[self.bos_token_id] = "bos_token_id"
    for token_id, name in ids.items():
      if not 0 <= token_id < self.vocab_size:
        raise ConfigError(
          f"{name}={token_id} is outside the vocabulary of {self.vocab_size}"
        )

  @classmethod
  def from_dict(
    cls, raw: Mapping[str, Any], source: str = "config.json"
  ) -> "LlamaConfig":
    """Reads a parsed Hugging Face `config.json`.

    Args:
      raw: the parsed JSON object.
      source: what to call it in messages, for example the file's path.

    Returns:
      The configuration.

    Raises:
      ConfigError: naming the key that is missing, malformed, unknown, or has a
        value that ffjax does not implement.
    """
    return _Reader(raw, source).read()

  @classmethod
  def from_json(cls, path: str | pathlib.Path) -> "LlamaConfig":
    """Reads a Hugging Face `config.json` file.

    Raises:
      ConfigError: if the file cannot be read, is not JSON, or as `from_dict`.
    """
    raw = json_file.read_object(pathlib.Path(path), ConfigError)
    return cls.from_dict(raw, str(path))

  def to_dict(self) -> dict[str, Any]:
    """Returns the Hugging Face `config.json` object; `from_dict` inverts it."""
    raw: dict[str, Any] = {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "hidden_act": "silu",
    }
    for field in dataclasses.fields(self):
      raw[field.name] = getattr(self, field.name)
    eos = raw.pop("eos_token_ids")
    raw["eos_token_id"] = (
      None if not eos else eos[0] if len(eos) == 1 else list(eos)
    )
    raw["torch_dtype"] = raw.pop("dtype")
    if self.rope_scaling is not None:
      scaling = self.rope_scaling
      keys = _ROPE_KEYS[scaling.rope_type]
      raw["rope_scaling"] = {
        "rope_type": scaling.rope_type,
        **{key: getattr(scaling, key) for key in keys},
      }
    return raw

  @property
  def num_layer_params(self) -> int:
    """Number of parameters in one decoder layer."""
    d, f = self.hidden_size, self.intermediate_size
    q = self.num_attention_heads * self.head_dim
    kv = self.num_key_value_heads * self.head_dim
    count = d * (2 * q + 2 * kv) + 3 * d * f + 2 * d
    if self.attention_bias:
      count += q + 2 * kv + d
    if self.mlp_bias:
      count += 2 * f + d
    return count

  @property
  def num_params(self) -> int:
    """Number of parameters; tied embeddings count once."""
    embeddings = self.vocab_size * self.hidden_size
    copies = 1 if self.tie_word_embeddings else 2
    return (
      self.num_hidden_layers * self.num_layer_params
      + copies * embeddings
      + self.hidden_size
    )

  def weight_bytes_per_step(self, itemsize_bytes: int, batch: int = 1) -> int:
    """Returns the weight bytes that one decode step must read.

    Every layer, the final norm and the LM head once, and one embedding row
    per sequence.

    Args:
      itemsize_bytes: bytes per weight.
      batch: B, number of sequences.
    """
    return itemsize_bytes * (
      self.num_hidden_layers * self.num_layer_params
      + self.hidden_size
      + self.vocab_size * self.hidden_size
      + batch * self.hidden_size
    )

  def kv_bytes_per_token(self, itemsize_bytes: int) -> int:
    """Returns the bytes of keys and values that one token adds to the cache."""
    return (
      2
      * self.num_hidden_layers
      * self.num_key_value_heads
      * self.head_dim
      * itemsize_bytes
    )


class _Reader:
  """Takes keys out of a raw config one by one; what is left is unknown."""

  def __init__(self, raw: Mapping[str, Any], source: str):
    self._raw = dict(raw)
    self._source = source

  def _error(self, message: str) -> ConfigError:
    return ConfigError(f"{self._source}: {message}")

  def _int(self, key: str, default: int | None = None) -> int:
    value = self._raw.pop(key, None)
    if value is None and default is not None:
      return default
    if value is None:
      raise self._error(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
      raise self._error(f"{key}={value!r} must be an integer")
    if abs(value) > np.iinfo(np.int32).max:
      raise self._error(f"{key}={value} is too large")
    return value

  def _float(self, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise self._error(f"{key}={value!r} must be a number")
    try:
      as_float = float(value)
    except OverflowError:
      raise self._error(f"{key} is too large") from None
    if not math.isfinite(as_float):
      raise self._error(f"{key}={value} must be finite")
    return as_float

  def _bool(self, key: str) -> bool:
    value = self._raw.pop(key, None)
    if value is None:
      return False
    if not isinstance(value, bool):
      raise self._error(f"{key}={value!r} must be true or false")
    return value

  def _only(self, key: str, default: Any, accepted: tuple[Any, ...]) -> None:
    value = self._raw.pop(key, default)
    if value not in accepted:
      raise self._error(
        f"{key}={value!r} is not supported (supported:"
        f" {', '.join(map(repr, accepted))})"
      )

  def _token_ids(self, key: str) -> tuple[int, ...]:
    value = self._raw.pop(key, None)
    values = value if isinstance(value, list) else [value]
    if values == [None]:
      return ()
    for item in values:
      if isinstance(item, bool) or not isinstance(item, int):
        raise self._error(f"{key}={value!r} must be an integer or a list")
    return tuple(dict.fromkeys(values))

  def _dtype(self) -> str | None:
    values = {}
    for key in ("torch_dtype", "dtype"):
      value = self._raw.pop(key, None)
      if value is not None:
        if not isinstance(value, str):
          raise self._error(f"{key}={value!r} must be a string")
        values[key] = value.removeprefix("torch.")
    if len(set(values.values())) > 1:
      raise self._error(f"torch_dtype and dtype disagree: {values}")
    for key, value in values.items():
      if value not in _DTYPES:
        raise self._error(
          f"{key}={value!r} is not supported (supported: {', '.join(_DTYPES)})"
        )
      return value
    return None

  def _rope(self) -> tuple[float, RopeScaling | None]:
    """Reads both the older spelling and transformers 5's rope_parameters."""
    theta = self._raw.pop("rope_theta", None)
    scaling = self._raw.pop("rope_scaling", None)
    parameters = self._raw.pop("rope_parameters", None)
    for key, value in (
      ("rope_scaling", scaling),
      ("rope_parameters", parameters),
    ):
      if value is not None and not isinstance(value, dict):
        raise self._error(f"{key}={value!r} must be an object or null")
    if scaling and parameters and scaling != parameters:
      raise self._error("rope_scaling and rope_parameters disagree")
    key = "rope_parameters" if parameters else "rope_scaling"
    left = dict(parameters or scaling or {})
    inner_theta = left.pop("rope_theta", None)
    if theta is not None and inner_theta is not None and theta != inner_theta:
      raise self._error(
        f"rope_theta={theta} disagrees with {key}.rope_theta={inner_theta}"
      )
    theta = theta if theta is not None else inner_theta
    theta = 10000.0 if theta is None else self._float("rope_theta", theta)

    names = [left.pop(k) for k in ("rope_type", "type") if left.get(k)]
    if len(names) > 1 and names[0] != names[1]:
      raise self._error(f"{key}.rope_type and {key}.type disagree")
    rope_type = names[0] if names else "default"
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
      raise self._error(
        f"{key}.rope_type={rope_type!r} is not supported (supported:"
        f" {', '.join(_ROPE_KEYS)})"
      )
    if left.get("partial_rotary_factor") == 1:
      left.pop("partial_rotary_factor")
    values = {}
    for name in _ROPE_KEYS[rope_type]:
      if left.get(name) is None:
        raise self._error(f"{key}.{name} is missing for {rope_type!r}")
      values[name] = self._float(f"{key}.{name}", left.pop(name))
      if values[name] <= 0:
        raise self._error(f"{key}.{name}={values[name]} must be positive")
    self._reject_unknown(left, f"{key}.")
    if rope_type == "default":
      return theta, None
    if rope_type == "linear":
      return theta, RopeScaling(rope_type="linear", factor=values["factor"])
    if values["high_freq_factor"] <= values["low_freq_factor"]:
      raise self._error(
        f"{key}.high_freq_factor must be greater than {key}.low_freq_factor"
      )
    original = values["original_max_position_embeddings"]
    if original != int(original):
      raise self._error(
        f"{key}.original_max_position_embeddings must be an integer"
      )
    return theta, RopeScaling(
      rope_type="llama3",
      factor=values["factor"],
      low_freq_factor=values["low_freq_factor"],
      high_freq_factor=values["high_freq_factor"],
      original_max_position_embeddings=int(original),
    )

  def _reject_unknown(self, left: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in left.items():
      # Not `in (None, False, ...)`: 0 equals False, but is a value like others.
      if value is None or value is False or value in ("", [], {}):
        continue
      raise self._error(
        f"{prefix}{key}={value!r} is not a key that ffjax knows; it may change"
        " the result, so it is not ignored (remove it if it does not)"
      )

  def _architecture(self) -> None:
    architectures = self._raw.pop("architectures", None)
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
      raise self._error(
        f"architectures={architectures!r} is not supported (supported:"
        " ['LlamaForCausalLM'])"
      )
    if "model_type" not in self._raw and architectures is None:
      raise self._error("model_type is missing")
    self._only("model_type", "llama", ("llama",))

  def read(self) -> LlamaConfig:
    self._architecture()
    self._only("hidden_act", "silu", ("silu", "swish"))
    theta, scaling = self._rope()
    hidden_size = self._int("hidden_size")
    num_attention_heads = self._int("num_attention_heads")
    if self._raw.get("head_dim") is not None:
      head_dim = self._int("head_dim")
    else:
      if num_attention_heads <= 0 or hidden_size % num_attention_heads:
        raise self._error(
          f"hidden_size={hidden_size} is not a multiple of"
          f" num_attention_heads={num_attention_heads}, and head_dim is not"
          " given"
        )
      head_dim = hidden_size // num_attention_heads
    bos = self._token_ids("bos_token_id")
    if len(bos) > 1:
      raise self._error(f"bos_token_id={list(bos)} must be one id")
    fields: dict[str, Any] = dict(
      vocab_size=self._int("vocab_size"),
      hidden_size=hidden_size,
      intermediate_size=self._int("intermediate_size"),
      num_hidden_layers=self._int("num_hidden_layers"),
      num_attention_heads=num_attention_heads,
      num_key_value_heads=self._int(
        "num_key_value_heads", default=num_attention_heads
      ),
      head_dim=head_dim,
      max_position_embeddings=self._int(
        "max_position_embeddings", default=2048
      ),
      rms_norm_eps=self._float(
        "rms_norm_eps", self._raw.pop("rms_norm_eps", 1e-6)
      ),
      rope_theta=theta,
      rope_scaling=scaling,
      tie_word_embeddings=self._bool("tie_word_embeddings"),
      attention_bias=self._bool("attention_bias"),
      mlp_bias=self._bool("mlp_bias"),
      bos_token_id=bos[0] if bos else None,
      eos_token_ids=self._token_ids("eos_token_id"),
      dtype=self._dtype(),
    )
    left = {
      key: value
      for key, value in self._raw.items()
      if key not in _HARMLESS_KEYS and not key.startswith(_HARMLESS_PREFIXES)
    }
    self._reject_unknown(left)
    try:
      return LlamaConfig(**fields)
    except ConfigError as e:
      raise self._error(str(e)) from None
