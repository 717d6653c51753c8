"""A loaded model, and the one table of parameter names.

The parameter tree's keys are the Hugging Face names without their `model.`
prefix and layer number; a leaf below `layers` stacks that tensor of all
layers, `[L, ...]`.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ffjax import device_memory, quantized
from ffjax import model as model_lib
from ffjax.config import LlamaConfig
from ffjax.errors import RequestError
from ffjax.packed import PackedParams
from ffjax.quantized import (
  FORMATS,
  Format,
  QuantizedMatrix,
  checked_format,
)
from ffjax.text import Tokenizer

DTYPE_NAMES = ("float32", "bfloat16", "float16")


@struct.dataclass
class Model:
  """A config, its parameters, and perhaps a tokenizer; a pytree.

  It can be passed to jitted functions: the parameters are traced, the rest is
  static.

  Attributes:
    params: parameter tree, see the module's docstring; of a model that
      `ffjax.pack` made, its packed form.
    config: the model's sizes and constants.
    tokenizer: turns text into token ids and back, or None.
  """

  params: model_lib.Params | PackedParams
  config: LlamaConfig = struct.field(pytree_node=False)
  tokenizer: Tokenizer | None = struct.field(pytree_node=False, default=None)

  @property
  def dtype(self) -> np.dtype:
    """Dtype of the reference's activations and cache.

    bfloat16 if every matrix is bfloat16 or quantised, else float32: float16
    weights have the bits but not the range that activations need.
    """
    if self.matrix_dtypes <= {np.dtype(jnp.bfloat16)}:
      return np.dtype(jnp.bfloat16)
    return np.dtype(np.float32)

  @property
  def matrix_dtypes(self) -> frozenset[np.dtype]:
    """Dtypes of the matrices that are not quantised.

    Norms and biases do not count as matrices.
    """
    if isinstance(self.params, PackedParams):
      return frozenset({np.dtype(self.params.qkv.dtype)})
    flat = flax.traverse_util.flatten_dict(self.params)
    return frozenset(
      np.dtype(leaf.dtype)
      for path, leaf in flat.items()
      if not isinstance(leaf, QuantizedMatrix)
      and leaf.ndim == (3 if path[0] == "layers" else 2)
    )

  @property
  def formats(self) -> frozenset[Format]:
    """Formats of the matrices that are quantised."""
    if isinstance(self.params, PackedParams):
      return self.params.quantized_to
    return frozenset(
      leaf.format
      for leaf in flax.traverse_util.flatten_dict(self.params).values()
      if isinstance(leaf, QuantizedMatrix)
    )

  def leaf_dtype(self, path: tuple[str, ...]) -> np.dtype:
    """Returns the dtype of a leaf, by its path in the parameter tree.

    That of a quantised matrix is what the reference rounds its weights to.
    """
    if isinstance(self.params, PackedParams):
      return self.params.leaf_dtype(path)
    leaf = flax.traverse_util.flatten_dict(self.params)[path]
    if isinstance(leaf, QuantizedMatrix):
      return self.dtype
    return np.dtype(leaf.dtype)

  def leaf_bytes(self, leaf: "Leaf") -> int:
    """Returns the bytes of a leaf as stored, without what it is padded with."""
    if isinstance(self.params, PackedParams):
      return self.params.leaf_bytes(leaf.path, leaf.shape)
    found = flax.traverse_util.flatten_dict(self.params)[leaf.path]
    if isinstance(found, QuantizedMatrix):
      return found.num_bytes
    return math.prod(leaf.shape) * self.leaf_dtype(leaf.path).itemsize

  def weight_bytes_per_step(self, batch: int = 1) -> int:
    """Returns the weight bytes that one decode step must read, as stored.

    What a packed model is padded with does not count.
    """
    total_bytes = 0
    for leaf in leaves(self.config):
      leaf_bytes = self.leaf_bytes(leaf)
      if leaf.path[0] == "embed_tokens":
        total_bytes += batch * (leaf_bytes // self.config.vocab_size)
        if not self.config.tie_word_embeddings:
          continue
      total_bytes += leaf_bytes
    return total_bytes

  def bytes_per_step(self, batch: int, mean_length: float) -> int:
    """Returns the bytes of weights and cache that a decode step must read.

    Args:
      batch: B, number of sequences.
      mean_length: tokens in the cache, the mean over sequences and steps.
    """
    token_bytes = self.config.kv_bytes_per_token(self.dtype.itemsize)
    cache_bytes = int(batch * mean_length * token_bytes)
    return self.weight_bytes_per_step(batch) + cache_bytes


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of the parameter tree.

  Attributes:
    path: keys from the root.
    shape: shape in elements, with the axis L in front below `layers`.
    names: Hugging Face names of the tensors in it, in order of their layers;
      one name if it is not stacked.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  names: tuple[str, ...]

  @property
  def stacked(self) -> bool:
    """Whether the first axis counts layers."""
    return self.path[0] == "layers"

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each Hugging Face tensor."""
    return self.shape[1:] if self.stacked else self.shape


def leaves(config: LlamaConfig) -> list[Leaf]:
  """Lists the leaves of the parameter tree of `config`, without making any."""
  shapes = jax.eval_shape(
    functools.partial(
      model_lib.init_params, config=config, dtype=np.dtype(np.float32)
    ),
    jax.random.key(0),
  )
  table = []
  for path, shape in flax.traverse_util.flatten_dict(shapes).items():
    if path[0] == "layers":
      below = ".".join(path[1:])
      names = tuple(
        f"model.layers.{layer}.{below}"
        for layer in range(config.num_hidden_layers)
      )
    else:
      prefix = "" if path[0] == "lm_head" else "model."
      names = (prefix + ".".join(path),)
    table.append(Leaf(path=path, shape=shape.shape, names=names))
  return table


def checked_dtype(dtype: Any) -> np.dtype:
  """Returns a dtype that parameters may have.

  Raises:
    RequestError: if it is not float32, bfloat16 or float16.
  """
  try:
    checked = jnp.dtype(dtype)
  except TypeError:
    checked = None
  if checked is None or checked.name not in DTYPE_NAMES:
    raise RequestError(
      f"dtype={dtype!r} is not supported (supported: {', '.join(DTYPE_NAMES)})"
    )
  return checked


def matrix_formats(
  config: LlamaConfig, format_name: str | None, head_format: str | None = None
) -> dict[tuple[str, ...], Format]:
  """Returns the format of every matrix of a quantised model, by its path.

  Args:
    config: the model.
    format_name: a key of `ffjax.quantized.FORMATS`, for the layers' matrices.
    head_format: likewise, of 8-bit integers, for embedding and LM head. None
      for either if they are not quantised, but not for both.

  Raises:
    RequestError: if there is no such format, or a matrix is not made of whole
      groups.
  """
  # None for both is refused as no name of a format.
  of_head = None if head_format is None else checked_format(head_format)
  of_layers = None
  if format_name is not None or of_head is None:
    of_layers = checked_format(format_name)
  if of_head is not None and (of_head.bits != 8 or of_head.is_float):
    raise RequestError(
      f"head_format={head_format!r} is not supported (supported:"
      f" {', '.join(name for name in FORMATS if name.startswith('int8'))})"
    )
  found = {}
  for leaf in leaves(config):
    format = of_layers if leaf.stacked else of_head
    if len(leaf.tensor_shape) != 2 or format is None:
      continue
    columns, multiple = leaf.tensor_shape[-1], format.group_size or 1
    if columns % multiple:
      raise RequestError(
        f"{format.name} takes multiples of {multiple} columns, and"
        f" {leaf.names[0]} has {columns}"
      )
    found[leaf.path] = format
  return found


def check_model(model: object) -> None:
  """Raises a RequestError if that is not a model, but, say, its path."""
  if not isinstance(model, Model):
    kind = type(model).__name__
    raise RequestError(f"model must be what ffjax.load returns, not {kind}")


def random_model(
  config: LlamaConfig,
  seed: int = 0,
  dtype: Any = "bfloat16",
  format_name: str | None = None,
  head_format: str | None = None,
) -> Model:
  """Makes a model with random weights on the default device.

  Matrices are normal with standard deviation 0.02, norm weights normal around
  1, so that no parameter can be left out unnoticed. Quantised matrices are made
  of random codes, so that the model need not fit otherwise.

  Args:
    config: the model.
    seed: the same seed gives the same weights on the same kind of device.
    dtype: float32, bfloat16 or float16; of scales too.
    format_name: format of the layers' matrices, as for `ffjax.quantize`, or
      None.
    head_format: format of embedding and LM head, or None.

  Raises:
    RequestError: if the dtype or a format is not supported, or the model does
      not fit.
  """
  if not isinstance(config, LlamaConfig):
    kind = type(config).__name__
    raise RequestError(f"config must be a LlamaConfig, not {kind}")
  dtype = checked_dtype(dtype)
  formats = {}
  if format_name is not None or head_format is not None:
    formats = matrix_formats(config, format_name, head_format)
  num_bytes = 0
  for leaf in leaves(config):
    format = formats.get(leaf.path)
    if format is None:
      num_bytes += math.prod(leaf.shape) * dtype.itemsize
    else:
      entry_bytes = dtype.itemsize + (not format.symmetric)
      num_bytes += format.num_bytes(leaf.shape, entry_bytes)
  device_memory.require(num_bytes, f"the model as {format_name or dtype.name}")

  def plain(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    tree = model_lib.init_params(key, config, dtype)
    flat = flax.traverse_util.flatten_dict(tree)
    # What is not returned is not made.
    return {path: x for path, x in flat.items() if path not in formats}

  flat: dict[tuple[str, ...], Any] = jax.jit(plain)(jax.random.key(seed))
  for leaf in leaves(config):
    if leaf.path in formats:
      key = jax.random.fold_in(jax.random.key(seed), len(flat))
      flat[leaf.path] = quantized.random_matrix(
        key, leaf.shape, formats[leaf.path], dtype
      )
  return Model(params=flax.traverse_util.unflatten_dict(flat), config=config)
