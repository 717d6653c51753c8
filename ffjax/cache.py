"""The key/value cache, shared by every implementation.

The layout puts the tokens of one KV head next to each other, so that a tile of
keys is one contiguous piece of memory for the kernel that streams it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ffjax import device_memory
from ffjax.config import LlamaConfig

# Capacities are multiples of this, so that calls of similar length share one
# compilation and a kernel's tile of keys never straddles the end.
SLOT_MULTIPLE = 64


@struct.dataclass
class KVCache:
  """Keys (after rope) and values of all tokens so far.

  Attributes:
    k: `[L, B, K, S, H]`, in the implementation's cache dtype.
    v: `[L, B, K, S, H]`, likewise.
    lengths: `[B]` int32; sequence b owns slots `[0, lengths[b])`, and what
      lies beyond never matters.
  """

  k: jax.Array
  v: jax.Array
  lengths: jax.Array

  @property
  def capacity(self) -> int:
    """S, the number of token slots of each sequence."""
    return self.k.shape[3]

  @classmethod
  def create(
    cls,
    config: LlamaConfig,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
  ) -> "KVCache":
    """Makes an empty cache.

    Args:
      config: the model.
      batch: B, number of sequences.
      capacity: S, token slots of each sequence.
      dtype: dtype of keys and values.
    """
    shape = (
      config.num_hidden_layers,
      batch,
      config.num_key_value_heads,
      capacity,
      config.head_dim,
    )
    return cls(
      k=jnp.zeros(shape, dtype),
      v=jnp.zeros(shape, dtype),
      lengths=jnp.zeros((batch,), jnp.int32),
    )


def rounded_capacity(num_tokens: int) -> int:
  """Returns the smallest capacity that holds `num_tokens` tokens."""
  return -(-num_tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE


def check_fits(
  config: LlamaConfig,
  batch: int,
  capacity: int,
  dtype: jax.typing.DTypeLike,
) -> None:
  """Raises before an allocation that the device's free memory cannot hold.

  Raises:
    RequestError: with the sizes, if the cache is larger than what is free.
  """
  per_token_bytes = config.kv_bytes_per_token(np.dtype(dtype).itemsize)
  device_memory.require(
    batch * capacity * per_token_bytes,
    f"a KV cache for {batch} x {capacity} tokens",
  )
