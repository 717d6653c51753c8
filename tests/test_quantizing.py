"""Tests of `ffjax.quantizing`, `ffjax.gptq` and saving what they make.

GPTQ is compared with the method as its paper derives it: an explicit inverse
Hessian, from which each column is eliminated once it is rounded. What is saved
is read by ffjax and, where they are installed, by `compressed-tensors` and
`transformers`.
"""

import dataclasses
import json
import pathlib

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import ffjax
from ffjax import (
  gptq,
  quantize_checkpoint,
  quantized,
  quantized_model,
  rounding,
)
from ffjax.cache import KVCache
from ffjax.errors import CheckpointError, RequestError
from ffjax.implementation import reference_hidden, reference_logits
from ffjax.quantized import FORMATS, QuantizedMatrix

_ROOT = pathlib.Path(ffjax.__file__).parents[1]
_TINY = _ROOT / "checkpoints" / "tiny_llama"


def _moments(columns, num_tokens, rng):
  """Returns second moments of inputs that go together in a few directions."""
  mixed = rng.standard_normal((12, columns)) * rng.uniform(0.1, 3, columns)
  inputs = rng.standard_normal((num_tokens, 12)) @ mixed
  inputs += 0.05 * rng.standard_normal((num_tokens, columns))
  return (inputs.T @ inputs).astype(np.float32)


def gptq_by_its_paper(weights, moments, m, order):
  """Returns the values that columns are rounded to, one by one, in `order`."""
  left = weights.astype(np.float64)
  n = len(moments)
  damping = 0.05 * np.trace(moments) / n
  inverse = np.linalg.inv(moments.astype(np.float64) + damping * np.eye(n))
  size = m.format.group_size or n
  found = np.empty_like(left)
  for column in order:
    scale = np.asarray(m.scales, np.float64)[:, column // size]
    x = left[:, column] / scale
    if m.format.bits == 8:
      value = np.clip(np.round(x), -128, 127)
    else:
      zero = 8.0
      if m.zeros is not None:
        zero = np.asarray(m.zeros, np.float64)[:, column // size]
      value = np.clip(np.round(x) + zero, 0, 15) - zero
    found[:, column] = value * scale
    error = (left[:, column] - found[:, column]) / inverse[column, column]
    left -= error[:, None] * inverse[column][None, :]
    row = inverse[column]
    inverse = inverse - np.outer(row, row) / row[column]
    inverse[column] = inverse[:, column] = 0
    inverse[column, column] = 1
  return found


@pytest.mark.parametrize(
  "name", ["int4_g32", "int4_g64_asym", "int4_g128", "int8", "int8_g32"]
)
def test_gptq_is_what_its_paper_derives(name):
  rng = np.random.default_rng(0)
  # Two blocks of columns.
  weights = jnp.asarray(rng.standard_normal((24, 256)) / 8, jnp.float32)
  moments = _moments(256, 400, rng)
  made = gptq.quantize_matrix(weights, jnp.asarray(moments), FORMATS[name])
  nearest = rounding.round_to_nearest(weights, FORMATS[name])
  chex.assert_trees_all_equal(
    (made.scales, made.zeros), (nearest.scales, nearest.zeros)
  )
  order = np.argsort(-np.diagonal(moments), kind="stable")
  expected = gptq_by_its_paper(np.asarray(weights), moments, made, order)
  found = np.asarray(quantized.dequantize(made))
  # What lies half way between two codes may go either way.
  same = np.isclose(found, expected, rtol=1e-5, atol=1e-6)
  assert same.mean() > 0.97
  backwards = gptq_by_its_paper(np.asarray(weights), moments, made, order[::-1])
  assert np.isclose(found, backwards, rtol=1e-5, atol=1e-6).mean() < 0.9

  def lost(matrix):
    error = np.asarray(quantized.dequantize(matrix) - weights, np.float64)
    return np.einsum("oi,ij,oj->", error, moments, error)

  assert lost(made) < 0.6 * lost(nearest)


@pytest.mark.parametrize("name", ["int4_g32_asym", "int8", "fp8"])
def test_gptq_without_correlations_is_rounding(name):
  rng = np.random.default_rng(1)
  weights = jnp.asarray(rng.standard_normal((8, 96)), jnp.bfloat16)
  moments = jnp.diag(jnp.asarray(rng.uniform(0, 4, 96), jnp.float32))
  for seen in (moments, jnp.zeros_like(moments)):
    made = gptq.quantize_matrix(weights, seen, FORMATS[name])
    chex.assert_trees_all_equal(
      made, rounding.round_to_nearest(weights, FORMATS[name])
    )


@pytest.fixture(scope="module")
def small(make_config):
  config = make_config(
    hidden_size=64,
    intermediate_size=128,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    vocab_size=384,
  )
  return ffjax.random_model(config, 0, "float32")


def test_run_layer(small):
  config = dataclasses.replace(small.config, num_hidden_layers=1)
  layer = jax.tree.map(lambda x: x[0], small.params["layers"])
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 8, 64)), jnp.float32)
  lengths = jnp.asarray([8, 5], jnp.int32)
  out, moments = gptq.run_layer(small.config, layer, x, lengths)
  names = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
  assert set(moments) == {
    (module, f"{name}_proj") for module in names for name in names[module]
  }
  # What q, k and v see is the first norm's output.
  eps = config.rms_norm_eps
  gain = np.asarray(layer["input_layernorm"]["weight"])
  real = np.concatenate([np.asarray(x)[0], np.asarray(x)[1, :5]])
  normed = real / np.sqrt((real**2).mean(-1, keepdims=True) + eps) * gain
  for name in ("q_proj", "k_proj", "v_proj"):
    found = moments["self_attn", name]
    np.testing.assert_allclose(found, normed.T @ normed, rtol=1e-4, atol=1e-4)
  shape = {key: value.shape[0] for key, value in moments.items()}
  assert shape["mlp", "down_proj"] == 128
  assert shape["self_attn", "o_proj"] == 64
  # Padding does not matter.
  other, others = gptq.run_layer(
    small.config, layer, x.at[1, 5:].set(9.0), lengths
  )
  chex.assert_trees_all_close(moments, others, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(out[0], other[0], rtol=1e-5)
  # The layer is the reference's: of the model with this one layer.
  table = {"weight": x[0]}
  one = small.replace(
    config=dataclasses.replace(config, vocab_size=8),
    params={
      **small.params,
      "embed_tokens": table,
      "layers": jax.tree.map(lambda x: x[:1], small.params["layers"]),
    },
  )
  ids = jnp.arange(8, dtype=jnp.int32)[None]
  cache = KVCache.create(one.config, 1, 8, "float32")
  hidden, _ = reference_hidden(one, ids, lengths[:1], cache)
  gain = np.asarray(small.params["norm"]["weight"])
  last = np.asarray(out)[0]
  expected = last / np.sqrt((last**2).mean(-1, keepdims=True) + eps) * gain
  np.testing.assert_allclose(hidden[0], expected, rtol=1e-4, atol=1e-4)


def _hidden(model, ids):
  lengths = np.asarray([ids.shape[1]], np.int32)

  @jax.jit
  def run(model):
    cache = KVCache.create(model.config, 1, ids.shape[1], "float32")
    return reference_hidden(model, ids, lengths, cache)[0]

  return np.asarray(run(model))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_small_weights_of_float16_lose_no_more_than_others(name):
  # Scales of 5e-6 and 1.6e-7, which are not normal in float16.
  weights = jax.random.normal(jax.random.key(0), (64, 128)) * 2e-4

  def error(dtype):
    exact = weights.astype(dtype).astype(jnp.float32)
    made = rounding.round_to_nearest(exact.astype(dtype), FORMATS[name])
    off = quantized.dequantize(made) - exact
    return float(jnp.linalg.norm(off) / jnp.linalg.norm(exact))

  assert error("float16") < 1.1 * error("float32")


def test_gptq_is_better_than_rounding():
  model = ffjax.load(_TINY)
  text = (_TINY / "heldout.txt").read_text()
  ids = np.asarray([model.tokenizer.encode(text[:256])], np.int32)
  expected = _hidden(model, ids)
  errors = {}
  for name, arguments in {
    "nearest": {},
    "gptq": dict(method="gptq", calibration=[text[-400:-200], text[-200:]]),
  }.items():
    made = ffjax.quantize(model, "int4_g128", **arguments)
    errors[name] = np.square(_hidden(made, ids) - expected).mean()
  assert errors["gptq"] < 0.8 * errors["nearest"], errors


def test_heads_can_follow_later(small):
  made = ffjax.quantize(small, "int4_g32")
  both = ffjax.quantize(made, None, head_format="int8")
  chex.assert_trees_all_equal(
    both, ffjax.quantize(small, "int4_g32", head_format="int8")
  )
  # A model whose embedding is quantised calibrates, too.
  head = ffjax.quantize(small, None, head_format="int8")
  assert head.params["layers"]["mlp"]["up_proj"]["weight"].dtype == jnp.float32
  ids = [[1, 2, 3], [4, 5]]
  made = ffjax.quantize(head, "int8", method="gptq", calibration=ids)
  assert {format.name for format in made.formats} == {"int8"}


def test_what_is_refused(small):
  with pytest.raises(RequestError, match="method='awq' does not exist"):
    ffjax.quantize(small, "int8", method="awq")
  with pytest.raises(RequestError, match="'nearest' takes no calibration"):
    ffjax.quantize(small, "int8", calibration=[[1]])
  with pytest.raises(RequestError, match="'gptq' needs a calibration"):
    ffjax.quantize(small, "int8", method="gptq")
  with pytest.raises(RequestError, match="format=None does not exist"):
    ffjax.quantize(small, None)
  with pytest.raises(RequestError, match="prompt 0 is text, but"):
    ffjax.quantize(small, "int8", method="gptq", calibration="a")
  with pytest.raises(RequestError, match="prompt 0 has 200 tokens"):
    ffjax.quantize(small, "int8", method="gptq", calibration=[[1] * 200])


# Saving ----------------------------------------------------------------------


def _quantised_leaves(model):
  flat = flax.traverse_util.flatten_dict(model.params)
  return {k: x for k, x in flat.items() if isinstance(x, QuantizedMatrix)}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [x for x in FORMATS if "128" not in x])
def test_saved_models_come_back(small, name, dtype, max_shard_bytes, tmp_path):
  model = ffjax.random_model(small.config, 1, dtype, name)
  ffjax.save(model, tmp_path, max_shard_bytes)
  assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes > 10**6)
  loaded = ffjax.load(tmp_path)
  assert loaded.config == dataclasses.replace(
    model.config, dtype=str(model.dtype)
  )
  chex.assert_trees_all_equal(loaded.params, model.params)
  index = tmp_path / "model.safetensors.index.json"
  if index.exists():
    stored = json.loads(index.read_text())["metadata"]["total_size"]
    assert stored == sum(map(_data_bytes, tmp_path.glob("model-*.safetensors")))


def _data_bytes(path):
  """Returns the bytes of a safetensors file after its header."""
  contents = path.read_bytes()
  return len(contents) - 8 - int.from_bytes(contents[:8], "little")


def _with_columns(matrix, rng):
  """Lets the stored columns of every layer be others, in groups."""
  layers, _, columns = matrix.shape
  order = np.stack([rng.permutation(columns) for _ in range(layers)])
  return dataclasses.replace(matrix, columns=jnp.asarray(order, jnp.int32))


def test_saved_columns_come_back_in_their_groups(small, tmp_path):
  rng = np.random.default_rng(0)
  model = ffjax.random_model(small.config, 1, "bfloat16", "int4_g32_asym")
  flat = flax.traverse_util.flatten_dict(model.params)
  for path, leaf in _quantised_leaves(model).items():
    flat[path] = _with_columns(leaf, rng)
  model = model.replace(params=flax.traverse_util.unflatten_dict(flat))
  ffjax.save(model, tmp_path)
  loaded = ffjax.load(tmp_path)
  for path, leaf in _quantised_leaves(loaded).items():
    np.testing.assert_array_equal(
      quantized.dequantize(leaf), quantized.dequantize(flat[path])
    )


def test_what_cannot_be_saved(small, tmp_path):
  model = ffjax.random_model(small.config, 1, "bfloat16", "int4_g32_asym")

  def changed(**fields):
    flat = flax.traverse_util.flatten_dict(model.params)
    path = ("layers", "mlp", "up_proj", "weight")
    flat[path] = dataclasses.replace(flat[path], **fields)
    return model.replace(params=flax.traverse_util.unflatten_dict(flat))

  up = model.params["layers"]["mlp"]["up_proj"]["weight"]
  for other, message in (
    (changed(minimums=up.scales), "minimums"),
    (changed(zeros=up.zeros.at[0, 0, 0].set(16)), "a zero point is 16"),
    (changed(format=FORMATS["int4_g32"], zeros=None), "int4_g32 and int4_g32_"),
    (
      ffjax.quantize(model, None, head_format="int8"),
      "embed_tokens.weight is quantised",
    ),
    (
      model.replace(
        params={
          **model.params,
          "layers": quantized_model.dequantized(
            {"x": model.params["layers"]}, jnp.bfloat16
          )["x"]
          | {"self_attn": model.params["layers"]["self_attn"]},
        }
      ),
      "mlp.* is not quantised",
    ),
  ):
    with pytest.raises(CheckpointError, match=f"cannot be saved.*{message}"):
      ffjax.save(other, tmp_path / "made")
  assert not (tmp_path / "made").exists()


def run_main(capsys, **values):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["quantize_checkpoint"])
  with flagsaver.flagsaver(**values):
    code = quantize_checkpoint.main(["quantize_checkpoint"])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_command(tmp_path, capsys):
  calibration = tmp_path / "text.txt"
  calibration.write_text("In the beginning.\n\nAnd it was so.\n\n\n")
  output = str(tmp_path / "made")
  arguments = dict(checkpoint=str(_TINY), save_to=output, weights="int4_g64")
  code, out, err = run_main(
    capsys, **arguments, method="gptq", calibration=str(calibration)
  )
  assert (code, err) == (0, "")
  assert out == f"{output}: 0.006 GB a step became 0.002 GB\n"
  model = ffjax.load(output)
  assert model.tokenizer.decode(model.tokenizer.encode("abc")) == "abc"
  texts = ["In the beginning.", "And it was so."]
  expected = ffjax.quantize(
    ffjax.load(_TINY), "int4_g64", method="gptq", calibration=texts
  )
  chex.assert_trees_all_equal(model.params, expected.params)

  for changed, message in (
    ({}, "is there already"),
    ({"save_to": output + "2", "checkpoint": "nowhere"}, "no such file"),
    ({"save_to": output + "2", "calibration": "nowhere"}, "cannot be read"),
    (
      {"save_to": output + "2", "calibration": str(calibration)},
      "'nearest' takes no calibration",
    ),
  ):
    code, out, err = run_main(
      capsys, **{**arguments, "method": "nearest", **changed}
    )
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


# Oracles ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
  reason = "the extra `oracle` is missing"
  torch = pytest.importorskip("torch", reason=reason)
  package = pytest.importorskip("compressed_tensors", reason=reason)
  return torch, package


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [x for x in FORMATS if "128" not in x])
def test_compressed_tensors_reads_what_is_saved(oracle, small, name, tmp_path):
  torch, _ = oracle
  from compressed_tensors.compressors import BaseCompressor
  from compressed_tensors.quantization import QuantizationConfig
  from safetensors.torch import load_file

  model = ffjax.random_model(small.config, 1, "float32", name)
  ffjax.save(model, tmp_path)
  raw = json.loads((tmp_path / "config.json").read_text())
  config = QuantizationConfig.model_validate(raw["quantization_config"])
  (scheme,) = config.config_groups.values()
  compressor = BaseCompressor.get_value_from_registry(config.format)
  stored = load_file(tmp_path / "model.safetensors")
  for path, leaf in _quantised_leaves(model).items():
    ours = np.asarray(quantized.dequantize(leaf))
    for layer in range(2):
      module = f"model.layers.{layer}.{'.'.join(path[1:-1])}."
      state = {
        key.removeprefix(module): x
        for key, x in stored.items()
        if key.startswith(module) and not key.endswith("bias")
      }
      found = compressor.decompress(state, scheme)["weight"]
      np.testing.assert_allclose(
        found.to(torch.float32).numpy(), ours[layer], rtol=1e-6
      )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int4_g32", "int8", "fp8"])
def test_transformers_runs_what_is_saved(oracle, small, name, tmp_path):
  torch, _ = oracle
  transformers = pytest.importorskip(
    "transformers", reason="the extra `oracle` is missing"
  )
  model = ffjax.random_model(small.config, 1, "float32", name)
  ffjax.save(model, tmp_path)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, dtype="float32"
  )
  ids = np.asarray([[1, 5, 9, 7]], np.int32)
  with torch.no_grad():
    logits = theirs(torch.tensor(ids, dtype=torch.int64)).logits
  ours = reference_logits(model, jnp.asarray(_hidden(model, ids)))
  np.testing.assert_allclose(logits.numpy(), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  ("symmetric", "bits"), [(True, 4), (False, 4), (True, 8)]
)
def test_what_compressed_tensors_packs_is_read(
  oracle, small, symmetric, bits, tmp_path
):
  torch, _ = oracle
  from compressed_tensors.compressors import BaseCompressor
  from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
  )
  from safetensors.torch import load_file, save_file

  format_name = f"int{bits}_g32" + ("" if symmetric else "_asym")
  ffjax.save(
    ffjax.random_model(small.config, 1, "float32", format_name), tmp_path
  )
  args = QuantizationArgs(
    num_bits=bits, strategy="group", group_size=32, symmetric=symmetric
  )
  scheme = QuantizationScheme(targets=["Linear"], weights=args)
  compressor = BaseCompressor.get_value_from_registry("pack-quantized")
  stored = load_file(tmp_path / "model.safetensors")
  torch.manual_seed(0)
  expected = {}
  for key in [x for x in stored if x.endswith(".weight_packed")]:
    module = key.removesuffix("weight_packed")
    out, columns = stored[module + "weight_shape"].tolist()
    scale = torch.rand(out, columns // 32) / 50 + 0.01
    state = {
      "weight": torch.randn(out, columns) / 10,
      "weight_scale": scale,
      "weight_zero_point": torch.randint(-8, 8, scale.shape).to(torch.int8),
    }
    if symmetric:
      state["weight_zero_point"] *= 0
    packed = compressor.compress(state, scheme)
    stored.update({module + x: value for x, value in packed.items()})
    found = compressor.decompress(packed, scheme)["weight"]
    expected[module] = found.to(torch.float32).numpy()
  save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
  loaded = ffjax.load(tmp_path)
  for path, leaf in _quantised_leaves(loaded).items():
    for layer, found in enumerate(np.asarray(quantized.dequantize(leaf))):
      module = f"model.layers.{layer}.{'.'.join(path[1:-1])}."
      np.testing.assert_allclose(found, expected[module], rtol=1e-6)
