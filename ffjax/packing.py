"""Packs a model for the fused kernel, and unpacks it again.

The weights are on the device once, before and after: a group of matrices is
packed, then its source is deleted, then comes the next group.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ffjax import device_memory, packed, prompts
from ffjax.config import LlamaConfig
from ffjax.errors import RequestError
from ffjax.packed import PackedParams, Path
from ffjax.params import Model
from ffjax.quantized import Format, QuantizedMatrix
from pallas_kernels import formats, geometry


def why_not(config: LlamaConfig, dtypes: Iterable[np.dtype]) -> str | None:
  """Says why the kernel cannot take a model, or None if it can.

  Args:
    config: the model.
    dtypes: those of its matrices that are not quantised.
  """
  try:
    geometry.check(packed.geometry_of(config), batch=1)
  except geometry.UnsupportedError as e:
    return f"the kernel does not take {e}"
  for name in ("attention_bias", "mlp_bias"):
    if getattr(config, name):
      return f"the kernel does not take biases, and {name} is true"
  others = {np.dtype(dtype).name for dtype in dtypes} - {"bfloat16"}
  if others:
    return (
      f"the kernel does not take {' and '.join(sorted(others))} matrices: load"
      " the model with dtype='bfloat16'"
    )
  return None


def why_not_model(model: Model) -> str | None:
  """Says why the kernel cannot take a model, or None if it can."""
  reason = why_not(model.config, model.matrix_dtypes)
  if reason is not None or isinstance(model.params, PackedParams):
    return reason
  flat = flax.traverse_util.flatten_dict(model.params)
  found = {}
  for name, paths in packed.groups(model.config).items():
    for path in paths:
      leaf = flat[path]
      chunk_format = packed.chunk_format_of(leaf)
      if name in packed.LAYER_GROUPS:
        found[chunk_format] = leaf
      elif name == "lm_head" and not _is_taken(chunk_format):
        return (
          f"the kernel does not take {'.'.join(path)} as"
          f" {_name(leaf, chunk_format)}"
        )
      if isinstance(leaf, QuantizedMatrix) and leaf.columns is not None:
        return (
          f"the kernel does not take the order of columns of {'.'.join(path)}"
          " (act-order): load the model with keep_quantized=False"
        )
  if len(found) > 1:
    names = sorted(_name(leaf, f) for f, leaf in found.items())
    return (
      "the kernel takes matrices of one format in all layers, and there are"
      f" {' and '.join(names)}"
    )
  ((chunk_format, leaf),) = found.items()
  if not _is_taken(chunk_format):
    return f"the kernel does not take {_name(leaf, chunk_format)}"
  return None


def _is_taken(chunk_format: formats.Format) -> bool:
  """Returns whether the kernel multiplies a matrix of that format."""
  return chunk_format.beside is None or (
    chunk_format.scale != "float32" and chunk_format.bits == 4
  )


def _name(
  matrix: jax.Array | QuantizedMatrix, chunk_format: formats.Format
) -> str:
  """Says how a matrix is stored."""
  if not isinstance(matrix, QuantizedMatrix):
    return "bfloat16"
  beside = chunk_format.beside
  and_beside = "" if beside is None else f" and a {beside} beside each"
  return f"{matrix.format.name} with {chunk_format.scale} scales{and_beside}"


def pack(model: Model, num_ctas: int | None = None) -> Model:
  """Packs a model, so that `implementation="fused"` can run it.

  This consumes the argument: its arrays are deleted one group of matrices
  after another, so that the device never holds two copies of the model. The
  result is a model like any other, of the same bits; `unpack` undoes it.

  Args:
    model: with bfloat16 matrices, or with those of the layers quantised to one
      format; embedding and LM head may have others. One that is packed is
      returned as it is.
    num_ctas: to how many CTAs the weights are dealt out; None is one for each
      SM of the default device. Only packing for another device needs a number.

  Returns:
    The packed model, on the default device.

  Raises:
    RequestError: if the kernel cannot take the model, the device has no SMs to
      count, or its memory does not hold a packed group beside the model. The
      argument is then as it was.
  """
  if isinstance(model.params, PackedParams):
    if num_ctas not in (None, model.params.num_ctas):
      raise RequestError(
        f"the model is packed for {model.params.num_ctas} CTAs already: unpack"
        f" it to pack it for {num_ctas}"
      )
    return model
  reason = why_not_model(model)
  if reason is not None:
    raise RequestError(f"the model cannot be packed: {reason}")
  p = _checked_num_ctas(num_ctas)
  flat = flax.traverse_util.flatten_dict(model.params)
  groups = packed.groups(model.config)
  device_memory.require(
    _extra_bytes(model.config, flat, p),
    "packing: a part of the model twice, and padding",
  )
  norm_dtypes = tuple(np.dtype(flat[x].dtype).name for x in packed.NORM_PATHS)
  fields: dict[str, Any] = {"embedding": None}
  scales = {}
  first = flat[groups["qkv"][0]]
  if isinstance(first, QuantizedMatrix):
    fields["format"] = first.format
  fields["chunk_format"] = packed.chunk_format_of(first)
  head = flat[groups["lm_head"][0]]
  if isinstance(head, QuantizedMatrix):
    fields["head_format"] = head.format
  fields["head_chunk_format"] = packed.chunk_format_of(head)
  for name, paths in groups.items():
    sources = tuple(flat.pop(path) for path in paths)
    if _needs_table(paths, sources):
      fields["table"] = _pack_table(sources[0], model.config, p)
    made = _pack_group(sources, model.config, name, p)
    if isinstance(made, tuple):
      made, scales[name] = made
    fields[name] = jax.block_until_ready(made)
    for source in sources:
      # The same array may be the embedding and the LM head.
      if not any(source is other for other in flat.values()):
        _delete(source)
  params = PackedParams(**fields, norm_dtypes=norm_dtypes, scales=scales)
  return dataclasses.replace(model, params=params)


def unpack(model: Model) -> Model:
  """Undoes `pack`, bit for bit; consumes its argument likewise.

  Args:
    model: a packed model. One that is not is returned as it is.

  Returns:
    The model with a parameter tree.

  Raises:
    RequestError: if the device's memory does not hold an unpacked group beside
      the model. The argument is then as it was.
  """
  params = model.params
  if not isinstance(params, PackedParams):
    return model
  groups = packed.groups(model.config)
  stored = {name: params.stored(name) for name in groups}
  largest = max(map(_num_bytes, stored.values()))
  device_memory.require(
    largest, "unpacking: a second copy of a part of the model"
  )
  # The codes that it was made of are there.
  _delete(params.table)
  flat: dict[Path, jax.Array] = {}
  for name, paths in groups.items():
    source = stored.pop(name)
    made = _unpack_group(
      source, model.config, name, *_unpacked_to(params, name)
    )
    flat.update(zip(paths, jax.block_until_ready(made), strict=True))
    _delete(source)
  tree = flax.traverse_util.unflatten_dict(flat)
  return dataclasses.replace(model, params=tree)


def tensor(model: Model, path: Path, layer: int) -> jax.Array | QuantizedMatrix:
  """Returns one tensor of a model, packed or not, as the tree has it.

  Args:
    model: the model.
    path: of a leaf of the parameter tree.
    layer: which layer of a stacked leaf; anything else has only layer 0.
  """
  if not isinstance(model.params, PackedParams):
    stacked = path[0] == "layers"
    leaf = flax.traverse_util.flatten_dict(model.params)[path]
    return jax.tree.map(lambda x: x[layer], leaf) if stacked else leaf
  return _tensor(model.params, np.int32(layer), model.config, path)


def _checked_num_ctas(num_ctas: int | None) -> int:
  device = device_memory.default_device()
  sms = device.core_count if device.platform == "gpu" else None
  if num_ctas is None:
    if sms is None:
      raise RequestError(
        f"num_ctas must be given: the default device, {device}, is not a GPU"
        " whose SMs could be counted"
      )
    return sms
  prompts.check_count("num_ctas", num_ctas, at_least=1)
  if sms is not None and num_ctas > sms:
    # All CTAs wait for each other, so all must run at once.
    raise RequestError(f"num_ctas={num_ctas} is more than {device}'s {sms} SMs")
  return int(num_ctas)


def _extra_bytes(
  config: LlamaConfig, flat: dict[Path, jax.Array], num_ctas: int
) -> int:
  """Returns how much more memory packing takes at its peak than the model."""
  most = grown = 0
  for name, paths in packed.groups(config).items():
    sources = tuple(flat[path] for path in paths)
    made = jax.eval_shape(
      functools.partial(
        _pack_group, config=config, name=name, num_ctas=num_ctas
      ),
      sources,
    )
    made_bytes = _num_bytes(made)
    if _needs_table(paths, sources):
      table = functools.partial(_pack_table, config=config, num_ctas=num_ctas)
      made_bytes += _num_bytes(jax.eval_shape(table, sources[0]))
    most = max(most, grown + made_bytes)
    grown += made_bytes - _num_bytes(sources)
  return most


def _num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _delete(tree: Any) -> None:
  for array in jax.tree.leaves(tree):
    if isinstance(array, jax.Array):
      array.delete()


def _unpacked_to(params: PackedParams, name: str) -> tuple[Any, ...]:
  """Returns what `_unpack_group` has to know of a group, all static."""
  return params.norm_dtypes, *params.formats_of(name)


def _needs_table(paths: tuple[Path, ...], sources: tuple[Any, ...]) -> bool:
  """Returns whether a group is an embedding that is quantised."""
  is_embedding = paths[0][0] == "embed_tokens"
  return is_embedding and isinstance(sources[0], QuantizedMatrix)


@functools.partial(jax.jit, static_argnames=("config", "num_ctas"))
def _pack_table(
  embedding: QuantizedMatrix, config: LlamaConfig, num_ctas: int
) -> jax.Array:
  return packed.pack_table(config, num_ctas, embedding)


@functools.partial(jax.jit, static_argnames=("config", "name", "num_ctas"))
def _pack_group(
  sources: tuple[Any, ...], config: LlamaConfig, name: str, num_ctas: int
) -> Any:
  if name == "norms":
    return _pack_norms(config, *sources)
  if name == "embedding" and isinstance(sources[0], QuantizedMatrix):
    # It stays as it is. Copied: the source will be deleted.
    return jax.tree.map(jnp.copy, sources[0])
  pack_one = functools.partial(packed.pack_matrices, config, name, num_ctas)
  if name in ("lm_head", "embedding"):
    return pack_one(sources)
  # One layer after another: temporary arrays are of one layer.
  if not isinstance(sources[0], QuantizedMatrix):
    return jax.lax.map(pack_one, sources)
  return _chunks(jax.lax.map(lambda x: _bits(pack_one(x)), sources))


def _bits(tree: Any) -> Any:
  """Returns chunks as uint16: loops may change codes that are NaNs as bfloat16."""
  return jax.tree.map(
    lambda x: (
      jax.lax.bitcast_convert_type(x, jnp.uint16)
      if x.dtype == jnp.bfloat16
      else x
    ),
    tree,
  )


def _chunks(tree: Any) -> Any:
  """Undoes `_bits`."""
  return jax.tree.map(
    lambda x: (
      jax.lax.bitcast_convert_type(x, jnp.bfloat16)
      if x.dtype == jnp.uint16
      else x
    ),
    tree,
  )


def _pack_norms(
  config: LlamaConfig, first: jax.Array, second: jax.Array, final: jax.Array
) -> jax.Array:
  layers = jnp.stack([x.astype(jnp.float32) for x in (first, second)], axis=1)
  rows = [layers.reshape(-1, config.hidden_size), final[None]]
  joined = jnp.concatenate([x.astype(jnp.float32) for x in rows])
  width = packed.geometry_of(config).padded_hidden_size
  return jnp.pad(joined, ((0, 0), (0, width - config.hidden_size)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _unpack_group(
  source: Any,
  config: LlamaConfig,
  name: str,
  norm_dtypes: tuple[str, ...],
  format: Format | None = None,
  chunk_format: formats.Format = formats.BF16,
) -> tuple[Any, ...]:
  if name == "norms":
    rows = source[:, : config.hidden_size]
    parts = (rows[:-1:2], rows[1::2], rows[-1])
    return tuple(x.astype(d) for x, d in zip(parts, norm_dtypes, strict=True))
  if isinstance(source, QuantizedMatrix):
    return (jax.tree.map(jnp.copy, source),)
  if name in ("lm_head", "embedding"):
    return packed.unpack_matrices(config, name, source, format, chunk_format)
  if format is None:
    return jax.lax.map(
      lambda x: packed.unpack_matrices(config, name, x), source
    )
  return jax.lax.map(
    lambda x: packed.unpack_matrices(
      config, name, _chunks(x), format, chunk_format
    ),
    _bits(source),
  )


@functools.partial(jax.jit, static_argnames=("config", "path"))
def _tensor(
  params: PackedParams, layer: jax.Array, config: LlamaConfig, path: Path
) -> Any:
  (name,) = (k for k, paths in packed.groups(config).items() if path in paths)
  source = params.stored(name)
  stacked = path[0] == "layers"
  if name in packed.LAYER_GROUPS:
    # Only the layer that is wanted.
    source = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1),
      source,
    )
    layer = jnp.zeros_like(layer)
  made = _unpack_group(source, config, name, *_unpacked_to(params, name))
  leaf = made[packed.groups(config)[name].index(path)]
  if not stacked:
    return leaf
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), leaf
  )
