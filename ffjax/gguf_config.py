"""The metadata of a GGUF file as a Hugging Face Llama `config.json`.

Up the flow: `ffjax.gguf_header`; down the flow: `ffjax.gguf_file`, and from
there `ffjax.config`, which checks the values against each other. A key of the
architecture that is not understood here is an error: ignoring it could change
the model's output without a word.

Source: the GGUF specification, `docs/gguf.md` of the ggml project. Defaults of
absent keys are those of llama.cpp.
"""

import math
import pathlib
import re
from typing import Any

import numpy as np

from ffjax.errors import CheckpointError, ConfigError
from ffjax.gguf_header import GgufHeader

_MAX_INT = 2**31 - 1

_HANDLED_KEYS = {
  "llama.attention.head_count",
  "llama.attention.head_count_kv",
  "llama.attention.key_length",
  "llama.attention.layer_norm_rms_epsilon",
  "llama.attention.value_length",
  "llama.block_count",
  "llama.context_length",
  "llama.embedding_length",
  "llama.feed_forward_length",
  "llama.rope.dimension_count",
  "llama.rope.freq_base",
  "llama.rope.scale_linear",
  "llama.rope.scaling.factor",
  "llama.rope.scaling.type",
  "llama.vocab_size",
  # These two only say how a scaling came about.
  "llama.rope.scaling.finetuned",
  "llama.rope.scaling.original_context_length",
}
# Keys that with any other value mean another model.
_ONLY_VALUE = {
  "general.type": "model",
  # Version 1 used the same type numbers for other block layouts.
  "general.quantization_version": 2,
  "llama.attention.causal": True,
  "llama.expert_count": 0,
  "llama.expert_used_count": 0,
  "llama.rope.scaling.attn_factor": 1.0,
  # The order of q and k rows that `ffjax.gguf_file` undoes.
  "llama.tensor_data_layout": "Meta AI original pth",
}

# What every Llama 3 release with scaled rotary embeddings uses; the file holds
# only the resulting factor of each frequency.
_LLAMA3 = {
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
_ROPE_FACTOR_TOLERANCE = 1e-4


def config_from_header(
  path: pathlib.Path, header: GgufHeader, rope_factors: np.ndarray | None
) -> dict[str, Any]:
  """Returns the config of a model of architecture `llama`.

  Args:
    path: the file, for messages.
    header: its header.
    rope_factors: contents of the tensor `rope_freqs.weight`,
      `[head_dim // 2]`, if there is one.

  Raises:
    CheckpointError: metadata or tensors that every file has are missing.
    ConfigError: a value is malformed or means a model that is not supported.
  """
  return _ConfigReader(path, header, rope_factors).config()


class _ConfigReader:
  """Reads keys of one file; holds what every message needs."""

  def __init__(
    self,
    path: pathlib.Path,
    header: GgufHeader,
    rope_factors: np.ndarray | None,
  ):
    self._path = path
    self._metadata = header.metadata
    self._shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    self._rope_factors = rope_factors

  def config(self) -> dict[str, Any]:
    self._check_keys()
    hidden_size = self._integer("llama.embedding_length")
    num_heads = self._integer("llama.attention.head_count")
    head_dim = self._head_dim(hidden_size, num_heads)
    theta = self._positive("llama.rope.freq_base", 10000.0)
    vocab_size = self._vocab_size()
    return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "hidden_size": hidden_size,
      "intermediate_size": self._integer("llama.feed_forward_length"),
      "num_hidden_layers": self._num_layers(),
      "num_attention_heads": num_heads,
      "num_key_value_heads": self._integer(
        "llama.attention.head_count_kv", num_heads
      ),
      "head_dim": head_dim,
      "vocab_size": vocab_size,
      "max_position_embeddings": self._integer("llama.context_length"),
      "rms_norm_eps": self._positive("llama.attention.layer_norm_rms_epsilon"),
      "rope_theta": theta,
      "rope_scaling": self._rope_scaling(head_dim, theta),
      "tie_word_embeddings": "output.weight" not in self._shapes,
      "hidden_act": "silu",
      "attention_bias": self._has_bias(
        "attn_q", "attn_k", "attn_v", "attn_output"
      ),
      "mlp_bias": self._has_bias("ffn_gate", "ffn_up", "ffn_down"),
      "bos_token_id": self._token_id("tokenizer.ggml.bos_token_id", vocab_size),
      "eos_token_id": self._token_id("tokenizer.ggml.eos_token_id", vocab_size),
    }

  def _check_keys(self) -> None:
    # First, since later parts lack all other keys.
    parts = self._metadata.get("split.count", 0)
    if parts not in (0, 1):
      raise CheckpointError(
        f"{self._path}: split.count is {parts!r}: files split into parts are"
        " not supported; merge them with llama.cpp's llama-gguf-split --merge"
      )
    architecture = self._get("general.architecture")
    if architecture != "llama":
      raise ConfigError(
        f"{self._path}: general.architecture {architecture!r} is not supported"
        " (only 'llama' is)"
      )
    for key, value in self._metadata.items():
      if key in _ONLY_VALUE:
        if value != _ONLY_VALUE[key]:
          raise self._error(key, f"{value!r} is not supported")
      elif key.startswith("llama.") and key not in _HANDLED_KEYS:
        raise self._error(key, "is not supported")

  def _head_dim(self, hidden_size: int, num_heads: int) -> int:
    default, rest = divmod(hidden_size, num_heads)
    if rest and "llama.attention.key_length" not in self._metadata:
      raise self._error(
        "llama.attention.head_count", f"{num_heads} does not divide the width"
      )
    head_dim = self._integer("llama.attention.key_length", default)
    for key, other in (
      ("llama.attention.value_length", default),
      ("llama.rope.dimension_count", head_dim),
    ):
      if self._integer(key, other) != head_dim:
        raise self._error(key, f"is not the head size {head_dim}")
    if head_dim % 2:
      raise self._error("llama.rope.dimension_count", f"{head_dim} is odd")
    return head_dim

  def _num_layers(self) -> int:
    num_layers = self._integer("llama.block_count")
    found = {
      int(name.split(".")[1])
      for name in self._shapes
      if re.match(r"blk\.[0-9]+\.", name)
    }
    # Also keeps an absurd count from reaching loops over layers.
    if len(found) != num_layers or max(found) != num_layers - 1:
      raise self._error(
        "llama.block_count", f"{num_layers} does not fit the tensors"
      )
    return num_layers

  def _vocab_size(self) -> int:
    shape = self._shapes.get("token_embd.weight")
    if shape is None:
      raise CheckpointError(f"{self._path}: no tensor 'token_embd.weight'")
    if self._integer("llama.vocab_size", shape[0]) != shape[0]:
      raise self._error(
        "llama.vocab_size", f"is not {shape[0]}, the embedding's"
      )
    tokens = self._metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != shape[0]:
      raise self._error(
        "tokenizer.ggml.tokens",
        f"has {len(tokens)} tokens, not {shape[0]}, the embedding's",
      )
    return shape[0]

  def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = self._metadata.get("llama.rope.scaling.type")
    key = "llama.rope.scaling.factor"
    if (
      key not in self._metadata and "llama.rope.scale_linear" in self._metadata
    ):
      key = "llama.rope.scale_linear"
    # A factor alone means linear to llama.cpp.
    if kind is None:
      kind = "linear" if key in self._metadata else "none"
    if kind not in ("none", "linear"):
      raise self._error("llama.rope.scaling.type", f"{kind!r} is not supported")
    factor = self._positive(key) if kind == "linear" else 1.0
    if self._rope_factors is None:
      if factor == 1.0:
        return None
      return {"rope_type": "linear", "factor": factor}
    if factor != 1.0:
      raise self._error(key, "is not supported along with rope_freqs.weight")
    return self._llama3_scaling(self._rope_factors, head_dim, theta)

  def _llama3_scaling(
    self, found: np.ndarray, head_dim: int, theta: float
  ) -> dict[str, Any] | None:
    factor = float(found.max())
    # The shape goes first: an absurd head size must not reach `np.arange`.
    if (
      found.shape != (head_dim // 2,)
      or not 1 <= factor < math.inf
      or not np.allclose(
        found,
        _llama3_factors(head_dim, theta, factor),
        rtol=_ROPE_FACTOR_TOLERANCE,
        atol=0,
      )
    ):
      raise self._error(
        "rope_freqs.weight", "is not a scaling of the Llama 3 kind"
      )
    if factor == 1.0:
      return None
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}

  def _has_bias(self, *modules: str) -> bool:
    return any(
      name.split(".")[-2:] == [module, "bias"]
      for name in self._shapes
      for module in modules
    )

  def _token_id(self, key: str, vocab_size: int) -> int | None:
    value = self._metadata.get(key)
    if value is None:
      return None
    if type(value) is not int or not 0 <= value < vocab_size:
      raise self._error(key, f"{value!r} is not a token id below {vocab_size}")
    return value

  def _get(self, key: str) -> Any:
    if key not in self._metadata:
      raise CheckpointError(f"{self._path}: no key {key!r} in the metadata")
    return self._metadata[key]

  def _integer(self, key: str, default: int | None = None) -> int:
    if default is not None and key not in self._metadata:
      return default
    value = self._get(key)
    if type(value) is not int or not 1 <= value <= _MAX_INT:
      raise self._error(key, f"{_brief(value)} is not a positive integer")
    return value

  def _positive(self, key: str, default: float | None = None) -> float:
    if default is not None and key not in self._metadata:
      return default
    value = self._get(key)
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise self._error(key, f"{_brief(value)} is not a positive number")
    return float(value)

  def _error(self, key: str, problem: str) -> ConfigError:
    return ConfigError(f"{self._path}: {key}: {problem}")


def _llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
  """Returns what each rotary frequency is divided by, `[head_dim // 2]`.

  Source: `apply_scaling` in the reference code of Llama 3.1.
  """
  # An absurd base may overflow; the result then matches nothing.
  with np.errstate(all="ignore"):
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * np.pi / frequency
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
  low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return 1 / (kept + (1 - kept) / factor)


def _brief(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else f"{text[:60]}..."
