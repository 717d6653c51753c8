"""The reference Llama in Flax, written to be read and never tuned.

Every other implementation is judged against this one. Linen rather than NNX:
`apply({"params": params}, ...)` keeps the parameters a plain tree of arrays,
which packs directly and makes all implementations pure functions of the same
tree.

The tree's keys are the Hugging Face names, and matrices keep Hugging Face's
`[out, in]` order; the weights of all layers are stacked along a first axis L.

Axis letters: B batch, T new tokens, S cache slots, L layers, D width, N query
heads, K KV heads, G = N / K, H head size, F MLP width, V vocabulary.

Source: Touvron et al. 2023 (arXiv 2302.13971), Grattafiori et al. 2024
(arXiv 2407.21783).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ffjax import rope
from ffjax.cache import KVCache
from ffjax.config import LlamaConfig

DType = jax.typing.DTypeLike
Params = dict[str, Any]

# Attention scores may take about this much memory at a time.
_SCORES_BYTES = 256 * 2**20

_matrix_init = nn.initializers.normal(0.02)


def _norm_init(
  key: jax.Array, shape: tuple[int, ...], dtype: DType
) -> jax.Array:
  """Not all ones, so that a random model shows a norm weight left out."""
  return (1 + 0.1 * jax.random.normal(key, shape)).astype(dtype)


def _einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Multiplies with float32 accumulation, without TF32 for float32 input."""
  product = functools.partial(
    jnp.einsum,
    spec,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  if x.dtype == jnp.float32:
    return product(x, y)
  # XLA's CPU runtime has no bfloat16 product with a float32 sum. Widening the
  # operands first is the same sum: their products are exact in float32.
  return jax.lax.platform_dependent(
    x,
    y,
    cpu=lambda x, y: product(x.astype(jnp.float32), y.astype(jnp.float32)),
    default=product,
  )


@struct.dataclass
class TokenPlaces:
  """Where the T new tokens of each sequence stand.

  Attributes:
    positions: `[B, T]` int32, counted from the start of each sequence.
    slots: `[B, T]` int32 cache slots; S, one past the end, for padding.
    cos: `[B, T, H / 2]` float32.
    sin: `[B, T, H / 2]` float32.
  """

  positions: jax.Array
  slots: jax.Array
  cos: jax.Array
  sin: jax.Array

  @classmethod
  def after(
    cls, config: LlamaConfig, cache: KVCache, num_tokens: jax.Array, t: int
  ) -> "TokenPlaces":
    """Places `t` tokens, `num_tokens` `[B]` of them real, after the cache."""
    step = jnp.arange(t, dtype=jnp.int32)[None, :]
    positions = cache.lengths[:, None] + step
    slots = jnp.where(step < num_tokens[:, None], positions, cache.capacity)
    cos, sin = rope.cos_sin(config, positions)
    return cls(positions=positions, slots=slots, cos=cos, sin=sin)


class Linear(nn.Module):
  """Computes `x @ weight.T + bias` on `[B, T, in]`, in `dtype`."""

  features: int
  use_bias: bool
  dtype: DType
  param_dtype: DType

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `[B, T, features]`."""
    weight = self.param(
      "weight", _matrix_init, (self.features, x.shape[-1]), self.param_dtype
    )
    y = _einsum("bti,oi->bto", x, weight.astype(self.dtype))
    if self.use_bias:
      bias = self.param(
        "bias", _matrix_init, (self.features,), self.param_dtype
      )
      y += bias.astype(jnp.float32)[None, None, :]
    return y.astype(self.dtype)


class Embedding(nn.Module):
  """A table `[V, D]`, looked up by token id or multiplied as the LM head."""

  num_embeddings: int
  features: int
  dtype: DType
  param_dtype: DType

  def setup(self) -> None:
    """Declares the table."""
    shape = (self.num_embeddings, self.features)
    self.weight = self.param("weight", _matrix_init, shape, self.param_dtype)

  def __call__(self, token_ids: jax.Array) -> jax.Array:
    """Returns the rows `[B, T, D]` of `token_ids` `[B, T]`, in `dtype`."""
    return self.weight[token_ids].astype(self.dtype)

  def project(self, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits `[..., V]` of hidden states `[..., D]`."""
    return _einsum("...d,vd->...v", hidden, self.weight.astype(self.dtype))


class RMSNorm(nn.Module):
  """Scales `[B, T, D]` to unit mean square, then by a weight, in float32.

  Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
  """

  eps: float
  dtype: DType
  param_dtype: DType

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `[B, T, D]`."""
    weight = self.param("weight", _norm_init, (x.shape[-1],), self.param_dtype)
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(mean_square + self.eps)
    return (y * weight.astype(jnp.float32)[None, None, :]).astype(self.dtype)


class Attention(nn.Module):
  """Grouped-query attention over the cache, which it extends.

  Source: Ainslie et al. 2023 (arXiv 2305.13245).
  """

  config: LlamaConfig
  dtype: DType
  param_dtype: DType

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    layer: jax.Array,
    tokens: TokenPlaces,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends from the new tokens to everything up to themselves.

    Args:
      x: `[B, T, D]`, normalised.
      k_cache: `[L, B, K, S, H]`.
      v_cache: `[L, B, K, S, H]`.
      layer: int32 scalar, this layer's index in the cache.
      tokens: where the new tokens stand.

    Returns:
      The output `[B, T, D]` and the two caches with the new tokens written.
    """
    c = self.config
    b, t, _ = x.shape
    n, k, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    linear = functools.partial(
      Linear,
      use_bias=c.attention_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    query = linear(n * h, name="q_proj")(x).reshape(b, t, n, h)
    key = linear(k * h, name="k_proj")(x).reshape(b, t, k, h)
    value = linear(k * h, name="v_proj")(x).reshape(b, t, k, h)
    query = rope.apply(query, tokens.cos, tokens.sin)
    key = rope.apply(key, tokens.cos, tokens.sin)

    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    # A padding token's slot lies past the end, so its write is dropped.
    at = (layer, rows, slice(None), tokens.slots)
    k_cache = k_cache.at[at].set(key.astype(k_cache.dtype), mode="drop")
    v_cache = v_cache.at[at].set(value.astype(v_cache.dtype), mode="drop")
    keys = jax.lax.dynamic_index_in_dim(k_cache, layer, 0, keepdims=False)
    values = jax.lax.dynamic_index_in_dim(v_cache, layer, 0, keepdims=False)

    out = _attend_in_blocks(
      query.reshape(b, t, k, n // k, h),
      tokens.positions,
      keys.astype(self.dtype),
      values.astype(self.dtype),
    )
    out = out.reshape(b, t, n * h)
    return linear(c.hidden_size, name="o_proj")(out), k_cache, v_cache


def _attend(
  query: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array
) -> jax.Array:
  """Attends from each query to the slots up to its position.

  Args:
    query: `[B, T, K, G, H]`.
    positions: `[B, T]` int32.
    keys: `[B, K, S, H]` in the query's dtype.
    values: likewise.

  Returns:
    `[B, T, K, G, H]` in the query's dtype.
  """
  scores = _einsum("btkgh,bksh->bkgts", query, keys)
  scores *= query.shape[-1] ** -0.5
  slot = jnp.arange(keys.shape[2], dtype=jnp.int32)
  visible = slot[None, None, :] <= positions[:, :, None]
  scores = jnp.where(
    visible[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min
  )
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return _einsum("bkgts,bksh->btkgh", weights, values).astype(query.dtype)


def _attend_in_blocks(
  query: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array
) -> jax.Array:
  """Does what `_attend` does, for as many queries at a time as memory allows.

  So it grows with S and not with T S, however many tokens share one reading of
  the weights.
  """
  b, t, k, g, h = query.shape
  most = max(1, _SCORES_BYTES // (4 * b * k * g * keys.shape[2]))
  if t <= most:
    return _attend(query, positions, keys, values)
  block = 1 << (most.bit_length() - 1)
  num_blocks = -(-t // block)
  padding = num_blocks * block - t

  def blocks(x: jax.Array) -> jax.Array:
    """From `[B, T, ...]` to `[blocks, B, T of a block, ...]`."""
    x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(b, num_blocks, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  out = jax.lax.map(
    lambda some: _attend(some[0], some[1], keys, values),
    (blocks(query), blocks(positions)),
  )
  return jnp.moveaxis(out, 0, 1).reshape(b, -1, k, g, h)[:, :t]


class Mlp(nn.Module):
  """Computes `down(silu(gate(x)) * up(x))` on `[B, T, D]`.

  Source: Shazeer 2020 (arXiv 2002.05202).
  """

  config: LlamaConfig
  dtype: DType
  param_dtype: DType

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `[B, T, D]`."""
    c = self.config
    linear = functools.partial(
      Linear,
      use_bias=c.mlp_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )
    gate = linear(c.intermediate_size, name="gate_proj")(x)
    up = linear(c.intermediate_size, name="up_proj")(x)
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return linear(c.hidden_size, name="down_proj")(hidden.astype(self.dtype))


class DecoderLayer(nn.Module):
  """One layer; the carry is what `nn.scan` hands from layer to layer."""

  config: LlamaConfig
  dtype: DType
  param_dtype: DType

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, jax.Array, jax.Array],
    layer: jax.Array,
    tokens: TokenPlaces,
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
    """Maps the residual stream and caches before the layer to those after."""
    x, k_cache, v_cache = carry
    dtypes: dict[str, Any] = dict(
      dtype=self.dtype, param_dtype=self.param_dtype
    )
    norm = functools.partial(RMSNorm, self.config.rms_norm_eps, **dtypes)
    attended, k_cache, v_cache = Attention(
      self.config, **dtypes, name="self_attn"
    )(norm(name="input_layernorm")(x), k_cache, v_cache, layer, tokens)
    x += attended
    x += Mlp(self.config, **dtypes, name="mlp")(
      norm(name="post_attention_layernorm")(x)
    )
    return (x, k_cache, v_cache), None


class Llama(nn.Module):
  """A Llama decoder that extends a cache by new tokens.

  Attributes:
    config: the model.
    dtype: dtype of activations and of the operands of products; float32 or
      bfloat16. Sums, norms, softmax and logits are float32 in either.
    param_dtype: dtype of parameters that `init` makes; `apply` takes any.
  """

  config: LlamaConfig
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  def setup(self) -> None:
    """Declares the modules."""
    c = self.config
    dtypes: dict[str, Any] = dict(
      dtype=self.dtype, param_dtype=self.param_dtype
    )
    self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, **dtypes)
    self.layers = nn.scan(
      DecoderLayer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=c.num_hidden_layers,
    )(c, **dtypes)
    self.norm = RMSNorm(c.rms_norm_eps, **dtypes)
    if not c.tie_word_embeddings:
      self.lm_head = Embedding(c.vocab_size, c.hidden_size, **dtypes)

  def __call__(
    self, token_ids: jax.Array, num_tokens: jax.Array, cache: KVCache
  ) -> tuple[jax.Array, KVCache]:
    """Runs all layers on new tokens.

    Args:
      token_ids: `[B, T]` int32 in `[0, V)`, padded at the end.
      num_tokens: `[B]` int32 in `[0, T]`, tokens that are not padding.
      cache: with room for them: `lengths + num_tokens <= S`.

    Returns:
      The normalised hidden states `[B, T, D]` in `dtype` (meaningless at
      padding) and the cache with the new tokens appended.
    """
    tokens = TokenPlaces.after(
      self.config, cache, num_tokens, token_ids.shape[1]
    )
    x = self.embed_tokens(token_ids)
    layer = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
    (x, k, v), _ = self.layers((x, cache.k, cache.v), layer, tokens)
    lengths = cache.lengths + num_tokens
    return self.norm(x), KVCache(k=k, v=v, lengths=lengths)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Maps hidden states `[..., D]` to float32 logits `[..., V]`."""
    tied = self.config.tie_word_embeddings
    return (self.embed_tokens if tied else self.lm_head).project(hidden)


def init_params(key: jax.Array, config: LlamaConfig, dtype: DType) -> Params:
  """Makes random parameters; under `jax.eval_shape`, just their shapes.

  Args:
    key: a `jax.random` key.
    config: the model.
    dtype: dtype of every parameter.

  Returns:
    The tree that `Llama.apply` takes as `{"params": tree}`; leaves of
    `layers` are stacked `[L, ...]`.
  """

  def touch_all(
    model: Llama, token_ids: jax.Array, cache: KVCache
  ) -> jax.Array:
    hidden, _ = model(token_ids, jnp.ones_like(cache.lengths), cache)
    return model.logits(hidden)

  cache = KVCache.create(config, batch=1, capacity=1, dtype=dtype)
  token_ids = jnp.zeros((1, 1), jnp.int32)
  model = Llama(config, param_dtype=dtype)
  return model.init(key, token_ids, cache, method=touch_all)["params"]
