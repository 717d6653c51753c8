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

from ffjax import device_memory
from ffjax import model as model_lib
from ffjax.config import LlamaConfig
from ffjax.errors import RequestError
from ffjax.packed import PackedParams
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

    bfloat16 if every matrix is bfloat16, else float32: float16 weights have
    the bits but not the range that activations need.
    """
    if self.matrix_dtypes == {np.dtype(jnp.bfloat16)}:
      return np.dtype(jnp.bfloat16)
    return np.dtype(np.float32)

  @property
  def matrix_dtypes(self) -> frozenset[np.dtype]:
    """Dtypes of the matrices, which norms and biases do not count among."""
    if isinstance(self.params, PackedParams):
      return frozenset({np.dtype(self.params.qkv.dtype)})
    flat = flax.traverse_util.flatten_dict(self.params)
    return frozenset(
      np.dtype(array.dtype)
      for path, array in flat.items()
      if array.ndim == (3 if path[0] == "layers" else 2)
    )

  def leaf_dtype(self, path: tuple[str, ...]) -> np.dtype:
    """Returns the dtype of a leaf, by its path in the parameter tree."""
    if not isinstance(self.params, PackedParams):
      return np.dtype(flax.traverse_util.flatten_dict(self.params)[path].dtype)
    return self.params.leaf_dtype(path)

  def weight_bytes_per_step(self, batch: int = 1) -> int:
    """Returns the weight bytes that one decode step must read, as stored.

    What a packed model is padded with does not count.
    """
    total_bytes = 0
    for leaf in leaves(self.config):
      leaf_bytes = math.prod(leaf.shape) * self.leaf_dtype(leaf.path).itemsize
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


def random_model(
  config: LlamaConfig, seed: int = 0, dtype: Any = "bfloat16"
) -> Model:
  """Makes a model with random weights on the default device.

  Matrices are normal with standard deviation 0.02, norm weights normal around
  1, so that no parameter can be left out unnoticed.

  Args:
    config: the model.
    seed: the same seed gives the same weights on the same kind of device.
    dtype: float32, bfloat16 or float16.

  Raises:
    RequestError: if the dtype is not supported or the model does not fit.
  """
  dtype = checked_dtype(dtype)
  device_memory.require(
    config.num_params * dtype.itemsize, f"the model as {dtype.name}"
  )
  init = jax.jit(
    functools.partial(model_lib.init_params, config=config, dtype=dtype)
  )
  return Model(params=init(jax.random.key(seed)), config=config)
