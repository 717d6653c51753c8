"""Small Llamas with weights, shared by tests and the golden file's script.

Configs are spelled as in `config.json`, names and shapes of weights as Hugging
Face documents them, all of it without help from `ffjax`.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
import safetensors.numpy

BATCH = 2

_BASE: dict[str, Any] = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_act": "silu",
  "vocab_size": 96,
  "hidden_size": 64,
  "intermediate_size": 80,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "torch_dtype": "float32",
}


def _llama3(factor: float, low: float, high: float, original: int) -> dict:
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": original,
  }


# Numbers of query and KV heads, then whatever else differs from the base. The
# scaled cases are run well past the positions "trained on first".
CASES: dict[str, dict[str, Any]] = {
  name: {
    **_BASE,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    **changes,
  }
  for name, heads, kv_heads, changes in (
    ("gqa1", 4, 4, {}),
    ("gqa2", 4, 2, {}),
    ("gqa3", 6, 2, {"hidden_size": 48, "head_dim": 8}),
    ("gqa4", 8, 2, {"head_dim": 8}),
    ("gqa8", 8, 1, {"head_dim": 8, "tie_word_embeddings": True}),
    ("attention_bias", 4, 2, {"attention_bias": True}),
    ("mlp_bias", 4, 2, {"mlp_bias": True}),
    (
      "biases_tied",
      4,
      1,
      {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
      },
    ),
    ("one_layer", 2, 1, {"num_hidden_layers": 1, "head_dim": 32}),
    ("wide_heads", 4, 2, {"head_dim": 24}),
    ("narrow_heads", 4, 2, {"head_dim": 6, "tie_word_embeddings": True}),
    (
      "odd_sizes",
      3,
      3,
      {
        "vocab_size": 101,
        "hidden_size": 33,
        "intermediate_size": 47,
        "num_hidden_layers": 3,
        "head_dim": 10,
      },
    ),
    ("linear", 4, 2, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    (
      "llama3",
      4,
      2,
      {"rope_theta": 5e5, "rope_scaling": _llama3(8.0, 1.0, 4.0, 16)},
    ),
    (
      "llama3_other_factors",
      4,
      1,
      {"rope_theta": 2e3, "rope_scaling": _llama3(32.0, 0.5, 6.0, 24)},
    ),
    ("small_theta", 4, 2, {"rope_theta": 50.0}),
    ("large_theta", 4, 2, {"rope_theta": 1e6}),
    ("large_eps", 4, 2, {"rms_norm_eps": 0.3}),
  )
}


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all tensors of a config, by name."""
  width, mlp_width = raw["hidden_size"], raw["intermediate_size"]
  q = raw["num_attention_heads"] * raw["head_dim"]
  kv = raw["num_key_value_heads"] * raw["head_dim"]
  found: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (raw["vocab_size"], width),
    "model.norm.weight": (width,),
  }
  if not raw["tie_word_embeddings"]:
    found["lm_head.weight"] = (raw["vocab_size"], width)
  for layer in range(raw["num_hidden_layers"]):
    prefix = f"model.layers.{layer}."
    found[prefix + "input_layernorm.weight"] = (width,)
    found[prefix + "post_attention_layernorm.weight"] = (width,)
    for block, name, rows, columns in (
      ("self_attn", "q_proj", q, width),
      ("self_attn", "k_proj", kv, width),
      ("self_attn", "v_proj", kv, width),
      ("self_attn", "o_proj", width, q),
      ("mlp", "gate_proj", mlp_width, width),
      ("mlp", "up_proj", mlp_width, width),
      ("mlp", "down_proj", width, mlp_width),
    ):
      found[f"{prefix}{block}.{name}.weight"] = (rows, columns)
      if raw["attention_bias" if block == "self_attn" else "mlp_bias"]:
        found[f"{prefix}{block}.{name}.bias"] = (rows,)
  return found


def _random(name: str) -> np.random.RandomState:
  # The legacy generator, because NumPy promises that its numbers never change.
  return np.random.RandomState(zlib.crc32(name.encode()))


def random_weights(raw: dict[str, Any], name: str) -> dict[str, np.ndarray]:
  """Makes weights for any config, float32, so large that all of them matter."""
  random = _random(name)
  tensors = {}
  for tensor, shape in shapes(raw).items():
    noise = random.standard_normal(shape)
    if "norm" in tensor:
      noise = 1 + 0.3 * noise
    elif tensor.endswith("bias"):
      noise = 0.3 * noise
    elif "proj" in tensor:
      # More than 1 / sqrt(inputs), so that attention has peaks.
      noise = 1.5 * noise / np.sqrt(shape[1])
    else:
      noise = noise / np.sqrt(shape[1])
    tensors[tensor] = noise.astype(np.float32)
  return tensors


def weights(name: str) -> dict[str, np.ndarray]:
  """Makes a case's weights."""
  return random_weights(CASES[name], name)


def token_ids(name: str) -> np.ndarray:
  """Returns a case's input, `[B, T]` int32, T being 40 where rope is scaled."""
  raw = CASES[name]
  length = 40 if raw["rope_scaling"] else 20
  random = _random(name + " input")
  return random.randint(raw["vocab_size"], size=(BATCH, length)).astype(
    np.int32
  )


def write(
  directory: pathlib.Path,
  raw: dict[str, Any],
  tensors: dict[str, np.ndarray],
) -> None:
  """Writes a checkpoint directory of one file, without help from `ffjax`."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
  safetensors.numpy.save_file(
    tensors, directory / "model.safetensors", metadata={"format": "pt"}
  )
