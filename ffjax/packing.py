"""Packs a model for the fused kernel, and unpacks it again.

The weights are on the device once, before and after: a group of matrices is
packed, layer by layer into an array that is there from the start, then its
source is deleted, then comes the next group. The largest group is the first, when
least has grown by padding and what does not fit has not cost the model. The
table of a quantised embedding is made, and counted, with the embedding's group.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ffjax import device_memory, packed, prompts
from ffjax.config import LlamaConfig
from ffjax.errors import RequestError
from ffjax.packed import PackedParams, Path
from ffjax.params import Model, check_model
from ffjax.quantized import Format, QuantizedMatrix
from pallas_kernels import formats, geometry

# Temporary arrays for a layer take at most this many times what it takes packed.
_TEMPORARY_LAYERS = 3


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
      count, or its memory does not hold the largest group, packed, beside the
      model. The argument is then as it was.
  """
  check_model(model)
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
  sources = {
    name: tuple(flat[path] for path in paths) for name, paths in groups.items()
  }
  # Of each group, and of the table if it is made of it.
  shapes = {
    name: (
      packed_shapes(parts, model.config, name, p),
      _table_shape(groups[name], parts, model.config, p),
    )
    for name, parts in sources.items()
  }
  what = "packing: a part of the model twice, and padding"
  device_memory.require(_extra_bytes(model.config, sources, shapes), what)
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
  for name in _largest_first(shapes):
    parts = sources.pop(name)
    group_shapes, table = shapes[name]
    if table is not None:
      # Waited for: the group reads the same source, which may be on the host.
      fields["table"] = jax.block_until_ready(
        _pack_table(parts[0], model.config, p)
      )
    made = _pack_group(parts, group_shapes, model.config, name, p)
    if isinstance(made, tuple):
      made, scales[name] = made
    fields[name] = jax.block_until_ready(made)
    _delete(_not_among(parts, sources))
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
  check_model(model)
  params = model.params
  if not isinstance(params, PackedParams):
    return model
  groups = packed.groups(model.config)
  stored = {name: params.stored(name) for name in groups}
  unpacked = {name: _Group.of(params, model.config, name) for name in groups}
  shapes = {
    name: _unpacked_shapes(source, unpacked[name])
    for name, source in stored.items()
  }
  what = "unpacking: a second copy of a part of the model"
  device_memory.require(_extra_bytes(model.config, stored, shapes), what)
  flat: dict[Path, jax.Array] = {}
  for name in _largest_first(shapes):
    source = stored.pop(name)
    made = _unpack_group(source, shapes[name], unpacked[name])
    flat.update(zip(groups[name], jax.block_until_ready(made), strict=True))
    _delete(source)
    if packed.EMBEDDING_PATH in groups[name]:
      # The codes that it was made of are there.
      _delete(params.table)
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


def _largest_first(shapes: Mapping[str, Any]) -> list[str]:
  """Returns the names of groups, that of the most bytes first."""
  return sorted(shapes, key=lambda name: -_num_bytes(shapes[name]))


def _extra_bytes(
  config: LlamaConfig, sources: Mapping[str, Any], shapes: Mapping[str, Any]
) -> int:
  """Returns how much more memory a conversion takes at its peak than the model.

  Args:
    config: the model.
    sources: of each group.
    shapes: what they are made into.
  """
  left = dict(sources)
  most = grown = 0
  for name in _largest_first(shapes):
    made_bytes = _num_bytes(shapes[name])
    leaves = jax.tree.leaves(left.pop(name))
    on_host = [x for x in leaves if isinstance(x, np.ndarray)]
    # Host arrays come to the device for as long as they are read.
    temporary = _num_bytes(on_host)
    if name in packed.LAYER_GROUPS:
      temporary += _TEMPORARY_LAYERS * max(made_bytes, _num_bytes(leaves))
      temporary //= config.num_hidden_layers
    most = max(most, grown + made_bytes + temporary)
    freed = [
      x for x in _not_among(leaves, left) if not isinstance(x, np.ndarray)
    ]
    grown += made_bytes - _num_bytes(freed)
  return most


def _num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _not_among(tree: Any, others: Any) -> list[Any]:
  """Returns the arrays of a tree that others do not have, too.

  The same array may be the embedding and the LM head.
  """
  ids = {id(x) for x in jax.tree.leaves(others)}
  return [x for x in jax.tree.leaves(tree) if id(x) not in ids]


def _delete(tree: Any) -> None:
  for array in jax.tree.leaves(tree):
    if isinstance(array, jax.Array):
      array.delete()


@dataclasses.dataclass(frozen=True)
class _Group:
  """A group of a packed model; all of it is static where it is unpacked.

  Attributes:
    config: the model.
    name: of the group.
    norm_dtypes: see `PackedParams`.
    format: what its matrices were quantised to, or None.
    chunk_format: how the kernel has them.
  """

  config: LlamaConfig
  name: str
  norm_dtypes: tuple[str, ...]
  format: Format | None
  chunk_format: formats.Format

  @classmethod
  def of(cls, params: PackedParams, config: LlamaConfig, name: str) -> "_Group":
    """Returns a group by its name."""
    return cls(config, name, params.norm_dtypes, *params.formats_of(name))

  def matrices(self, chunks: Any) -> tuple[Any, ...]:
    """Unpacks chunks, of one layer if layers have them."""
    return packed.unpack_matrices(
      self.config, self.name, chunks, self.format, self.chunk_format
    )


def _table_shape(
  paths: tuple[Path, ...],
  sources: tuple[Any, ...],
  config: LlamaConfig,
  num_ctas: int,
) -> jax.ShapeDtypeStruct | None:
  """Returns the shape of the table, if a group is a quantised embedding."""
  if packed.EMBEDDING_PATH not in paths:
    return None
  (embedding,) = sources
  if not isinstance(embedding, QuantizedMatrix):
    return None
  make = functools.partial(packed.pack_table, config, num_ctas)
  return jax.eval_shape(make, embedding)


@functools.partial(jax.jit, static_argnames=("config", "num_ctas"))
def _pack_table(
  embedding: QuantizedMatrix, config: LlamaConfig, num_ctas: int
) -> jax.Array:
  return packed.pack_table(config, num_ctas, embedding)


def packed_shapes(
  sources: tuple[Any, ...], config: LlamaConfig, name: str, num_ctas: int
) -> Any:
  """Returns the shapes of a group as `PackedParams` has it: chunks, or a pair.

  Args:
    sources: the group's leaves, or their shapes.
    config: the model.
    name: of the group.
    num_ctas: P.
  """
  if name not in packed.LAYER_GROUPS:
    whole = functools.partial(
      _pack_whole, config=config, name=name, num_ctas=num_ctas
    )
    return jax.eval_shape(whole, sources)
  return _stacked_shapes(
    config,
    lambda parts: packed.pack_matrices(config, name, num_ctas, parts),
    sources,
  )


def _unpacked_shapes(source: Any, group: _Group) -> tuple[Any, ...]:
  """Returns the shapes of a group's leaves in the tree."""
  if group.name not in packed.LAYER_GROUPS:
    return jax.eval_shape(lambda x: _unpack_whole(x, group), source)
  return _stacked_shapes(group.config, group.matrices, source)


def _stacked_shapes(config: LlamaConfig, function: Any, stacks: Any) -> Any:
  """Returns the shapes of what a function makes of each layer, stacked."""
  one = jax.eval_shape(
    function,
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacks),
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (config.num_hidden_layers, *x.shape), x.dtype
    ),
    one,
  )


def _pack_group(
  sources: tuple[Any, ...],
  shapes: Any,
  config: LlamaConfig,
  name: str,
  num_ctas: int,
) -> Any:
  """Packs a group, whose `packed_shapes` are known."""
  static: dict[str, Any] = dict(config=config, name=name, num_ctas=num_ctas)
  if name not in packed.LAYER_GROUPS:
    return _pack_whole(sources, **static)
  made = device_memory.zeros(shapes, "packing")
  for layer in range(config.num_hidden_layers):
    parts = _on_device(sources, layer)
    # Or later calls, and their temporary arrays, may begin before it ends.
    made = jax.block_until_ready(
      _pack_layer(made, parts, np.int32(layer), **static)
    )
  return made


@functools.partial(jax.jit, static_argnames=("config", "name", "num_ctas"))
def _pack_whole(
  sources: tuple[Any, ...], config: LlamaConfig, name: str, num_ctas: int
) -> Any:
  if name == "norms":
    return _pack_norms(config, *sources)
  if name == "embedding" and isinstance(sources[0], QuantizedMatrix):
    # It stays as it is. Copied: the source will be deleted.
    return jax.tree.map(jnp.copy, sources[0])
  return packed.pack_matrices(config, name, num_ctas, sources)


@functools.partial(
  jax.jit,
  static_argnames=("config", "name", "num_ctas"),
  donate_argnames=("made",),
)
def _pack_layer(
  made: Any,
  sources: tuple[Any, ...],
  layer: jax.Array,
  *,
  config: LlamaConfig,
  name: str,
  num_ctas: int,
) -> Any:
  """Packs one layer in its place."""
  one = packed.pack_matrices(config, name, num_ctas, _layer(sources, layer))
  return _with_layer(made, one, layer)


def _on_device(tree: Any, layer: int) -> Any:
  """Returns arrays of which `_layer` will be asked for that layer only.

  Of host arrays it is all there is, so that the device never holds the others.
  """
  return jax.tree.map(
    lambda x: x[layer : layer + 1] if isinstance(x, np.ndarray) else x, tree
  )


def _layer(tree: Any, layer: jax.Array) -> Any:
  """Returns one layer of stacks; of a stack of one, that one."""
  return jax.tree.map(
    lambda x: _like(
      x,
      jax.lax.dynamic_index_in_dim(
        _bits(x), jnp.minimum(layer, x.shape[0] - 1), keepdims=False
      ),
    ),
    tree,
  )


def _with_layer(stacks: Any, one: Any, layer: jax.Array) -> Any:
  """Returns stacks with one layer written, in place if they are donated."""
  return jax.tree.map(
    lambda x, y: _like(
      x,
      jax.lax.dynamic_update_index_in_dim(_bits(x), _bits(y), layer, axis=0),
    ),
    stacks,
    one,
  )


def _bits(x: jax.Array) -> jax.Array:
  """Returns bfloat16 as uint16: what moves bfloat16 may move float32 instead.

  That is how older XLA changes codes that are NaNs as bfloat16.
  """
  if x.dtype != jnp.bfloat16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _like(x: jax.Array, bits: jax.Array) -> jax.Array:
  """Undoes `_bits` for what is to be of the dtype of x."""
  return jax.lax.bitcast_convert_type(bits, x.dtype)


def _pack_norms(
  config: LlamaConfig, first: jax.Array, second: jax.Array, final: jax.Array
) -> jax.Array:
  layers = jnp.stack([x.astype(jnp.float32) for x in (first, second)], axis=1)
  rows = [layers.reshape(-1, config.hidden_size), final[None]]
  joined = jnp.concatenate([x.astype(jnp.float32) for x in rows])
  width = packed.geometry_of(config).padded_hidden_size
  return jnp.pad(joined, ((0, 0), (0, width - config.hidden_size)))


def _unpack_group(source: Any, shapes: Any, group: _Group) -> tuple[Any, ...]:
  """Undoes `_pack_group`."""
  if group.name not in packed.LAYER_GROUPS:
    return _unpack_whole(source, group)
  made = device_memory.zeros(shapes, "unpacking")
  for layer in range(group.config.num_hidden_layers):
    parts = _on_device(source, layer)
    made = jax.block_until_ready(
      _unpack_layer(made, parts, np.int32(layer), group)
    )
  return made


@functools.partial(jax.jit, static_argnames="group")
def _unpack_whole(source: Any, group: _Group) -> tuple[Any, ...]:
  if group.name == "norms":
    rows = source[:, : group.config.hidden_size]
    parts = (rows[:-1:2], rows[1::2], rows[-1])
    return tuple(
      x.astype(d) for x, d in zip(parts, group.norm_dtypes, strict=True)
    )
  if isinstance(source, QuantizedMatrix):
    return (jax.tree.map(jnp.copy, source),)
  return group.matrices(source)


@functools.partial(jax.jit, static_argnames="group", donate_argnames=("made",))
def _unpack_layer(
  made: tuple[Any, ...], source: Any, layer: jax.Array, group: _Group
) -> tuple[Any, ...]:
  """Unpacks one layer in its place."""
  return _with_layer(made, group.matrices(_layer(source, layer)), layer)


@functools.partial(jax.jit, static_argnames=("config", "path"))
def _tensor(
  params: PackedParams, layer: jax.Array, config: LlamaConfig, path: Path
) -> Any:
  (name,) = (k for k, paths in packed.groups(config).items() if path in paths)
  index = packed.groups(config)[name].index(path)
  source, group = params.stored(name), _Group.of(params, config, name)
  if name in packed.LAYER_GROUPS:
    # Only the layer that is wanted.
    return group.matrices(_layer(source, layer))[index]
  leaf = _unpack_whole(source, group)[index]
  return _layer(leaf, layer) if path[0] == "layers" else leaf
