"""Quantises models: `ffjax.quantize`.

Down the flow: `ffjax.quantized` says what the results mean, `ffjax.saving`
saves them.
"""

import dataclasses
import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ffjax import gptq, prompts, quantized_model, rounding
from ffjax.config import LlamaConfig
from ffjax.errors import RequestError
from ffjax.packed import PackedParams
from ffjax.params import Model, check_model, matrix_formats
from ffjax.prompts import Prompts
from ffjax.quantized import Format, QuantizedMatrix

METHODS = ("nearest", "gptq")

Path = tuple[str, ...]


def quantize(
  model: Model,
  format_name: str | None,
  *,
  head_format: str | None = None,
  method: str = "nearest",
  calibration: Prompts | None = None,
) -> Model:
  """Quantises the matrices of all layers; the argument stays as it is.

  Args:
    model: a model that is not packed.
    format_name: a key of `ffjax.quantized.FORMATS`, for example `"int4_g128"`;
      None leaves the layers as they are.
    head_format: likewise for embedding and LM head, of 8-bit integers. They are
      always rounded to nearest.
    method: `"nearest"` rounds each weight; `"gptq"` rounds so that products with
      a few hundred tokens' activations change least, see `ffjax.gptq`.
    calibration: with `"gptq"`, those tokens, texts or ids: of the kind that the
      model will see.

  Returns:
    The quantised model. Scales have the dtype of the matrices they were made
    from.

  Raises:
    RequestError: if there is no such format or method, the format does not fit
      the model's sizes, or what is to be quantised is packed or quantised
      already.
  """
  check_model(model)
  if isinstance(model.params, PackedParams):
    raise RequestError("the model is packed: quantise it before")
  if method not in METHODS:
    raise RequestError(
      f"method={method!r} does not exist (there are: {', '.join(METHODS)})"
    )
  if (calibration is not None) != (method == "gptq"):
    takes = "takes no" if calibration is not None else "needs a"
    raise RequestError(f"method={method!r} {takes} calibration")
  formats = matrix_formats(model.config, format_name, head_format)
  flat = flax.traverse_util.flatten_dict(model.params)
  for path in formats:
    if isinstance(flat[path], QuantizedMatrix):
      raise RequestError(
        f"{'.'.join(path)} is quantised already ({flat[path].format.name})"
      )
  of_layers = {path: x for path, x in formats.items() if path[0] == "layers"}
  if calibration is not None and of_layers:
    encoded = prompts.encode(model, calibration)
    prompts.check_lengths(model.config, encoded, 0)
    flat.update(_calibrated(model, of_layers, *prompts.pad(encoded)))
  for path, format in formats.items():
    if not isinstance(flat[path], QuantizedMatrix):
      flat[path] = rounding.quantize_leaf(flat[path], format)
  return dataclasses.replace(
    model, params=flax.traverse_util.unflatten_dict(flat)
  )


def _calibrated(
  model: Model,
  formats: dict[Path, Format],
  token_ids: np.ndarray,
  lengths: np.ndarray,
) -> dict[Path, QuantizedMatrix]:
  """Quantises layer after layer, each on what the ones before it put out."""
  params = model.params
  assert not isinstance(params, PackedParams)
  x = quantized_model.embed(params, jnp.asarray(token_ids), model.dtype)
  found: dict[Path, list[QuantizedMatrix]] = {path: [] for path in formats}
  for layer in range(model.config.num_hidden_layers):
    tree = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
    flat = flax.traverse_util.flatten_dict(tree)
    _, moments = _run_layer(tree, x, lengths, model.config)
    for path, format in formats.items():
      _, module, name, _ = path
      made = gptq.quantize_matrix(flat[path[1:]], moments[module, name], format)
      found[path].append(made)
      flat[path[1:]] = made
    tree = quantized_model.dequantized(
      flax.traverse_util.unflatten_dict(flat), model.dtype
    )
    x, _ = _run_layer(tree, x, lengths, model.config)
  return {
    path: jax.tree.map(lambda *parts: jnp.stack(parts), *matrices)
    for path, matrices in found.items()
  }


@functools.partial(jax.jit, static_argnames="config")
def _run_layer(
  tree: Any, x: jax.Array, lengths: jax.Array, config: LlamaConfig
) -> Any:
  return gptq.run_layer(config, tree, x, lengths)
