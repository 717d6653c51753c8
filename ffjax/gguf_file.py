"""GGUF files of the Llama architecture as Hugging Face tensors.

Up the flow: `ffjax.gguf_header` finds the bytes and `ffjax.gguf_config` reads
the metadata; down the flow: `ffjax.checkpoint` checks names and shapes against
the config and stacks the tensors. Rows are read, and dequantised by the `gguf`
package, only when asked for. A tensor that is not understood is an error.

Source: key and tensor names are those of the GGUF specification
(`docs/gguf.md` of the ggml project).
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ffjax import gguf_bits
from ffjax.errors import CheckpointError
from ffjax.gguf_config import config_from_header
from ffjax.gguf_header import StoredTensor, read_header
from ffjax.quantized import QuantizedMatrix
from ffjax.tensor_entry import StoredBits, TensorEntry

_MODEL_TENSORS = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER_MODULES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An opened GGUF file; no tensor has been read yet.

  Attributes:
    config: what a Hugging Face `config.json` of the model would say.
    entries: the tensors under their Hugging Face names. q and k rows come in
      Hugging Face order, not in the file's.
    tokenizer_metadata: every `tokenizer.*` key, for
      `ffjax.gguf_tokenizer.tokenizer_from_gguf`.
  """

  config: dict[str, Any]
  entries: list[TensorEntry]
  tokenizer_metadata: dict[str, Any]


def open_gguf(path: str | pathlib.Path) -> GgufFile:
  """Opens a GGUF file of architecture `llama`.

  Args:
    path: one whole file; parts of a split one are not supported.

  Raises:
    CheckpointError: the file is missing, damaged or holds tensors that are not
      supported, or the `gguf` package is missing.
    ConfigError: the metadata describes a model that is not supported.
  """
  path = pathlib.Path(path)
  try:
    import gguf
  except ImportError as error:
    raise CheckpointError(
      f"{path}: GGUF files need another package: pip install 'ffjax[gguf]'"
    ) from error
  block_sizes = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items()}
  state = _file_state(path)
  header = read_header(path, block_sizes)
  rope_factors = None
  for tensor in header.tensors:
    if tensor.name == _ROPE_FACTORS:
      rope_factors = _Rows(path, state, tensor, None).read(0, tensor.shape[0])
  config = config_from_header(path, header, rope_factors)
  heads = {
    "attn_q": config["num_attention_heads"],
    "attn_k": config["num_key_value_heads"],
  }
  entries = []
  for tensor in header.tensors:
    if tensor.name == _ROPE_FACTORS:
      continue
    name = _hugging_face_name(path, tensor)
    module = tensor.name.split(".")[-2]
    head_dim = config["head_dim"] if module in heads else None
    if head_dim and tensor.shape[0] != heads[module] * head_dim:
      raise CheckpointError(
        f"{path}: tensor {tensor.name!r} has {tensor.shape[0]} rows, not"
        f" {heads[module]} heads of {head_dim}"
      )
    rows = _Rows(path, state, tensor, head_dim)
    entries.append(rows.entry(name))
  tokenizer_metadata = {
    key: value
    for key, value in header.metadata.items()
    if key.startswith("tokenizer.")
  }
  return GgufFile(config, entries, tokenizer_metadata)


def _hugging_face_name(path: pathlib.Path, tensor: StoredTensor) -> str:
  name = tensor.name
  layer = _LAYER_TENSOR.fullmatch(name)
  if name in _MODEL_TENSORS:
    found, rank = _MODEL_TENSORS[name], 1 if "norm" in name else 2
  elif layer and layer[2] in _LAYER_MODULES:
    is_norm = layer[2].endswith("_norm")
    if is_norm and layer[3] == "bias":
      raise CheckpointError(f"{path}: tensor {name!r} is not supported")
    found = f"model.layers.{layer[1]}.{_LAYER_MODULES[layer[2]]}.{layer[3]}"
    rank = 1 if is_norm or layer[3] == "bias" else 2
  else:
    raise CheckpointError(f"{path}: tensor {name!r} is not supported")
  if len(tensor.shape) != rank:
    raise CheckpointError(
      f"{path}: tensor {name!r} has {len(tensor.shape)} dimensions, not {rank}"
    )
  return found


class _Rows:
  """Reads rows of one tensor.

  Plain reads, not a memory map: a file that shrinks under a map kills the
  process with a bus error, where a short read is a `CheckpointError`.
  """

  def __init__(
    self,
    path: pathlib.Path,
    state: tuple[int, int],
    tensor: StoredTensor,
    head_dim: int | None,
  ):
    """Prepares reading.

    Args:
      path: the file.
      state: what `_file_state` said when the header was read.
      tensor: where the data lies.
      head_dim: rows per head if the rows of each head are stored interleaved.
    """
    self._path = path
    self._state = state
    self._tensor = tensor
    self._head_dim = head_dim
    self._type_name = _type_name(tensor)
    # A vector is read element by element unless blocks tie them together.
    self._convert, self.dtype = _converter(path, tensor)
    is_plain = self._convert is None
    self._num_rows = (
      1 if len(tensor.shape) == 1 and not is_plain else tensor.shape[0]
    )

  def entry(self, name: str) -> TensorEntry:
    """Returns the tensor under its Hugging Face name."""
    tensor = self._tensor
    bits = None
    if len(tensor.shape) == 2 and self._type_name in gguf_bits.TYPES:
      out, columns = tensor.shape
      shapes = gguf_bits.shapes(self._type_name, (out, columns))
      bits = StoredBits(shapes, self._read_bits)
    return TensorEntry(
      name=name,
      shape=tensor.shape,
      dtype=self.dtype,
      path=self._path,
      read=self.read,
      stored_as=self._type_name,
      is_quantized=self._convert is not None,
      bits=bits,
    )

  def _read_bits(self) -> QuantizedMatrix:
    """Returns the whole matrix, rows in Hugging Face order."""
    raw = self._raw(0, self._num_rows)
    if self._head_dim:
      raw = raw[_stored_row(np.arange(self._num_rows), self._head_dim)]
    return gguf_bits.matrix(self._type_name, raw)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Returns rows `[start, stop)` in Hugging Face order."""
    shape = self._tensor.shape
    if not 0 <= start <= stop <= shape[0]:
      raise CheckpointError(
        f"{self._path}: tensor {self._tensor.name!r} has no rows"
        f" {start}:{stop}, only {shape[0]}"
      )
    if start == stop:
      return np.zeros((0, *shape[1:]), self.dtype)
    rows = np.arange(start, stop)
    if self._head_dim:
      rows = _stored_row(rows, self._head_dim)
    if self._num_rows != shape[0]:
      return self._to_dtype(self._raw(0, 1))[0][rows]
    first = int(rows.min())
    raw = self._raw(first, int(rows.max()) + 1)
    # Selecting before converting keeps the dequantised part small.
    if self._head_dim:
      raw = raw[rows - first]
    return self._to_dtype(raw).reshape(stop - start, *shape[1:])

  def _raw(self, start: int, stop: int) -> np.ndarray:
    """Returns stored rows as bytes, `[stop - start, row_bytes]` uint8."""
    tensor = self._tensor
    row_bytes = tensor.size_bytes // self._num_rows
    try:
      if _file_state(self._path) != self._state:
        raise CheckpointError(f"{self._path}: changed while it was being read")
      with self._path.open("rb") as file:
        file.seek(tensor.offset + start * row_bytes)
        raw = file.read((stop - start) * row_bytes)
    except OSError as error:
      raise CheckpointError(f"{self._path}: cannot be read: {error}") from error
    if len(raw) != (stop - start) * row_bytes:
      raise CheckpointError(f"{self._path}: ends inside tensor {tensor.name!r}")
    return np.frombuffer(raw, np.uint8).reshape(stop - start, row_bytes)

  def _to_dtype(self, raw: np.ndarray) -> np.ndarray:
    if self._convert is None:
      return raw.view(self.dtype)
    # Damaged scales may be infinite; that is the data, not worth a warning.
    with np.errstate(all="ignore"):
      return self._convert(raw)


def _type_name(tensor: StoredTensor) -> str:
  import gguf

  return gguf.GGMLQuantizationType(tensor.type_id).name


def _converter(
  path: pathlib.Path, tensor: StoredTensor
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, np.dtype]:
  """Returns the dequantiser of a tensor, None if stored plainly, and dtype."""
  import gguf

  types = gguf.GGMLQuantizationType
  quantisation = types(tensor.type_id)
  plain = {
    types.F32: np.dtype("<f4"),
    types.F16: np.dtype("<f2"),
    types.BF16: np.dtype(ml_dtypes.bfloat16),
  }
  if quantisation in plain:
    return None, plain[quantisation]

  def convert(raw: np.ndarray) -> np.ndarray:
    return gguf.dequantize(raw, quantisation)

  # The package has no list of what it can dequantise, so try one block.
  block_bytes = gguf.GGML_QUANT_SIZES[quantisation][1]
  try:
    with np.errstate(all="ignore"):
      convert(np.zeros((1, block_bytes), np.uint8))
  except NotImplementedError as error:
    raise CheckpointError(
      f"{path}: tensor {tensor.name!r} has the type {quantisation.name}, which"
      " is not supported"
    ) from error
  return convert, np.dtype(np.float32)


def _stored_row(row: np.ndarray, head_dim: int) -> np.ndarray:
  """Returns where the file keeps a row of q or k.

  Hugging Face rotates row `i` of a head with row `i + head_dim // 2`; the file
  keeps such pairs next to each other.
  """
  head, within = np.divmod(row, head_dim)
  half, pair = np.divmod(within, head_dim // 2)
  return head * head_dim + 2 * pair + half


def _file_state(path: pathlib.Path) -> tuple[int, int]:
  try:
    stat = path.stat()
  except OSError as error:
    raise CheckpointError(f"{path}: cannot be read: {error}") from error
  return stat.st_size, stat.st_mtime_ns
