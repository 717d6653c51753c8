"""Rotary position embeddings: the only place that computes cos and sin.

Every implementation receives the arrays made here, so that they cannot
disagree on frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.config import LlamaConfig


def inv_freq(config: LlamaConfig) -> np.ndarray:
  """Returns the rope frequencies `[H / 2]`, float32, in radians per token.

  Source: Su et al. 2021 (arXiv 2104.09864); scaling as in Hugging Face
  transformers' `modeling_rope_utils.py`.
  """
  exponent = np.arange(0, config.head_dim, 2, dtype=np.float64)
  freq = config.rope_theta ** -(exponent / config.head_dim)
  scaling = config.rope_scaling
  if scaling is None:
    return freq.astype(np.float32)
  if scaling.rope_type == "linear":
    return (freq / scaling.factor).astype(np.float32)
  # llama3: by wavelength, keep the short ones, divide the long ones, and
  # interpolate linearly in original_positions / wavelength between the two.
  turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
  kept = (turns - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  kept = np.clip(kept, 0.0, 1.0)
  return (freq * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def cos_sin(
  config: LlamaConfig, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin of the rope angles.

  Args:
    config: the model.
    positions: int32, any shape `[...]`.

  Returns:
    Two float32 arrays `[..., H / 2]`.
  """
  freq = jnp.asarray(inv_freq(config))
  angle = positions[..., None].astype(jnp.float32) * freq.reshape(
    (1,) * positions.ndim + freq.shape
  )
  return jnp.cos(angle), jnp.sin(angle)


def apply(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of each head (Hugging Face's order, not pairs).

  Args:
    x: `[B, T, heads, H]`.
    cos: `[B, T, H / 2]` float32.
    sin: `[B, T, H / 2]` float32.

  Returns:
    `[B, T, heads, H]`, computed in float32, in the dtype of `x`.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None, :], sin[:, :, None, :]
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
