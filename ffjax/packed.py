"""Parameters in the order in which the fused kernel streams them.

`ffjax.packing` makes them from the parameter tree and back. The reference
reads them too, for prompts and for judging the kernel: a layer or a block of
rows at a time, so that there is never a second copy of the weights.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ffjax import layerwise, quantized
from ffjax.cache import KVCache
from ffjax.config import LlamaConfig
from ffjax.model import DType, Params
from ffjax.quantized import QuantizedMatrix
from pallas_kernels import code_packing, formats
from pallas_kernels import packing as chunks_lib
from pallas_kernels.geometry import (
  CHUNK_COLS,
  SEGMENTS,
  UNIT_ROWS,
  Geometry,
  round_up,
)
from pallas_kernels.schedule import Matmul, make_schedule

Path = tuple[str, ...]

# The rows of `PackedParams.norms` hold these in turn, the first two per layer.
NORM_PATHS: tuple[Path, ...] = (
  ("layers", "input_layernorm", "weight"),
  ("layers", "post_attention_layernorm", "weight"),
  ("norm", "weight"),
)
EMBEDDING_PATH: Path = ("embed_tokens", "weight")
# Those that every layer has.
LAYER_GROUPS = ("qkv", "o", "gate_up", "down")
# The LM head is multiplied in blocks of rows of about this size.
_BLOCK_BYTES = 32 * 2**20


@struct.dataclass
class PackedParams:
  """A model's parameters as chunks, see `pallas_kernels.packing`; a pytree.

  L layers, P CTAs, n chunks that each CTA streams of a matrix, D' the width
  rounded up to whole chunks.

  Attributes:
    qkv: `[L, P, n, 128, 64]` bfloat16.
    o: likewise.
    gate_up: likewise.
    down: likewise.
    lm_head: `[P, n, 128, 64]` bfloat16.
    embedding: likewise, or None if it is the LM head; if it is quantised and not
      the LM head, itself as it was.
    norms: `[2 L + 1, D']` float32: of each layer before attention and before
      the MLP, then the final one; zeros beyond D.
    norm_dtypes: names of the dtypes that the norms had, as in `NORM_PATHS`.
    scales: by the name of a field above, of codes, the `[L, P, n, rows, 32]` int32
      beside them, the LM head's without L; see `pallas_kernels.code_packing`.
      Chunks then have as many rows as their codes take.
    table: of a quantised embedding, its weights in bfloat16 and in the form of
      an LM head: what the kernel looks tokens up in. Else None.
    format: what the layers' matrices were quantised to, or None.
    chunk_format: how the kernel has them.
    head_format: what the LM head was quantised to, or None.
    head_chunk_format: how the kernel has it.
  """

  qkv: jax.Array
  o: jax.Array
  gate_up: jax.Array
  down: jax.Array
  lm_head: jax.Array
  embedding: jax.Array | QuantizedMatrix | None
  norms: jax.Array
  norm_dtypes: tuple[str, ...] = struct.field(pytree_node=False)
  scales: dict[str, jax.Array] = struct.field(default_factory=dict)
  table: jax.Array | None = None
  format: quantized.Format | None = struct.field(
    pytree_node=False, default=None
  )
  chunk_format: formats.Format = struct.field(
    pytree_node=False, default=formats.BF16
  )
  head_format: quantized.Format | None = struct.field(
    pytree_node=False, default=None
  )
  head_chunk_format: formats.Format = struct.field(
    pytree_node=False, default=formats.BF16
  )

  @property
  def num_ctas(self) -> int:
    """P, the number of CTAs that the weights are dealt out to."""
    return self.qkv.shape[1]

  @property
  def quantized_to(self) -> frozenset[quantized.Format]:
    """Formats of the matrices that were quantised."""
    found = [self.format, self.head_format]
    if isinstance(self.embedding, QuantizedMatrix):
      found.append(self.embedding.format)
    return frozenset(filter(None, found))

  def leaf_dtype(self, path: Path) -> np.dtype:
    """Returns the dtype that a leaf of the parameter tree had, and will have."""
    if path in NORM_PATHS:
      return jnp.dtype(self.norm_dtypes[NORM_PATHS.index(path)])
    return np.dtype(self.qkv.dtype)

  def leaf_bytes(self, path: Path, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a leaf without padding, given its shape."""
    format, chunk_format = None, formats.BF16
    if path == EMBEDDING_PATH and self.embedding is not None:
      if isinstance(self.embedding, QuantizedMatrix):
        return self.embedding.num_bytes
    elif path not in NORM_PATHS:
      name = "qkv" if path[0] == "layers" else "lm_head"
      format, chunk_format = self.formats_of(name)
    if format is None:
      return math.prod(shape) * self.leaf_dtype(path).itemsize
    entry_bytes = np.dtype(chunk_format.scale).itemsize
    if chunk_format.beside == "zero":
      entry_bytes += 1
    elif chunk_format.beside == "minimum":
      entry_bytes *= 2
    return format.num_bytes(shape, entry_bytes)

  def formats_of(
    self, name: str
  ) -> tuple[quantized.Format | None, formats.Format]:
    """Returns what a group's chunks were quantised to, and what they are."""
    if name in LAYER_GROUPS:
      return self.format, self.chunk_format
    if name == "lm_head":
      return self.head_format, self.head_chunk_format
    return None, formats.BF16

  def stored(self, name: str) -> Any:
    """Returns a group as it is, beside its scales if there are any."""
    stored = getattr(self, name)
    return (stored, self.scales[name]) if name in self.scales else stored

  def layer_chunks(self) -> dict[str, Any]:
    """Returns the layers' chunks by group, beside their scales if any."""
    return {name: self.stored(name) for name in LAYER_GROUPS}

  def lookup_table(self) -> jax.Array:
    """Returns the chunks, bfloat16, in which tokens are looked up."""
    if self.table is not None:
      return self.table
    assert not isinstance(self.embedding, QuantizedMatrix)
    return self.lm_head if self.embedding is None else self.embedding

  def operands(self) -> dict[str, jax.Array]:
    """Returns what the kernel takes, by its names."""
    scales = {f"s_{name}": array for name, array in self.scales.items()}
    return dict(
      qkv=self.qkv,
      o=self.o,
      gate_up=self.gate_up,
      down=self.down,
      lm_head=self.lm_head,
      embedding=self.lookup_table(),
      norms=self.norms,
      **scales,
    )


def geometry_of(config: LlamaConfig) -> Geometry:
  """Returns the sizes that the kernel is built from."""
  return Geometry(
    hidden_size=config.hidden_size,
    intermediate_size=config.intermediate_size,
    num_hidden_layers=config.num_hidden_layers,
    num_attention_heads=config.num_attention_heads,
    num_key_value_heads=config.num_key_value_heads,
    head_dim=config.head_dim,
    vocab_size=config.vocab_size,
    rms_norm_eps=config.rms_norm_eps,
    tie_word_embeddings=config.tie_word_embeddings,
  )


def groups(config: LlamaConfig) -> dict[str, tuple[Path, ...]]:
  """Lists which leaves of the parameter tree share a field of `PackedParams`.

  They are in the order in which their rows are joined.
  """

  def paths(module: str, *names: str) -> tuple[Path, ...]:
    return tuple(("layers", module, name, "weight") for name in names)

  embedding = (EMBEDDING_PATH,)
  table: dict[str, tuple[Path, ...]] = dict(
    qkv=paths("self_attn", "q_proj", "k_proj", "v_proj"),
    o=paths("self_attn", "o_proj"),
    gate_up=paths("mlp", "gate_proj", "up_proj"),
    down=paths("mlp", "down_proj"),
  )
  if config.tie_word_embeddings:
    return {**table, "lm_head": embedding, "norms": NORM_PATHS}
  return {
    **table,
    "lm_head": (("lm_head", "weight"),),
    "embedding": embedding,
    "norms": NORM_PATHS,
  }


def chunk_format_of(matrix: jax.Array | QuantizedMatrix) -> formats.Format:
  """Returns how the kernel has a matrix; act-order is not looked at."""
  if not isinstance(matrix, QuantizedMatrix):
    return formats.BF16
  beside = None
  if matrix.zeros is not None:
    beside = "zero"
  elif matrix.minimums is not None:
    beside = "minimum"
  f = matrix.format
  scale = np.dtype(matrix.scales.dtype).name
  return formats.Format(f.bits, f.is_float, f.group_size, scale, beside)


def _matmul(
  config: LlamaConfig,
  name: str,
  num_ctas: int,
  chunk_format: formats.Format = formats.BF16,
) -> Matmul:
  schedule = make_schedule(
    geometry_of(config), num_ctas, chunk_format, chunk_format
  )
  # The embedding is looked up, but its table has the LM head's form.
  return getattr(schedule, "lm_head" if name == "embedding" else name)


def pack_matrices(
  config: LlamaConfig,
  name: str,
  num_ctas: int,
  matrices: Sequence[Any],
) -> Any:
  """Packs the matrices of a group: `[out, in]` each, of one layer if of any.

  Args:
    config: the model.
    name: of the group, a key of `groups`; any but the norms.
    num_ctas: P.
    matrices: bfloat16, or quantised to one format, in the order of `groups`.

  Returns:
    `[P, n, 128, 64]` bfloat16; of quantised matrices, codes and scales, see
    `pallas_kernels.code_packing`.
  """
  chunk_format = chunk_format_of(matrices[0])
  matmul = _matmul(config, name, num_ctas, chunk_format)
  if not chunk_format.is_packed:
    return chunks_lib.pack_matrix(matmul, _join_rows(config, name, matrices))

  def joined(field: str) -> jax.Array:
    return _join_rows(config, name, [getattr(m, field) for m in matrices])

  beside = None
  if chunk_format.beside is not None:
    beside = joined(f"{chunk_format.beside}s")
  return (
    code_packing.pack_codes(matmul, joined("codes")),
    code_packing.pack_scales(matmul, joined("scales"), beside),
  )


def pack_table(
  config: LlamaConfig, num_ctas: int, embedding: QuantizedMatrix
) -> jax.Array:
  """Makes `PackedParams.table`, of the weights that the reference looks up."""
  weights = quantized.dequantize(embedding).astype(jnp.bfloat16)
  return pack_matrices(config, "embedding", num_ctas, [weights])


def _join_rows(
  config: LlamaConfig, name: str, parts: Sequence[jax.Array]
) -> jax.Array:
  """Joins what rows have, `[out, any]`, as the kernel wants them."""
  if name == "qkv":
    rows = jnp.concatenate(parts, axis=0)
    return chunks_lib.permute_heads(rows, config.head_dim)
  if name == "gate_up":
    return chunks_lib.interleave(*parts)
  (rows,) = parts
  return rows


def _part_rows(
  config: LlamaConfig, name: str, rows: jax.Array
) -> tuple[jax.Array, ...]:
  """Undoes `_join_rows`."""
  if name == "qkv":
    rows = chunks_lib.unpermute_heads(rows, config.head_dim)
    attention_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    at = (attention_size, attention_size + key_size)
    return tuple(jnp.split(rows, at, axis=0))
  if name == "gate_up":
    return chunks_lib.deinterleave(rows, config.intermediate_size)
  return (rows,)


def unpack_matrices(
  config: LlamaConfig,
  name: str,
  packed: Any,
  format: quantized.Format | None = None,
  chunk_format: formats.Format = formats.BF16,
) -> tuple[Any, ...]:
  """Undoes `pack_matrices`.

  Args:
    config: the model.
    name: of the group.
    packed: what `pack_matrices` has made.
    format: of quantised matrices.
    chunk_format: likewise, how the kernel has them.
  """
  c = config
  attention_size = c.num_attention_heads * c.head_dim
  key_size = c.num_key_value_heads * c.head_dim
  shape = dict(
    qkv=(attention_size + 2 * key_size, c.hidden_size),
    o=(c.hidden_size, attention_size),
    gate_up=(2 * c.intermediate_size, c.hidden_size),
    down=(c.hidden_size, c.intermediate_size),
    lm_head=(c.vocab_size, c.hidden_size),
    embedding=(c.vocab_size, c.hidden_size),
  )[name]
  num_ctas = jax.tree.leaves(packed)[0].shape[0]
  matmul = _matmul(config, name, num_ctas, chunk_format)
  # Codes have as many rows as their scales.
  stored = _unpack_rows(matmul, packed, *shape, format)
  leaves, structure = jax.tree.flatten(stored)
  parts = (_part_rows(config, name, rows) for rows in leaves)
  return tuple(
    jax.tree.unflatten(structure, own) for own in zip(*parts, strict=True)
  )


def _unpack_rows(
  matmul: Matmul,
  packed: Any,
  out: int,
  cols: int,
  format: quantized.Format | None,
) -> jax.Array | QuantizedMatrix:
  """Unpacks a matrix `[out, cols]` whose rows are as the kernel has them."""
  if format is None:
    return chunks_lib.unpack_matrix(matmul, packed, out, cols)
  codes, scales = packed
  rows, beside = code_packing.unpack_scales(matmul, scales, out, cols)
  kind = matmul.format.beside
  return QuantizedMatrix(
    codes=code_packing.unpack_codes(matmul, codes, out, cols),
    scales=rows,
    zeros=beside if kind == "zero" else None,
    minimums=beside if kind == "minimum" else None,
    columns=None,
    format=format,
  )


def unpack_layer(
  params: PackedParams,
  config: LlamaConfig,
  chunks: dict[str, Any],
  norms: jax.Array,
  dtype: DType,
) -> Params:
  """Returns the parameter tree of one layer, without what is quantised.

  Args:
    params: of the whole model.
    config: the model.
    chunks: of each group of the layer, see `PackedParams.layer_chunks`.
    norms: `[2, D']` float32, the layer's.
    dtype: what quantised weights are rounded to.
  """
  tree: Params = {}
  for name, packed in chunks.items():
    matrices = unpack_matrices(
      config, name, packed, params.format, params.chunk_format
    )
    for path, matrix in zip(groups(config)[name], matrices, strict=True):
      if isinstance(matrix, QuantizedMatrix):
        matrix = quantized.dequantize(matrix).astype(dtype)
      _, module, matrix_name, leaf = path
      tree.setdefault(module, {})[matrix_name] = {leaf: matrix}
  for path, norm in zip(NORM_PATHS[:2], norms, strict=True):
    tree[path[1]] = {path[2]: norm[: config.hidden_size]}
  return tree


def embed(
  params: PackedParams,
  config: LlamaConfig,
  token_ids: jax.Array,
  dtype: DType,
) -> jax.Array:
  """Looks up the embeddings `[..., D]` of token ids `[...]`, in `dtype`."""
  if params.table is not None and dtype != jnp.bfloat16:
    return _embed_codes(params, config, token_ids).astype(dtype)
  table = params.lookup_table()
  per_unit = _matmul(config, "embedding", params.num_ctas).chunks_per_unit
  chunks = table.reshape(-1, 2, UNIT_ROWS, SEGMENTS, CHUNK_COLS // 2)
  chunk = jnp.arange(per_unit, dtype=jnp.int32)
  chunk = chunk.reshape(*[1] * token_ids.ndim, -1)
  token_ids = token_ids[..., None]
  rows = chunks[
    token_ids // UNIT_ROWS * per_unit + chunk, :, token_ids % UNIT_ROWS
  ]
  # Segments before chunks and halves.
  rows = jnp.moveaxis(rows, -2, -4).reshape(*token_ids.shape[:-1], -1)
  return rows[..., : config.hidden_size].astype(dtype)


def _embed_codes(
  params: PackedParams, config: LlamaConfig, token_ids: jax.Array
) -> jax.Array:
  """Looks up quantised embeddings, float32: the table has them rounded."""
  if isinstance(params.embedding, QuantizedMatrix):
    return quantized.dequantize(quantized.rows(params.embedding, token_ids))

  def row(token: jax.Array) -> jax.Array:
    unit = _head_rows(params, config, token // UNIT_ROWS, UNIT_ROWS)
    assert isinstance(unit, QuantizedMatrix)
    return quantized.dequantize(quantized.rows(unit, token % UNIT_ROWS))

  found = jax.lax.map(row, token_ids.reshape(-1))
  return found.reshape(*token_ids.shape, -1)


def hidden_states(
  params: PackedParams,
  config: LlamaConfig,
  token_ids: jax.Array,
  num_tokens: jax.Array,
  cache: KVCache,
) -> tuple[jax.Array, KVCache]:
  """Does what `Llama.__call__` does, with the weights as they are here.

  Each layer is unpacked when its turn comes.
  """
  num_layers = config.num_hidden_layers

  def layer_params(part: Any) -> Params:
    chunks, norms = part
    return unpack_layer(params, config, chunks, norms, cache.k.dtype)

  stored = (
    params.layer_chunks(),
    params.norms[:-1].reshape(num_layers, 2, -1),
  )
  return layerwise.hidden_states(
    config,
    embed(params, config, token_ids, cache.k.dtype),
    num_tokens,
    cache,
    stored,
    layer_params,
    params.norms[-1, : config.hidden_size],
  )


def logits(
  params: PackedParams, config: LlamaConfig, hidden: jax.Array
) -> jax.Array:
  """Does what `Llama.logits` does, one block of the LM head after another."""
  matmul = _head_matmul(params, config)
  block_units = max(1, _BLOCK_BYTES // (UNIT_ROWS * matmul.cols * 2))

  def weight(block_idx: jax.Array, num_rows: int) -> jax.Array:
    found = _head_rows(params, config, block_idx * block_units, num_rows)
    if isinstance(found, QuantizedMatrix):
      return quantized.dequantize(found).astype(hidden.dtype)
    return found

  block_rows = block_units * UNIT_ROWS
  return layerwise.logits(hidden, config.vocab_size, block_rows, weight)


def _head_matmul(params: PackedParams, config: LlamaConfig) -> Matmul:
  return _matmul(config, "lm_head", params.num_ctas, params.head_chunk_format)


def _head_rows(
  params: PackedParams,
  config: LlamaConfig,
  first_unit: jax.Array,
  num_rows: int,
) -> jax.Array | QuantizedMatrix:
  """Returns so many of the LM head's rows, from the first one of a unit on."""
  matmul = _head_matmul(params, config)
  block = dataclasses.replace(
    matmul, rows=round_up(num_rows, UNIT_ROWS), num_ctas=1
  )

  def part(stored: jax.Array) -> jax.Array:
    chunks = stored.reshape(-1, *stored.shape[2:])
    first = first_unit * matmul.chunks_per_unit
    return jax.lax.dynamic_slice_in_dim(chunks, first, block.run_chunks)[None]

  some = jax.tree.map(part, params.stored("lm_head"))
  return _unpack_rows(
    block, some, num_rows, config.hidden_size, params.head_format
  )
