"""The five models that the kernel is checked and compiled for."""

import pathlib

from ffjax.config import LlamaConfig
from ffjax.presets import PRESETS

_CHECKPOINTS = pathlib.Path(__file__).parents[1] / "checkpoints"

MODELS = {
  "llama-3.2-1b": PRESETS["llama-3.2-1b"],
  "llama-3.2-3b": PRESETS["llama-3.2-3b"],
  "llama-3.1-8b": PRESETS["llama-3.1-8b"],
  # HuggingFaceTB/SmolLM2-135M.
  "smollm2-135m": LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
  ),
  "tiny-llama": LlamaConfig.from_json(_CHECKPOINTS / "tiny_llama/config.json"),
}

# All that can be timed.
ALL = {**PRESETS, **MODELS}
