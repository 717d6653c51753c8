"""A decode step in plain JAX, as fast as we know how to write one for XLA.

The peer that the kernel has to beat: layers unrolled, one array per matrix, the
matrix-vector product as multiply and sum with weights `[out, in]`, cache updated
in place. One sequence only. Letters as in `ffjax.model`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ffjax
from ffjax import rope
from ffjax.cache import KVCache

_F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to write the step.

  Attributes:
    product: "sum" multiplies and sums, "dot" leaves it to `jnp.dot`.
    joined: whether q, k, v are one matrix, and gate and up another.
  """

  product: str
  joined: bool


class Layer(NamedTuple):
  """Weights of a layer; `qkv` and `gate_up` are one matrix or several."""

  input_norm: jax.Array
  qkv: tuple[jax.Array, ...]
  o: jax.Array
  post_norm: jax.Array
  gate_up: tuple[jax.Array, ...]
  down: jax.Array


class Weights(NamedTuple):
  """All weights; `lm_head` is the embedding where they are tied."""

  embedding: jax.Array
  layers: tuple[Layer, ...]
  norm: jax.Array
  lm_head: jax.Array


class State(NamedTuple):
  """What a step changes: the newest token, where it stands, `[K, S, H]` each."""

  token_id: jax.Array
  position: jax.Array
  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]


def split(model: ffjax.Model, joined: bool) -> Weights:
  """Copies a model's weights into one array per matrix and layer."""
  params: Any = model.params

  @jax.jit
  def layer(layers: Any, index: jax.Array) -> Layer:
    one = jax.tree.map(lambda x: x[index], layers)
    attention, mlp = one["self_attn"], one["mlp"]
    qkv = tuple(attention[f"{name}_proj"]["weight"] for name in "qkv")
    gate_up = tuple(mlp[f"{name}_proj"]["weight"] for name in ("gate", "up"))
    return Layer(
      input_norm=one["input_layernorm"]["weight"],
      qkv=(jnp.concatenate(qkv),) if joined else qkv,
      o=attention["o_proj"]["weight"],
      post_norm=one["post_attention_layernorm"]["weight"],
      gate_up=(jnp.concatenate(gate_up),) if joined else gate_up,
      down=mlp["down_proj"]["weight"],
    )

  embedding = params["embed_tokens"]["weight"]
  tied = model.config.tie_word_embeddings
  return Weights(
    embedding=embedding,
    layers=tuple(
      layer(params["layers"], jnp.int32(i))
      for i in range(model.config.num_hidden_layers)
    ),
    norm=params["norm"]["weight"],
    lm_head=embedding if tied else params["lm_head"]["weight"],
  )


@jax.jit
def state_of(cache: KVCache, token_id: jax.Array) -> State:
  """Takes over from the reference; copies the cache of the one sequence."""
  k, v = (tuple(x[i, 0] for i in range(len(x))) for x in (cache.k, cache.v))
  return State(token_id, cache.lengths[0], k, v)


def _matvec(variant: Variant, weight: jax.Array, x: jax.Array) -> jax.Array:
  """Returns `weight @ x` in float32, for `[out, in]` and `[in]`."""
  if variant.product == "sum":
    return jnp.sum(weight.astype(_F32) * x.astype(_F32)[None, :], axis=1)
  return _dot("oi,i->o", weight, x)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  if jax.default_backend() == "cpu":
    # The CPU has no bfloat16 product with a float32 sum.
    x, y = x.astype(_F32), y.astype(_F32)
  return jnp.einsum(spec, x, y, preferred_element_type=_F32)


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  y = x.astype(_F32)
  y *= jax.lax.rsqrt(jnp.mean(jnp.square(y)) + eps)
  return (y * weight.astype(_F32)).astype(x.dtype)


def _attend(
  variant: Variant,
  query: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  position: jax.Array,
) -> jax.Array:
  """Attends from `[K, G, H]` to `[K, S, H]` up to a position; `[K, G, H]`."""
  scale = query.shape[-1] ** -0.5
  if variant.product == "sum":
    wide = keys.astype(_F32)[:, None]
    scores = jnp.sum(query.astype(_F32)[:, :, None] * wide, axis=-1)
  else:
    scores = _dot("kgh,ksh->kgs", query, keys)
  visible = jnp.arange(keys.shape[1], dtype=jnp.int32) <= position
  scores = jnp.where(visible[None, None], scores * scale, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  if variant.product == "sum":
    wide = values.astype(_F32)[:, None]
    out = jnp.sum(weights.astype(_F32)[..., None] * wide, axis=2)
  else:
    out = _dot("kgs,ksh->kgh", weights, values)
  return out.astype(query.dtype)


def step(
  config: ffjax.LlamaConfig, variant: Variant, weights: Weights, state: State
) -> tuple[jax.Array, State]:
  """Runs the newest token; returns float32 logits `[V]` and the next state."""
  c = config
  n, kv, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  position = state.position
  cos, sin = rope.cos_sin(c, position[None, None])

  def heads(x: jax.Array, rotate: bool) -> jax.Array:
    x = x.reshape(-1, h)
    return rope.apply(x[None, None], cos, sin)[0, 0] if rotate else x

  x = weights.embedding[state.token_id]
  dtype = x.dtype
  new_k, new_v = [], []
  for layer, k, v in zip(weights.layers, state.k, state.v, strict=True):
    y = _norm(x, layer.input_norm, c.rms_norm_eps)
    qkv = [_matvec(variant, w, y).astype(dtype) for w in layer.qkv]
    if variant.joined:
      qkv = jnp.split(qkv[0], [n * h, (n + kv) * h])
    query, key, value = (
      heads(part, rotate)
      for part, rotate in zip(qkv, (True, True, False), strict=True)
    )
    at = (jnp.int32(0), position, jnp.int32(0))
    k = jax.lax.dynamic_update_slice(k, key[:, None], at)
    v = jax.lax.dynamic_update_slice(v, value[:, None], at)
    new_k.append(k)
    new_v.append(v)
    out = _attend(variant, query.reshape(kv, n // kv, h), k, v, position)
    x += _matvec(variant, layer.o, out.reshape(-1)).astype(dtype)
    y = _norm(x, layer.post_norm, c.rms_norm_eps)
    gate_up = [_matvec(variant, w, y).astype(dtype) for w in layer.gate_up]
    gate, up = jnp.split(gate_up[0], 2) if variant.joined else gate_up
    hidden = jax.nn.silu(gate.astype(_F32)) * up.astype(_F32)
    x += _matvec(variant, layer.down, hidden.astype(dtype)).astype(dtype)
  x = _norm(x, weights.norm, c.rms_norm_eps)
  logits = _matvec(variant, weights.lm_head, x)
  token_id = jnp.argmax(logits).astype(jnp.int32)
  return logits, State(token_id, position + 1, tuple(new_k), tuple(new_v))
