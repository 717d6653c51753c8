"""The reference on weights that are not stored as it takes them.

Packed and quantised models (`ffjax.packed`, `ffjax.quantized_model`) share it:
the parameters of a layer, or a block of the LM head, are made when their turn
comes, so that there is never a second copy of the weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ffjax.cache import KVCache
from ffjax.config import LlamaConfig
from ffjax.model import DecoderLayer, Embedding, Params, RMSNorm, TokenPlaces


def hidden_states(
  config: LlamaConfig,
  embedded: jax.Array,
  num_tokens: jax.Array,
  cache: KVCache,
  stored: Any,
  layer_params: Callable[[Any], Params],
  norm: jax.Array,
) -> tuple[jax.Array, KVCache]:
  """Does what `Llama.__call__` does after the embedding.

  Args:
    config: the model.
    embedded: `[B, T, D]` in the cache's dtype, embeddings of the new tokens.
    num_tokens: `[B]` int32, tokens that are not padding.
    cache: with room for them.
    stored: pytree of all layers' parameters as stored, `[L, ...]` each.
    layer_params: makes one layer's parameter tree of its part of `stored`.
    norm: `[D]`, the final norm's weight.

  Returns:
    The normalised hidden states `[B, T, D]` and the longer cache.
  """
  dtypes: dict[str, Any] = dict(dtype=cache.k.dtype, param_dtype=cache.k.dtype)
  decoder_layer = DecoderLayer(config, **dtypes)
  tokens = TokenPlaces.after(config, cache, num_tokens, embedded.shape[1])

  def run_layer(carry: Any, xs: Any) -> Any:
    layer, part = xs
    variables = {"params": layer_params(part)}
    return decoder_layer.apply(variables, carry, layer, tokens)

  layers = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
  carry = (embedded, cache.k, cache.v)
  (x, k, v), _ = jax.lax.scan(run_layer, carry, (layers, stored))
  normed = RMSNorm(config.rms_norm_eps, **dtypes).apply(
    {"params": {"weight": norm}}, x
  )
  lengths = cache.lengths + num_tokens
  return jnp.asarray(normed), KVCache(k=k, v=v, lengths=lengths)


def logits(
  hidden: jax.Array,
  num_rows: int,
  block_rows: int,
  weight: Callable[[jax.Array, int], jax.Array],
) -> jax.Array:
  """Does what `Llama.logits` does, one block of the LM head after another.

  Args:
    hidden: `[..., D]`.
    num_rows: V.
    block_rows: rows in a block.
    weight: `weight(block, count)` makes the first `count` rows `[count, D]` of
      a block, given its index, int32.

  Returns:
    `[..., V]` float32.
  """

  def project(block: jax.Array, count: int) -> jax.Array:
    """Returns logits `[..., count]`."""
    made = weight(block, count)
    head = Embedding(count, hidden.shape[-1], hidden.dtype, made.dtype)
    variables = {"params": {"weight": made}}
    return jnp.asarray(head.apply(variables, hidden, method="project"))

  num_blocks, rest = divmod(num_rows, block_rows)
  parts = []
  if num_blocks:
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    found = jax.lax.map(lambda block: project(block, block_rows), blocks)
    parts.append(jnp.moveaxis(found, 0, -2).reshape(*hidden.shape[:-1], -1))
  if rest:
    parts.append(project(jnp.int32(num_blocks), rest))
  return jnp.concatenate(parts, axis=-1)
