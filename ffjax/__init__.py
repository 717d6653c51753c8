"""One person's Llama tokens, as fast as the hardware allows, in JAX."""

from ffjax.checkpoint import load
from ffjax.config import LlamaConfig, RopeScaling
from ffjax.errors import (
  CheckpointError,
  ConfigError,
  FfjaxError,
  RequestError,
  TokenizerError,
)
from ffjax.packing import pack, unpack
from ffjax.params import Model, random_model
from ffjax.presets import preset
from ffjax.quantizing import quantize
from ffjax.saving import save
from ffjax.version import __version__

__all__ = [
  "CheckpointError",
  "ConfigError",
  "FfjaxError",
  "LlamaConfig",
  "Model",
  "RequestError",
  "RopeScaling",
  "TokenizerError",
  "__version__",
  "load",
  "pack",
  "preset",
  "quantize",
  "random_model",
  "save",
  "unpack",
]
