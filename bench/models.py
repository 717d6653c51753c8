"""The five models that the kernel is checked with, and other shapes."""

import dataclasses
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

# Shapes of other models that people run.
_TINYLLAMA = dataclasses.replace(
  MODELS["smollm2-135m"],
  vocab_size=32000,
  hidden_size=2048,
  intermediate_size=5632,
  num_attention_heads=32,
  num_key_value_heads=4,
  tie_word_embeddings=False,
)
_LLAMA_2_7B = dataclasses.replace(
  _TINYLLAMA,
  hidden_size=4096,
  intermediate_size=11008,
  num_key_value_heads=32,
  head_dim=128,
)
SHAPES = {
  "smollm2-360m": dataclasses.replace(
    MODELS["smollm2-135m"],
    hidden_size=960,
    intermediate_size=2560,
    num_attention_heads=15,
    num_key_value_heads=5,
  ),
  "smollm2-1.7b": dataclasses.replace(
    MODELS["smollm2-135m"],
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=32,
  ),
  "tinyllama-1.1b": _TINYLLAMA,
  "llama-2-7b": _LLAMA_2_7B,
  "llama-2-13b": dataclasses.replace(
    _LLAMA_2_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_attention_heads=40,
    num_key_value_heads=40,
  ),
  "llama-3.1-70b": PRESETS["llama-3.1-70b"],
}

# All that can be timed.
ALL = {**PRESETS, **MODELS}
