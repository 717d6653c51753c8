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
from pallas_kernels import geometry


def why_not(
  config: LlamaConfig,
  dtypes: Iterable[np.dtype],
  formats: Iterable[Format] = (),
) -> str | None:
  """Says why the kernel cannot take a model, or None if it can.

  Args:
    config: the model.
    dtypes: those of its matrices that are not quantised.
    formats: those of its quantised matrices.
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
  names = sorted(format.name for format in formats)
  if names:
    return f"the kernel does not take {' and '.join(names)} matrices"
  return None


def pack(model: Model, num_ctas: int | None = None) -> Model:
  """Packs a model, so that `implementation="fused"` can run it.

  This consumes the argument: its arrays are deleted one group of matrices
  after another, so that the device never holds two copies of the model. The
  result is a model like any other, of the same bits; `unpack` undoes it.

  Args:
    model: with bfloat16 matrices. One that is packed is returned as it is.
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
  reason = why_not(model.config, model.matrix_dtypes, model.formats)
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
  for name, paths in groups.items():
    sources = tuple(flat.pop(path) for path in paths)
    made = _pack_group(sources, model.config, name, p)
    fields[name] = made.block_until_ready()
    for source in sources:
      # The same array may be the embedding and the LM head.
      if not any(source is other for other in flat.values()):
        _delete(source)
  params = PackedParams(**fields, norm_dtypes=norm_dtypes)
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
  largest = max(getattr(params, name).nbytes for name in groups)
  device_memory.require(
    largest, "unpacking: a second copy of a part of the model"
  )
  flat: dict[Path, jax.Array] = {}
  for name, paths in groups.items():
    source = getattr(params, name)
    made = _unpack_group(source, model.config, name, params.norm_dtypes)
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
    made_bytes = made.size * made.dtype.itemsize
    most = max(most, grown + made_bytes)
    grown += made_bytes - sum(x.nbytes for x in sources)
  return most


def _delete(array: jax.Array | np.ndarray) -> None:
  if isinstance(array, jax.Array):
    array.delete()


@functools.partial(jax.jit, static_argnames=("config", "name", "num_ctas"))
def _pack_group(
  sources: tuple[jax.Array, ...], config: LlamaConfig, name: str, num_ctas: int
) -> jax.Array:
  if name == "norms":
    return _pack_norms(config, *sources)
  pack_one = functools.partial(packed.pack_matrices, config, name, num_ctas)
  if name in ("lm_head", "embedding"):
    return pack_one(sources)
  # One layer after another: temporary arrays are of one layer.
  return jax.lax.map(pack_one, sources)


def _pack_norms(
  config: LlamaConfig, first: jax.Array, second: jax.Array, final: jax.Array
) -> jax.Array:
  layers = jnp.stack([x.astype(jnp.float32) for x in (first, second)], axis=1)
  rows = [layers.reshape(-1, config.hidden_size), final[None]]
  joined = jnp.concatenate([x.astype(jnp.float32) for x in rows])
  width = packed.geometry_of(config).padded_hidden_size
  return jnp.pad(joined, ((0, 0), (0, width - config.hidden_size)))


@functools.partial(jax.jit, static_argnames=("config", "name", "norm_dtypes"))
def _unpack_group(
  source: jax.Array,
  config: LlamaConfig,
  name: str,
  norm_dtypes: tuple[str, ...],
) -> tuple[jax.Array, ...]:
  if name == "norms":
    rows = source[:, : config.hidden_size]
    parts = (rows[:-1:2], rows[1::2], rows[-1])
    return tuple(x.astype(d) for x, d in zip(parts, norm_dtypes, strict=True))
  unpack_one = functools.partial(packed.unpack_matrices, config, name)
  if name in ("lm_head", "embedding"):
    return unpack_one(source)
  return jax.lax.map(unpack_one, source)


@functools.partial(jax.jit, static_argnames=("config", "path"))
def _tensor(
  params: PackedParams, layer: jax.Array, config: LlamaConfig, path: Path
) -> jax.Array:
  (name,) = (k for k, paths in packed.groups(config).items() if path in paths)
  source = getattr(params, name)
  stacked = path[0] == "layers"
  if stacked and name != "norms":
    # Only the layer that is wanted.
    source = jax.lax.dynamic_slice_in_dim(source, layer, 1)
    layer = jnp.zeros_like(layer)
  made = _unpack_group(source, config, name, params.norm_dtypes)
  leaf = made[packed.groups(config)[name].index(path)]
  if not stacked:
    return leaf
  return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
