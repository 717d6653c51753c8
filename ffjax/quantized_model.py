"""The reference on a parameter tree in which matrices are quantised.

Matrices are dequantised in float32 and rounded to the cache's dtype; then the
model is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ffjax import layerwise, quantized
from ffjax.cache import KVCache
from ffjax.config import LlamaConfig
from ffjax.model import DType, Llama, Params
from ffjax.quantized import QuantizedMatrix

# The LM head is dequantised in blocks of rows of about this size.
_BLOCK_BYTES = 32 * 2**20


def is_quantized(leaf: Any) -> bool:
  """Returns whether a leaf of a parameter tree is a quantised matrix."""
  return isinstance(leaf, QuantizedMatrix)


def any_quantized(params: Params) -> bool:
  """Returns whether there is a quantised matrix in a parameter tree."""
  return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def dequantized(tree: Any, dtype: DType) -> Any:
  """Returns a tree with the quantised matrices as arrays in `dtype`."""

  def plain(leaf: Any) -> Any:
    if not is_quantized(leaf):
      return leaf
    return quantized.dequantize(leaf).astype(dtype)

  return jax.tree.map(plain, tree, is_leaf=is_quantized)


def embed(params: Params, token_ids: jax.Array, dtype: DType) -> jax.Array:
  """Looks up the embeddings `[..., D]` of token ids `[...]`, in `dtype`."""
  table = params["embed_tokens"]["weight"]
  if is_quantized(table):
    found = quantized.dequantize(quantized.rows(table, token_ids))
    return found.astype(dtype)
  return table[token_ids].astype(dtype)


def hidden_states(
  params: Params,
  config: LlamaConfig,
  token_ids: jax.Array,
  num_tokens: jax.Array,
  cache: KVCache,
) -> tuple[jax.Array, KVCache]:
  """Does what `Llama.__call__` does; a layer is dequantised in its turn."""
  dtype = cache.k.dtype
  return layerwise.hidden_states(
    config,
    embed(params, token_ids, dtype),
    num_tokens,
    cache,
    params["layers"],
    lambda layer: dequantized(layer, dtype),
    params["norm"]["weight"],
  )


def logits(params: Params, config: LlamaConfig, hidden: jax.Array) -> jax.Array:
  """Does what `Llama.logits` does, in blocks if the LM head is quantised."""
  name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
  table = params[name]["weight"]
  v, d = config.vocab_size, config.hidden_size
  if not is_quantized(table):
    llama = Llama(config, hidden.dtype)
    return jnp.asarray(llama.apply({"params": params}, hidden, method="logits"))
  block_rows = min(v, max(1, _BLOCK_BYTES // (d * hidden.dtype.itemsize)))

  def weight(block: jax.Array, count: int) -> jax.Array:
    at = block * block_rows + jnp.arange(count, dtype=jnp.int32)
    some = quantized.rows(table, at)
    return quantized.dequantize(some).astype(hidden.dtype)

  return layerwise.logits(hidden, v, block_rows, weight)
