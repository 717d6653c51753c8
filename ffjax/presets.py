"""Published configurations by name."""

from typing import Any

from ffjax.config import LlamaConfig, RopeScaling
from ffjax.errors import ConfigError


def _llama3(factor: float) -> RopeScaling:
  return RopeScaling(rope_type="llama3", factor=factor)


def _preset(**fields: Any) -> LlamaConfig:
  return LlamaConfig(
    vocab_size=128256,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    bos_token_id=128000,
    eos_token_ids=(128001,),
    dtype="bfloat16",
    **fields,
  )


# Source: the config.json of the checkpoints that Meta published.
PRESETS = {
  "llama-3.2-1b": _preset(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    head_dim=64,
    rope_scaling=_llama3(32.0),
    tie_word_embeddings=True,
  ),
  "llama-3.2-3b": _preset(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    head_dim=128,
    rope_scaling=_llama3(32.0),
    tie_word_embeddings=True,
  ),
  "llama-3.1-8b": _preset(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    head_dim=128,
    rope_scaling=_llama3(8.0),
  ),
  "llama-3.1-70b": _preset(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    head_dim=128,
    rope_scaling=_llama3(8.0),
  ),
}


def preset(name: str) -> LlamaConfig:
  """Returns a published configuration by name, in lower or upper case.

  Raises:
    ConfigError: if there is no such preset; the message lists them.
  """
  try:
    return PRESETS[name.lower()]
  except KeyError:
    raise ConfigError(
      f"no preset {name!r} (there are: {', '.join(PRESETS)})"
    ) from None
