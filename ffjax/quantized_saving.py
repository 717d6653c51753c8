"""Quantised matrices as the tensors that compressed-tensors has for them.

Up the flow: `ffjax.saving` saves a model; `ffjax.quantized_file` reads the
same tensors back, with the same codes.

Source: the layouts `pack-quantized` and `float-quantized` of the
compressed-tensors project.
"""

import functools
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ffjax import packing
from ffjax.errors import CheckpointError
from ffjax.params import Leaf, Model, leaves
from ffjax.quantized import QuantizedMatrix, pack_codes, unpack_codes


def quantization_config(model: Model) -> dict[str, Any] | None:
  """Returns what `config.json` says of how a model is quantised, or None.

  Raises:
    CheckpointError: if compressed-tensors cannot say it, or if ffjax would not
      read it again.
  """
  if not model.formats:
    return None
  found = []
  ordered = False
  for leaf in leaves(model.config):
    # What it is, without unpacking it: of its shapes and dtypes.
    matrix = jax.eval_shape(
      functools.partial(packing.tensor, model, leaf.path, 0)
    )
    quantised = isinstance(matrix, QuantizedMatrix)
    if quantised != (leaf.stacked and len(leaf.tensor_shape) == 2):
      raise _error(
        f"{leaf.names[0]} is {'' if quantised else 'not '}quantised: all"
        " matrices of the layers and no others can be saved quantised"
      )
    if isinstance(matrix, QuantizedMatrix):
      found.append(leaf)
      ordered |= matrix.columns is not None
      if matrix.minimums is not None:
        raise _error("its values have minimums (Q4_1), not zero points")
  if len(model.formats) > 1:
    names = " and ".join(sorted(format.name for format in model.formats))
    raise _error(f"matrices are {names}: all must have one format")
  (format,) = model.formats
  if not format.symmetric and any(
    _largest_zero(model, leaf) > 15 for leaf in found
  ):
    raise _error("a zero point is 16, and it takes 0 to 15")
  layout = "float-quantized" if format.is_float else "pack-quantized"
  weights = {
    "actorder": "group" if ordered else None,
    "block_structure": None,
    "dynamic": False,
    "group_size": format.group_size,
    "num_bits": format.bits,
    "strategy": "group" if format.group_size else "channel",
    "symmetric": format.symmetric,
    "type": "float" if format.is_float else "int",
  }
  return {
    "config_groups": {
      "group_0": {
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
      }
    },
    "format": layout,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
  }


def _largest_zero(model: Model, leaf: Leaf) -> int:
  """Returns the largest zero point of all layers of a matrix that has them."""
  found = []
  for layer in range(len(leaf.names)):
    matrix = packing.tensor(model, leaf.path, layer)
    assert isinstance(matrix, QuantizedMatrix)
    assert matrix.zeros is not None
    found.append(int(np.max(matrix.zeros)))
  return max(found)


def _error(message: str) -> CheckpointError:
  return CheckpointError(f"a model cannot be saved as it is: {message}")


def tensors(name: str, matrix: QuantizedMatrix) -> dict[str, np.ndarray]:
  """Returns the tensors of one matrix by their names.

  Args:
    name: Hugging Face name of the matrix, `MODULE.weight`.
    matrix: `[out, in]`, of a model that `quantization_config` takes.
  """
  out, columns = matrix.shape
  format = matrix.format
  codes = np.asarray(matrix.codes)
  found = {}
  if matrix.columns is not None:
    order = np.asarray(matrix.columns)
    stored_at = np.argsort(order)
    codes = unpack_codes(codes, format)[:, stored_at]
    codes = pack_codes(codes, format)
    assert format.group_size is not None  # Or there is nothing to reorder.
    found["g_idx"] = (stored_at // format.group_size).astype(np.int32)
  scales = np.asarray(matrix.scales)
  if format.is_float:
    found[""] = codes.view(ml_dtypes.float8_e4m3fn)
    found["scale"] = scales
  else:
    if format.bits == 8:
      # From two's complement to 128 more.
      codes = codes ^ np.uint8(0x80)
    found["packed"] = _words(codes)
    found["scale"] = scales
    found["shape"] = np.asarray([out, columns], np.int64)
    if matrix.zeros is not None:
      turned = pack_codes(_padded(np.asarray(matrix.zeros).T, 2), format)
      found["zero_point"] = np.ascontiguousarray(_words(turned).T)
  return {
    f"{name}_{part}" if part else name: array for part, array in found.items()
  }


def _padded(codes: np.ndarray, multiple: int) -> np.ndarray:
  """Appends zeros to rows."""
  return np.pad(codes, ((0, 0), (0, -codes.shape[1] % multiple)))


def _words(as_bytes: np.ndarray) -> np.ndarray:
  """Returns bytes `[rows, n]` as int32, the first byte lowest."""
  padded = np.ascontiguousarray(_padded(as_bytes, 4))
  return padded.view("<i4").astype(np.int32)
