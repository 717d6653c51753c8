"""Rows of GGUF's simplest types as quantised matrices, bit for bit.

Up the flow: `ffjax.gguf_file` reads the rows; down the flow:
`ffjax.checkpoint`. Other types are dequantised by the `gguf` package.

Source: `ggml-quants.c` of the ggml project.
"""

import dataclasses

import jax
import numpy as np

from ffjax.quantized import FORMATS, QuantizedMatrix, pack_codes

_BLOCK = 32
_HALF = np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class _Type:
  """One type: blocks of a scale, perhaps a minimum, and 32 codes.

  Attributes:
    format: name of ours.
    has_minimum: whether there is a minimum.
  """

  format: str
  has_minimum: bool = False


TYPES = {
  "Q4_0": _Type("int4_g32"),
  "Q4_1": _Type("int4_g32_asym", has_minimum=True),
  "Q8_0": _Type("int8_g32"),
}


def shapes(type_name: str, shape: tuple[int, int]) -> QuantizedMatrix:
  """Returns a matrix `shape`, `(out, in)`, as shapes and dtypes."""
  out, columns = shape
  kind = TYPES[type_name]
  format = FORMATS[kind.format]
  scales = jax.ShapeDtypeStruct((out, columns // _BLOCK), _HALF)
  return QuantizedMatrix(
    codes=jax.ShapeDtypeStruct((out, columns * format.bits // 8), np.uint8),
    scales=scales,
    zeros=None,
    minimums=scales if kind.has_minimum else None,
    columns=None,
    format=format,
  )


def matrix(type_name: str, raw: np.ndarray) -> QuantizedMatrix:
  """Returns rows as a matrix of NumPy arrays.

  Args:
    type_name: a key of `TYPES`.
    raw: `[out, row_bytes]` uint8, the rows as stored.
  """
  kind = TYPES[type_name]
  format = FORMATS[kind.format]
  head_bytes = _HALF.itemsize * (1 + kind.has_minimum)
  code_bytes = _BLOCK * format.bits // 8
  blocks = raw.reshape(len(raw), -1, head_bytes + code_bytes)
  head = np.ascontiguousarray(blocks[..., :head_bytes]).view(_HALF)
  codes = blocks[..., head_bytes:]
  if format.bits == 4:
    # Of a block's codes, the first half is in the low nibbles.
    halves = np.concatenate([codes & 15, codes >> 4], axis=-1)
    codes = pack_codes(halves, format)
  return QuantizedMatrix(
    codes=codes.reshape(len(raw), -1),
    scales=np.ascontiguousarray(head[..., 0]),
    zeros=None,
    minimums=np.ascontiguousarray(head[..., 1]) if kind.has_minimum else None,
    columns=None,
    format=format,
  )
