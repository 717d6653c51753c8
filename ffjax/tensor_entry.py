"""One tensor in a checkpoint file, readable in blocks of rows.

Up the flow: `ffjax.safetensors_file`, `ffjax.quantized_file` and
`ffjax.gguf_file` make entries; down the flow: `ffjax.checkpoint` copies them,
block by block, into the stacked parameters. An entry holds no data, so a list
of them costs nothing.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from ffjax.quantized import QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class StoredBits:
  """A quantised matrix in its own bits, not yet read.

  Attributes:
    shapes: the matrix as `jax.ShapeDtypeStruct`s.
    read: returns the matrix, as NumPy arrays. Raises `CheckpointError` if the
      file no longer holds the bytes, or they are no matrix of its format.
  """

  shapes: QuantizedMatrix
  read: Callable[[], QuantizedMatrix]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
  """A tensor under its Hugging Face name, not yet read.

  Attributes:
    name: Hugging Face name, for example `model.norm.weight`.
    shape: shape in elements, Hugging Face order (`[out, in]` for a matrix).
    dtype: dtype of the arrays that `read` returns; quantised tensors are
      dequantised and read as float32.
    path: file that holds the tensor, for messages.
    read: `read(start, stop)` returns rows `[start, stop)` of the first axis as
      a new or read-only array `[stop - start, *shape[1:]]`. Raises
      `CheckpointError` if the file no longer holds the bytes.
    stored_as: what the file calls the tensor's type, for messages.
    is_quantized: whether `read` dequantises.
    bits: of a quantised matrix whose format ffjax has, else None.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  path: pathlib.Path
  read: Callable[[int, int], np.ndarray]
  stored_as: str
  is_quantized: bool = False
  bits: StoredBits | None = None
