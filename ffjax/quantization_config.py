"""How the matrices of a Hugging Face directory are quantised, by its config.

Up the flow: `config.json` or the file beside it that GPTQ and AWQ tools write;
down the flow: `ffjax.quantized_file` reads tensors accordingly. A value that
would change the weights and that ffjax does not implement is an error.

Source: the configs of GPTQModel, AutoAWQ and compressed-tensors, as described in
`quantization_config.py` of Hugging Face transformers.
"""

import dataclasses
import os
import pathlib
from typing import Any

from ffjax import json_file
from ffjax.errors import ConfigError

# Older tools write one of these instead of a key in config.json.
_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

# What does not change what the tensors mean: how they were made, what is to run
# them, and which modules are quantised, which the tensors' names say too.
_HARMLESS = frozenset(
  """
  act_group_aware backend batch_size block_name_to_quantize
  cache_block_outputs cache_examples_on_gpu damp_auto_increment damp_percent
  dataset disable_exllama do_fuse exllama_config exllama_version
  fuse_max_seq_len ignore lm_head lm_head_quantized max_input_length meta
  model_file_base_name model_name_or_path model_seqlen
  module_name_preceding_first_block modules_in_block_to_quantize
  modules_to_fuse modules_to_not_convert mse offload_to_disk
  offload_to_disk_path pad_token_id static_groups tokenizer true_sequential
  use_cuda_fp16 use_exllama uuid
  """.split()
)
_HARMLESS_COMPRESSED = frozenset(
  "global_compression_ratio ignore version".split()
)
_HARMLESS_WEIGHTS = frozenset(
  "observer observer_kwargs scale_dtype zp_dtype".split()
)
# Which columns share a scale by their activations, and which only were quantised
# in that order.
_IN_GROUPS = ("group", "dynamic", True)
_IN_ORDER = ("weight", "static", False, None)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """What the tensors of a quantised matrix mean.

  Attributes:
    layout: which tensors there are, and how codes lie in them: `"gptq"`,
      `"awq"`, `"pack-quantized"`, `"int-quantized"` or `"float-quantized"`.
    bits: bits of a code, 4 or 8.
    group_size: neighbours in a row that share a scale; None for a whole row.
    symmetric: whether there are no zero points that matter.
    zero_offset: what to add to a stored zero point.
    ordered: whether a tensor must say which columns share a scale.
  """

  layout: str
  bits: int
  group_size: int | None
  symmetric: bool
  zero_offset: int = 0
  ordered: bool = False


def take_scheme(raw: dict[str, Any], directory: pathlib.Path) -> Scheme | None:
  """Takes what says how weights are quantised out of a config.

  Args:
    raw: the object in `config.json`; the key is removed from it.
    directory: where there may be another file that says it.

  Returns:
    None if the weights are not quantised.

  Raises:
    ConfigError: naming the key that is malformed, or has a value that ffjax
      does not implement.
  """
  source = f"{directory / 'config.json'}: quantization_config"
  found = raw.pop("quantization_config", None)
  method = None
  for name, of_file in _SIDE_FILES.items():
    if found is None and os.path.lexists(directory / name):
      source, method = str(directory / name), of_file
      found = json_file.read_object(directory / name, ConfigError)
  if found is None:
    return None
  if not isinstance(found, dict):
    raise ConfigError(f"{source}: {found!r} must be an object")
  return _Reader(found, source).scheme(method)


class _Reader:
  """Takes keys out of one object; what is left is unknown."""

  def __init__(self, raw: dict[str, Any], source: str):
    self._raw = dict(raw)
    self._source = source

  def _error(self, message: str) -> ConfigError:
    return ConfigError(f"{self._source}: {message}")

  def _only(self, key: str, accepted: tuple[Any, ...], default: Any) -> Any:
    """Takes a value, which must be one of those that are implemented."""
    value = self._raw.pop(key, default)
    value = value.lower() if isinstance(value, str) else value
    # Not `in`, to which 1 is True.
    if not any(value == x and type(value) is type(x) for x in accepted):
      raise self._error(
        f"{key}={value!r} is not supported (supported:"
        f" {', '.join(map(repr, accepted))})"
      )
    return value

  def _group_size(self, key: str, default: Any = None) -> int | None:
    value = self._raw.pop(key, default)
    if value in (None, -1):
      return None
    if type(value) is not int or value < 32 or value % 32:
      raise self._error(
        f"{key}={value!r} is not supported (supported: multiples of 32, and -1"
        " for whole rows)"
      )
    return value

  def _end(self, harmless: frozenset[str]) -> None:
    for key, value in self._raw.items():
      if key in harmless or value is None or value is False:
        continue
      if value in ("", [], {}):
        continue
      raise self._error(
        f"{key}={value!r} is not supported: ffjax does not know what it changes"
      )

  def scheme(self, method: str | None) -> Scheme:
    named = self._raw.pop("quant_method", method)
    known = {
      "gptq": self._gptq,
      "awq": self._awq,
      "compressed-tensors": self._compressed,
    }
    read = known.get(named) if isinstance(named, str) else None
    if read is None:
      raise self._error(
        f"quant_method={named!r} is not supported (supported: gptq, awq,"
        " compressed-tensors)"
      )
    return read()

  def _gptq(self) -> Scheme:
    for name in ("checkpoint_format", "format"):
      layout = self._only(name, ("gptq", "gptq_v2"), "gptq")
      if layout == "gptq_v2":
        break
    self._raw.pop("format", None)
    scheme = Scheme(
      layout="gptq",
      bits=self._only("bits", (4, 8), None),
      group_size=self._group_size("group_size", 128),
      symmetric=self._only("sym", (True, False), True),
      # The first version stores zero points less one.
      zero_offset=0 if layout == "gptq_v2" else 1,
      ordered=self._only("desc_act", (True, False), False),
    )
    if scheme.bits == 8 and not scheme.symmetric:
      raise self._error("sym=False is not supported with bits=8")
    self._only("pack_dtype", ("int32",), "int32")
    self._only("quant_method", ("gptq",), "gptq")
    self._end(_HARMLESS)
    return scheme

  def _awq(self) -> Scheme:
    # AutoAWQ's own file has other names.
    for theirs, ours in (("w_bit", "bits"), ("q_group_size", "group_size")):
      if theirs in self._raw:
        self._raw[ours] = self._raw.pop(theirs)
    for name in ("version", "format", "checkpoint_format"):
      self._only(name, ("gemm",), "gemm")
    scheme = Scheme(
      layout="awq",
      bits=self._only("bits", (4,), 4),
      group_size=self._group_size("group_size", 128),
      symmetric=not self._only("zero_point", (True, False), True),
    )
    # Newer configs are written by tools that also write GPTQ's.
    for name in ("sym", "desc_act"):
      self._only(name, (True, False), False)
    self._only("pack_dtype", ("int32",), "int32")
    self._end(_HARMLESS)
    return scheme

  def _compressed(self) -> Scheme:
    layouts = ("pack-quantized", "int-quantized", "float-quantized")
    layout = self._only("format", layouts, None)
    self._only("quantization_status", ("compressed", "frozen"), "compressed")
    groups = self._raw.pop("config_groups", None)
    if not isinstance(groups, dict) or len(groups) != 1:
      raise self._error(
        "config_groups must have one group: ffjax takes one format for all"
        " matrices"
      )
    self._end(_HARMLESS_COMPRESSED)
    ((name, group),) = groups.items()
    inner = _Reader._of(group, f"{self._source}.config_groups.{name}")
    return inner._compressed_group(layout)

  @staticmethod
  def _of(value: Any, source: str) -> "_Reader":
    if not isinstance(value, dict):
      raise ConfigError(f"{source}: {value!r} must be an object")
    return _Reader(value, source)

  def _compressed_group(self, layout: str) -> Scheme:
    targets = self._raw.pop("targets", None)
    if targets != ["Linear"]:
      raise self._error(
        f"targets={targets!r} is not supported (supported: ['Linear'])"
      )
    self._only("format", (layout, None), None)
    activations = self._raw.pop("input_activations", None)
    if activations is not None:
      # The weights are what they are; a step that rounds its activations less
      # computes the same model with less error.
      inner = _Reader._of(activations, f"{self._source}.input_activations")
      inner._only("dynamic", (True,), False)
    weights = self._raw.pop("weights", None)
    self._end(frozenset())
    inner = _Reader._of(weights, f"{self._source}.weights")
    return inner._compressed_weights(layout)

  def _compressed_weights(self, layout: str) -> Scheme:
    is_float = layout == "float-quantized"
    self._only("type", ("float",) if is_float else ("int",), "int")
    packed = layout == "pack-quantized"
    bits = self._only("num_bits", (4, 8) if packed else (8,), None)
    grouped = self._only(
      "strategy",
      ("group", "channel") if packed else ("channel", "tensor"),
      None,
    )
    group_size = self._group_size("group_size")
    if (grouped == "group") != (group_size is not None):
      raise self._error(f"{group_size=} does not go with {grouped!r}")
    symmetric = self._only("symmetric", (True, False), True)
    if not symmetric and bits != 4:
      raise self._error(
        f"symmetric=False is not supported with num_bits={bits}"
      )
    self._only("dynamic", (False,), False)
    order = self._only("actorder", (*_IN_GROUPS, *_IN_ORDER), None)
    self._end(_HARMLESS_WEIGHTS)
    return Scheme(
      *(layout, bits, group_size, symmetric), ordered=order in _IN_GROUPS
    )
