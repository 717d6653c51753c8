"""Tests of `ffjax.checkpoint` and `ffjax.safetensors_file`.

Files are written by the safetensors library or by hand, and what is loaded is
compared with a parser of its own, below.
"""

import dataclasses
import functools
import json
import os
import pathlib
import struct
import subprocess
import sys

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle_cases
import pytest
import safetensors.numpy

import ffjax
from ffjax import checkpoint, device_memory, params
from ffjax.config import LlamaConfig
from ffjax.errors import (
  CheckpointError,
  ConfigError,
  FfjaxError,
  RequestError,
  TokenizerError,
)
from ffjax.text import ByteTokenizer

BF16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": BF16}
_INDEX = "model.safetensors.index.json"

_RAW = {
  **oracle_cases.CASES["gqa2"],
  "vocab_size": 10,
  "hidden_size": 8,
  "intermediate_size": 12,
  "head_dim": 4,
  "rope_theta": 77.0,
}
_TIED = {**_RAW, "tie_word_embeddings": True}
_BIASED = {**_RAW, "attention_bias": True, "mlp_bias": True}


def _tensors(raw, dtype="f4"):
  made = oracle_cases.random_weights(raw, "checkpoint")
  return {name: tensor.astype(dtype) for name, tensor in made.items()}


def _write_sharded(directory, raw, tensors, num_shards=3):
  """Writes shards by hand, tensors dealt out in turn."""
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps(raw), "utf-8")
  weight_map = {}
  for shard in range(num_shards):
    file_name = f"part{shard}.safetensors"
    names = list(tensors)[shard::num_shards]
    safetensors.numpy.save_file(
      {name: tensors[name] for name in names}, directory / file_name
    )
    weight_map.update(dict.fromkeys(names, file_name))
  index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
  (directory / _INDEX).write_text(json.dumps(index), "utf-8")
  return directory


def _by_name(model):
  """Returns a model's parameters by the names of Hugging Face."""
  found = {}
  for path, leaf in flax.traverse_util.flatten_dict(model.params).items():
    leaf = np.asarray(leaf)
    if path[0] == "layers":
      for layer in range(leaf.shape[0]):
        found[f"model.layers.{layer}.{'.'.join(path[1:])}"] = leaf[layer]
    else:
      prefix = "" if path[0] == "lm_head" else "model."
      found[prefix + ".".join(path)] = leaf
  return found


def _assert_same_bits(actual, desired):
  assert actual.keys() == desired.keys()
  for name, tensor in desired.items():
    assert actual[name].dtype == tensor.dtype, name
    assert actual[name].shape == tensor.shape, name
    assert actual[name].tobytes() == tensor.tobytes(), name


def _parse_file(path):
  """Reads a safetensors file, sharing nothing with `ffjax`."""
  data = path.read_bytes()
  (header_bytes,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + header_bytes])
  found = {}
  for name, entry in header.items():
    if name != "__metadata__":
      start, stop = entry["data_offsets"]
      found[name] = (
        np.frombuffer(data[8 + header_bytes :][start:stop], np.uint8)
        .view(_DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
      )
  return found


def _parse_directory(directory):
  if (directory / "model.safetensors").exists():
    return _parse_file(directory / "model.safetensors")
  index = json.loads((directory / _INDEX).read_bytes())
  return {
    name: _parse_file(directory / shard)[name]
    for name, shard in index["weight_map"].items()
  }


def _model(raw=_RAW, dtype="float32"):
  """Makes a model from arrays; `random_model` would take time to compile."""
  config = dataclasses.replace(LlamaConfig.from_dict(raw), dtype=dtype)
  tensors = _tensors(raw, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  tree = {}
  for leaf in params.leaves(config):
    parts = [tensors[name] for name in leaf.names]
    tree[leaf.path] = jnp.asarray(np.stack(parts) if leaf.stacked else parts[0])
  return params.Model(
    params=flax.traverse_util.unflatten_dict(tree), config=config
  )


@pytest.mark.parametrize("max_shard_bytes", [None, 1, 1000])
@pytest.mark.parametrize("raw", [_RAW, _TIED, _BIASED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_save_and_load_give_the_same_bits(
  raw, dtype, max_shard_bytes, tmp_path
):
  config = dataclasses.replace(LlamaConfig.from_dict(raw), dtype=dtype)
  model = _model(raw, dtype)
  directory = tmp_path / "made" / "on the way"
  if max_shard_bytes is None:
    ffjax.save(model, directory)
  else:
    ffjax.save(model, str(directory), max_shard_bytes)
  saved = _by_name(model)
  _assert_same_bits(_parse_directory(directory), saved)

  loaded = ffjax.load(directory)
  assert loaded.config == config
  assert loaded.tokenizer is None
  _assert_same_bits(_by_name(loaded), saved)
  assert jax.tree.structure(loaded) == jax.tree.structure(model)

  files = sorted(path.name for path in directory.iterdir())
  if max_shard_bytes is None:
    assert files == ["config.json", "model.safetensors"]
    return
  shards = [path for path in directory.glob("*.safetensors")]
  assert len(files) == len(shards) + 2
  if max_shard_bytes == 1:
    assert len(shards) == len(saved)
  for shard in shards:
    tensors = _parse_file(shard)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert num_bytes <= max_shard_bytes or len(tensors) == 1
  index = json.loads((directory / _INDEX).read_text("utf-8"))
  total_bytes = sum(tensor.nbytes for tensor in saved.values())
  assert index["metadata"]["total_size"] == total_bytes


def test_saved_files_have_the_usual_permissions(tmp_path):
  ffjax.save(_model(), tmp_path)
  modes = {path.stat().st_mode for path in tmp_path.iterdir()}
  assert len(modes) == 1
  (tmp_path / "other").touch()
  assert modes == {(tmp_path / "other").stat().st_mode}


def test_tokenizer_is_saved_and_loaded(tmp_path):
  model = _model({**_RAW, "vocab_size": 384})
  ffjax.save(model.replace(tokenizer=ByteTokenizer()), tmp_path)
  assert isinstance(ffjax.load(tmp_path).tokenizer, ByteTokenizer)
  (tmp_path / "tokenizer_config.json").write_text("[", "utf-8")
  with pytest.raises(TokenizerError, match="tokenizer_config.json"):
    ffjax.load(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20000])
@pytest.mark.parametrize("name", ["llama3", "biases_tied", "odd_sizes"])
def test_transformers_reads_what_is_saved(name, max_shard_bytes, tmp_path):
  torch = pytest.importorskip("torch", reason="the extra `oracle` is missing")
  transformers = pytest.importorskip(
    "transformers", reason="the extra `oracle` is missing"
  )
  transformers.logging.disable_progress_bar()
  tensors = oracle_cases.weights(name)
  oracle_cases.write(tmp_path / "a", oracle_cases.CASES[name], tensors)
  ffjax.save(ffjax.load(tmp_path / "a"), tmp_path / "b", max_shard_bytes)

  logits = []
  for part in ("a", "b"):
    model, loading = transformers.LlamaForCausalLM.from_pretrained(
      tmp_path / part, output_loading_info=True
    )
    assert not any(loading.values())
    with torch.no_grad():
      ids = torch.from_numpy(oracle_cases.token_ids(name)).long()
      logits.append(model(ids).logits.numpy())
  np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("block_bytes", [1, 100, 300, 2**24])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("raw", [_BIASED, _TIED])
def test_load_by_blocks(raw, dtype, block_bytes, tmp_path, monkeypatch):
  tensors = _tensors(raw)
  _write_sharded(tmp_path, raw, tensors)
  monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", block_bytes)
  calls = []
  model = ffjax.load(tmp_path, dtype, lambda *sizes: calls.append(sizes))
  desired = _tensors(raw, BF16 if dtype else "f4")
  _assert_same_bits(_by_name(model), desired)

  total_bytes = sum(tensor.nbytes for tensor in desired.values())
  assert calls[0] == (0, total_bytes)
  assert calls[-1] == (total_bytes, total_bytes)
  done = [call[0] for call in calls]
  assert done == sorted(set(done))
  assert {call[1] for call in calls} == {total_bytes}
  if block_bytes == 1:  # One row at a time, except of what is one number.
    assert len(calls) > sum(tensor.shape[0] for tensor in tensors.values()) / 2


def _rounded_to_bfloat16(values):
  """Rounds float32 to nearest, ties to even, by the bits."""
  bits = values.view(np.uint32).astype(np.uint64)
  bits += 0x7FFF + (bits >> 16 & 1)
  return (bits >> 16).astype(np.uint16).view(BF16)


@pytest.mark.parametrize("stored", _DTYPES)
@pytest.mark.parametrize("asked", _DTYPES)
def test_conversion_rounds_to_nearest(stored, asked, tmp_path):
  tensors = _tensors(_RAW)
  # Ties, subnormal numbers of each dtype, and signed zeros.
  special = np.asarray(
    [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 3 * 2**-25,
     1e-40, -1e-40, 0.0, -0.0, 65504.0, -65519.0],
    np.float32,
  )  # fmt: skip
  embedding = tensors["model.embed_tokens.weight"].reshape(-1)
  embedding[: special.size] = special
  with np.errstate(over="ignore"):
    tensors = {k: v.astype(_DTYPES[stored]) for k, v in tensors.items()}
  oracle_cases.write(tmp_path, _RAW, tensors)
  if stored == "BF16" and asked == "F16":
    # 65504 is 65536 as bfloat16.
    with pytest.raises(CheckpointError, match="not finite as float16"):
      ffjax.load(tmp_path, "float16")
    tensors["model.embed_tokens.weight"][1] = 0
    tensors["model.embed_tokens.weight"][0, -1] = 0
    tensors["model.embed_tokens.weight"].reshape(-1)[10:12] = 1
    oracle_cases.write(tmp_path, _RAW, tensors)
  loaded = _by_name(ffjax.load(tmp_path, _DTYPES[asked]))
  for name, tensor in tensors.items():
    wide = tensor.astype(np.float32)
    desired = (
      _rounded_to_bfloat16(wide)
      if asked == "BF16"
      else wide.astype(_DTYPES[asked])
    )
    assert loaded[name].dtype == _DTYPES[asked]
    assert loaded[name].tobytes() == desired.tobytes()


def test_every_tensor_keeps_its_dtype(tmp_path):
  tensors = _tensors(_RAW, BF16)
  for name in tensors:
    if name.endswith("norm.weight"):
      tensors[name] = tensors[name].astype(np.float32)
  oracle_cases.write(tmp_path, _RAW, tensors)
  _assert_same_bits(_by_name(ffjax.load(tmp_path)), tensors)


@pytest.mark.parametrize("other", ["f4", "f2"])
def test_layers_of_different_dtypes_become_float32(other, tmp_path):
  tensors = _tensors(_RAW, BF16)
  name = "model.layers.1.mlp.up_proj.weight"
  tensors[name] = tensors[name].astype(other)
  oracle_cases.write(tmp_path, _RAW, tensors)
  for layer in range(2):
    key = f"model.layers.{layer}.mlp.up_proj.weight"
    tensors[key] = tensors[key].astype(np.float32)
  _assert_same_bits(_by_name(ffjax.load(tmp_path)), tensors)


@pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense"])
def test_other_dtypes_are_refused(dtype, tmp_path):
  with pytest.raises(RequestError, match=f"dtype='{dtype}' is not supported"):
    ffjax.load(tmp_path, dtype)


@pytest.mark.parametrize("num_shards", [1, 2, 20])
def test_sharded_directory(num_shards, tmp_path):
  tensors = _tensors(_BIASED)
  _write_sharded(tmp_path, _BIASED, tensors, num_shards)
  _assert_same_bits(_by_name(ffjax.load(tmp_path)), tensors)


def test_links_as_in_hub_caches(tmp_path):
  tensors = _tensors(_RAW)
  blobs = _write_sharded(tmp_path / "blobs", _RAW, tensors)
  snapshot = tmp_path / "snapshots" / "1"
  snapshot.mkdir(parents=True)
  for path in blobs.iterdir():
    (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
  _assert_same_bits(_by_name(ffjax.load(snapshot)), tensors)


@pytest.mark.parametrize(
  ("model_eos", "generation", "expected"),
  [
    (2, {"eos_token_id": [2, 5, 4]}, (2, 5, 4)),
    (2, {"eos_token_id": 3}, (2, 3)),
    (2, {"eos_token_id": None}, (2,)),
    ([2, 6], {}, (2, 6)),
    (None, {"eos_token_id": 1}, (1,)),
  ],
)
def test_ends_of_text_of_generation_config(
  model_eos, generation, expected, tmp_path
):
  raw = {**_RAW, "eos_token_id": model_eos}
  oracle_cases.write(tmp_path, raw, _tensors(raw))
  path = tmp_path / "generation_config.json"
  path.write_text(json.dumps({**generation, "top_p": 0.9}), "utf-8")
  config = ffjax.load(tmp_path).config
  assert config.eos_token_ids == expected
  plain = dataclasses.replace(config, eos_token_ids=())
  raw["eos_token_id"] = None
  assert plain == LlamaConfig.from_dict(raw)


@pytest.mark.parametrize(
  "content", ["[", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": 10}']
)
def test_generation_config_that_is_wrong(content, tmp_path):
  oracle_cases.write(tmp_path, _RAW, _tensors(_RAW))
  path = tmp_path / "generation_config.json"
  path.write_text(content, "utf-8")
  with pytest.raises(ConfigError, match="generation_config.json: "):
    ffjax.load(tmp_path)


def test_rotary_buffers_are_ignored(tmp_path):
  tensors = _tensors(_RAW)
  extra = {
    f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(2, "f4")
    for layer in range(2)
  }
  oracle_cases.write(tmp_path, _RAW, {**tensors, **extra})
  _assert_same_bits(_by_name(ffjax.load(tmp_path)), tensors)


@pytest.mark.parametrize("block_bytes", [1, 2**24])
def test_tied_head(block_bytes, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", block_bytes)
  tensors = _tensors(_TIED)
  embedding = tensors["model.embed_tokens.weight"]
  oracle_cases.write(tmp_path, _TIED, {**tensors, "lm_head.weight": embedding})
  _assert_same_bits(_by_name(ffjax.load(tmp_path)), tensors)

  different = embedding.copy()
  different[-1, -1] *= -1
  for head in (different, embedding[:-1], embedding.astype(np.float16)):
    oracle_cases.write(tmp_path, _TIED, {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
      ffjax.load(tmp_path)


def test_model_must_fit(tmp_path, monkeypatch):
  _write_sharded(tmp_path, _RAW, _tensors(_RAW))
  need = 4 * LlamaConfig.from_dict(_RAW).num_params
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: need)
  ffjax.load(tmp_path)
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: need - 1)
  with pytest.raises(RequestError, match="the model takes .* GiB free"):
    ffjax.load(tmp_path)
  ffjax.load(tmp_path, "bfloat16")


def _error(path, error=CheckpointError, dtype=None):
  """Returns the message of the one right error, which is one line."""
  with pytest.raises(FfjaxError) as caught:
    ffjax.load(path, dtype)
  assert type(caught.value) is error
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_paths_that_hold_no_checkpoint(tmp_path):
  for name in ("nothing", "x" * 400, "a\0b"):
    message = _error(tmp_path / name)
    assert "no such file or directory" in message
  (tmp_path / "a.safetensors").touch()
  assert "expected a Hugging Face directory" in _error(
    tmp_path / "a.safetensors"
  )
  assert _error(tmp_path, ConfigError) == (
    f"{tmp_path / 'config.json'}: no such file"
  )


@pytest.mark.parametrize(
  "found", ["", "pytorch_model.bin", "consolidated.00.pth", "x.safetensors"]
)
def test_no_weights(found, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(_RAW), "utf-8")
  if found:
    (tmp_path / found).touch()
  message = _error(tmp_path)
  assert message.startswith(f"{tmp_path}: neither model.safetensors nor")
  assert (f"(found {found})" if found else "is there;") in message


def test_missing_shard(tmp_path):
  _write_sharded(tmp_path, _RAW, _tensors(_RAW))
  (tmp_path / "part1.safetensors").unlink()
  assert _error(tmp_path) == (
    f"{tmp_path / _INDEX}: missing shards: part1.safetensors"
  )


@pytest.mark.parametrize(
  "shard",
  [
    "../part0.safetensors",
    "..",
    ".",
    "/part0.safetensors",
    "/",
    "sub/part0.safetensors",
    "..\\part0.safetensors",
    "\\part0.safetensors",
    "",
    None,
    3,
    ["part0.safetensors"],
    {},
  ],
)
def test_index_must_name_files_beside_it(shard, tmp_path):
  _write_sharded(tmp_path, _RAW, _tensors(_RAW))
  index = json.loads((tmp_path / _INDEX).read_text("utf-8"))
  index["weight_map"]["model.norm.weight"] = shard
  (tmp_path / _INDEX).write_text(json.dumps(index), "utf-8")
  assert _error(tmp_path) == (
    f"{tmp_path / _INDEX}: model.norm.weight is in {shard!r}, which is not a"
    " file name in the index's own directory"
  )


@pytest.mark.parametrize("shard", ["x" * 400, "a\0b", "\ud800"])
def test_index_with_names_that_cannot_exist(shard, tmp_path):
  _write_sharded(tmp_path, _RAW, _tensors(_RAW))
  index = json.loads((tmp_path / _INDEX).read_text("utf-8"))
  index["weight_map"]["model.norm.weight"] = shard
  (tmp_path / _INDEX).write_text(json.dumps(index), "utf-8")
  assert f"missing shards: {shard}" in _error(tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "not valid JSON"),
    ("[]", "expected a JSON object"),
    ("{}", "weight_map must be a non-empty object"),
    ('{"weight_map": {}}', "weight_map must be a non-empty object"),
    ('{"weight_map": ["a"]}', "weight_map must be a non-empty object"),
    ('{"weight_map": null}', "weight_map must be a non-empty object"),
  ],
)
def test_index_that_is_wrong(content, message, tmp_path):
  _write_sharded(tmp_path, _RAW, _tensors(_RAW))
  (tmp_path / _INDEX).write_text(content, "utf-8")
  assert _error(tmp_path).startswith(f"{tmp_path / _INDEX}: {message}")


def test_index_and_shards_must_agree(tmp_path):
  _write_sharded(tmp_path, _RAW, _tensors(_RAW))
  index = json.loads((tmp_path / _INDEX).read_text("utf-8"))
  shard = index["weight_map"].pop("model.norm.weight")
  (tmp_path / _INDEX).write_text(json.dumps(index), "utf-8")
  assert _error(tmp_path) == (
    f"{tmp_path / shard}: model.norm.weight is in the file but not listed for"
    " it in the index"
  )
  index["weight_map"]["model.norm.weight"] = shard
  index["weight_map"]["model.other.weight"] = shard
  (tmp_path / _INDEX).write_text(json.dumps(index), "utf-8")
  assert _error(tmp_path) == (
    f"{tmp_path / shard}: model.other.weight is in the index but not the file"
  )


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("length", [0, 7, 8, 9, 200, "header", -4, -1])
def test_truncated_file(length, sharded, tmp_path):
  if sharded:
    _write_sharded(tmp_path, _RAW, _tensors(_RAW))
    path = tmp_path / "part1.safetensors"
  else:
    oracle_cases.write(tmp_path, _RAW, _tensors(_RAW))
    path = tmp_path / "model.safetensors"
  data = path.read_bytes()
  if length == "header":
    length = 8 + int.from_bytes(data[:8], "little")
  path.write_bytes(data[:length])
  assert _error(tmp_path).startswith(
    f"{path}: not a complete safetensors file: "
  )


def _raw_file(header, data=b""):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  return struct.pack("<Q", len(header)) + header + data


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
  "content",
  [
    b"PK\x03\x04" + bytes(100),
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2**40) + b"{}",
    _raw_file(b"{"),
    _raw_file(b"[]"),
    _raw_file(b"\xff\xff"),
    _raw_file({"a": 1}),
    _raw_file({"a": _entry()}, bytes(7)),
    _raw_file({"a": _entry()}, bytes(9)),
    _raw_file({"a": _entry(offsets=(0, 4))}, bytes(4)),
    _raw_file({"a": _entry(offsets=(8, 0))}, bytes(8)),
    _raw_file({"a": _entry(offsets=(-8, 0))}, bytes(8)),
    _raw_file({"a": _entry(offsets=(4, 12))}, bytes(12)),
    _raw_file({"a": _entry(), "b": _entry()}, bytes(8)),
    _raw_file({"a": _entry(shape=(-2,))}, bytes(8)),
    _raw_file({"a": _entry(shape=(2**40, 2**40))}, bytes(8)),
    _raw_file({"a": _entry(dtype="F33")}, bytes(8)),
  ],
)
def test_corrupt_header(content, tmp_path):
  oracle_cases.write(tmp_path, _RAW, _tensors(_RAW))
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  assert _error(tmp_path).startswith(
    f"{path}: not a complete safetensors file: "
  )


def test_weights_that_are_a_directory(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(_RAW), "utf-8")
  (tmp_path / "model.safetensors").mkdir()
  assert "model.safetensors: no such file" in _error(tmp_path)


def _error_after(change, tmp_path, dtype=None):
  tensors = _tensors(_RAW)
  change(tensors)
  oracle_cases.write(tmp_path, _RAW, tensors)
  return _error(tmp_path, dtype=dtype)


_UP = "model.layers.1.mlp.up_proj.weight"


def test_missing_tensors(tmp_path):
  message = _error_after(lambda tensors: tensors.pop(_UP), tmp_path)
  assert message == f"{tmp_path}: {_UP} is missing"

  def drop_both(tensors):
    tensors.pop(_UP)
    tensors.pop(_UP.replace("1", "0"))

  message = _error_after(drop_both, tmp_path)
  assert message == (
    f"{tmp_path}: {_UP.replace('1', '0')} is missing, and 1 more like it"
  )
  message = _error_after(lambda t: t.pop("lm_head.weight"), tmp_path)
  assert message == f"{tmp_path}: lm_head.weight is missing"


@pytest.mark.parametrize(
  "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.bias", "x", ""]
)
def test_unknown_tensor(name, tmp_path):
  message = _error_after(
    lambda tensors: tensors.update({name: np.ones(3, "f4")}), tmp_path
  )
  path = tmp_path / "model.safetensors"
  assert message == f"{path}: {name} is not a tensor of this config"


@pytest.mark.parametrize(
  "shape", [(8, 12), (96,), (12, 8, 1), (12, 7), (0, 8), ()]
)
def test_wrong_shape(shape, tmp_path):
  message = _error_after(
    lambda tensors: tensors.update({_UP: np.ones(shape, "f4")}), tmp_path
  )
  path = tmp_path / "model.safetensors"
  assert message == (
    f"{path}: {_UP} has shape {list(shape)}, but the config makes it [12, 8]"
  )


@pytest.mark.parametrize(("dtype", "name"), [("f8", "F64"), ("i1", "I8")])
def test_unsupported_dtype(dtype, name, tmp_path):
  message = _error_after(
    lambda tensors: tensors.update({_UP: tensors[_UP].astype(dtype)}), tmp_path
  )
  path = tmp_path / "model.safetensors"
  assert message == (
    f"{path}: {_UP} has dtype {name} (supported: F32, F16, BF16)"
  )


# A signalling NaN warns in some conversions, a quiet one does not.
@pytest.mark.parametrize(
  "bits", [0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_bytes", [64, 2**24])
def test_weights_that_are_not_finite(
  bits, dtype, block_bytes, tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", block_bytes)

  def spoil(tensors):
    tensors[_UP].view(np.uint32)[-1, -1] = bits

  message = _error_after(spoil, tmp_path, dtype)
  path = tmp_path / "model.safetensors"
  assert message == (
    f"{path}: {_UP} holds values that are not finite as {dtype}"
  )


@pytest.mark.parametrize("stored", ["f2", BF16])
def test_short_weights_that_are_not_finite(stored, tmp_path):
  for value in (np.nan, np.inf, -np.inf):
    tensors = _tensors(_RAW, stored)
    tensors[_UP][0, 0] = value
    oracle_cases.write(tmp_path, _RAW, tensors)
    assert f"{_UP} holds values that are not finite" in _error(tmp_path)


def test_float16_overflow(tmp_path):
  def grow(tensors):
    tensors[_UP][2, 2] = 65520.0

  message = _error_after(grow, tmp_path, "float16")
  assert f"{_UP} holds values that are not finite as float16" in message
  ffjax.load(tmp_path, "bfloat16")


@pytest.mark.parametrize(
  "change",
  [
    {"num_hidden_layers": 2**31 - 1},
    {"head_dim": 2**31 - 2},
    {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
  ],
)
def test_config_of_a_far_larger_model_takes_no_time(change, tmp_path):
  raw = {**_RAW, **change}
  oracle_cases.write(tmp_path, raw, _tensors(_RAW))
  assert "the config makes a model of" in _error(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_save_keeps_what_is_there(name, tmp_path):
  (tmp_path / name).write_text("precious", "utf-8")
  with pytest.raises(CheckpointError, match=f"{name} is there already"):
    ffjax.save(_model(), tmp_path)
  assert (tmp_path / name).read_text("utf-8") == "precious"
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", "a\0b", "\ud800"])
def test_save_to_what_is_no_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(CheckpointError, match="no name"):
    ffjax.save(_model(), name)
  assert not list(tmp_path.iterdir())


def test_save_where_nothing_can_be_written(tmp_path):
  model = _model()
  (tmp_path / "file").touch()
  with pytest.raises(CheckpointError, match="file: cannot be written"):
    ffjax.save(model, tmp_path / "file")
  (tmp_path / "model.safetensors.unfinished").mkdir()
  with pytest.raises(CheckpointError, match="cannot be written"):
    ffjax.save(model, tmp_path)


def test_failed_save_is_no_checkpoint_and_can_be_repeated(
  tmp_path, monkeypatch
):
  model = _model()
  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, "save_file", _raise_disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
      ffjax.save(model, tmp_path)
  assert "no such file" in _error(tmp_path, ConfigError)
  ffjax.save(model, tmp_path)
  _assert_same_bits(_by_name(ffjax.load(tmp_path)), _by_name(model))


def _raise_disk_full(*args, **kwargs):
  raise OSError(28, "No space left on device")


def _damage(data, random):
  """Returns `data` with one random change; most of them near the start."""
  limit = len(data) if random.randint(2) else min(len(data), 600)
  at = random.randint(limit)
  kind = random.randint(5)
  if kind == 0:
    return data[:at]
  if kind == 1:
    flipped = data[at] ^ (1 << random.randint(8))
    return data[:at] + bytes([flipped]) + data[at + 1 :]
  if kind == 2:
    # Another printable character: what stays JSON is the harder case.
    return data[:at] + bytes([random.randint(32, 127)]) + data[at + 1 :]
  if kind == 3:
    return data[:at] + random.bytes(random.randint(1, 9)) + data[at:]
  return data[:at] + data[at + random.randint(1, 9) :]


def _assert_as_damaged_files_say(model, directory):
  raw = json.loads((directory / "config.json").read_bytes())
  # The config's own defaults stand in for keys whose names were damaged.
  for key, default in (
    ("hidden_size", None),
    ("num_hidden_layers", None),
    ("num_key_value_heads", raw["num_attention_heads"]),
    ("max_position_embeddings", 2048),
    ("rms_norm_eps", 1e-6),
    ("rope_theta", 10000.0),
  ):
    assert getattr(model.config, key) == raw.get(key, default)
  stated = _parse_directory(directory)
  loaded = _by_name(model)
  for name, tensor in loaded.items():
    wide = tensor.astype(np.float32)
    assert wide.tobytes() == stated.pop(name).astype(np.float32).tobytes()
  for name in stated:
    assert name.endswith("rotary_emb.inv_freq")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(sharded, seed, tmp_path, monkeypatch):
  # Tracing the model takes most of the time of loading a tiny one.
  monkeypatch.setattr(params, "leaves", functools.cache(params.leaves))
  random = np.random.RandomState(seed)
  tensors = _tensors(_RAW, BF16 if seed % 2 else "f4")
  if sharded:
    _write_sharded(tmp_path, _RAW, tensors)
  else:
    oracle_cases.write(tmp_path, _RAW, tensors)
  sound = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
  num_loaded = num_refused = 0
  for _ in range(300):
    path = list(sound)[random.randint(len(sound))]
    path.write_bytes(_damage(sound[path], random))
    try:
      model = ffjax.load(tmp_path)
    except FfjaxError:
      num_refused += 1
    else:
      num_loaded += 1
      _assert_as_damaged_files_say(model, tmp_path)
    path.write_bytes(sound[path])
  assert num_loaded > 15
  assert num_refused > 100


# Prints by how many bytes the peak of a load exceeds what was used before.
_MEASURE = """
import sys
import ffjax
from ffjax import checkpoint

def peak_bytes():
  with open("/proc/self/status", encoding="ascii") as status:
    for line in status:
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024

warm_up, path, dtype = sys.argv[1:]
usual = checkpoint._BLOCK_BYTES
for checkpoint._BLOCK_BYTES in (usual, 64):
  ffjax.load(warm_up)
checkpoint._BLOCK_BYTES = usual
before = peak_bytes()
model = ffjax.load(path, dtype or None)
print(peak_bytes() - before)
"""


def _peak_growth_bytes(warm_up, path, dtype):
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(pathlib.Path(ffjax.__file__).parents[1]),
  }
  done = subprocess.run(
    [sys.executable, "-c", _MEASURE, warm_up, path, dtype],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return int(done.stdout)


# Three blocks: the pages of the mapped file, the copy of them, and that copy
# on its way to the device; the rest is for compiling the writes.
_SLACK_BYTES = 3 * checkpoint._BLOCK_BYTES

_LARGE = {
  **_TIED,
  "vocab_size": 8192,
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 4,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "head_dim": 64,
}

_needs_proc = pytest.mark.skipif(
  sys.platform != "linux", reason="reads the peak of memory from /proc"
)


def _large_tensors():
  random = np.random.default_rng(0)
  return {
    name: 0.02 * random.standard_normal(shape, np.float32)
    for name, shape in oracle_cases.shapes(_LARGE).items()
  }


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """A directory of about 300 MB in float32, and a tiny one."""
  directory = tmp_path_factory.mktemp("large")
  oracle_cases.write(directory / "tiny", _TIED, _tensors(_TIED))
  oracle_cases.write(directory / "large", _LARGE, _large_tensors())
  return directory


@_needs_proc
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_peak_memory_is_the_model_and_a_tensor(dtype, large):
  growth = _peak_growth_bytes(large / "tiny", large / "large", dtype)
  config = LlamaConfig.from_dict(_LARGE)
  model_bytes = config.num_params * (2 if dtype else 4)
  tensor_bytes = 4 * config.vocab_size * config.hidden_size
  assert 0.9 * model_bytes < growth
  assert growth < model_bytes + tensor_bytes + _SLACK_BYTES


@_needs_proc
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_peak_memory_of_gguf(dtype, large, tmp_path):
  gguf = pytest.importorskip("gguf", reason="the extra `gguf` is missing")
  path = tmp_path / "large.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(_LARGE["num_hidden_layers"])
  writer.add_context_length(128)
  writer.add_embedding_length(_LARGE["hidden_size"])
  writer.add_feed_forward_length(_LARGE["intermediate_size"])
  writer.add_head_count(_LARGE["num_attention_heads"])
  writer.add_head_count_kv(_LARGE["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(_LARGE["vocab_size"])
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
  random = np.random.default_rng(0)
  for name, shape in oracle_cases.shapes(_LARGE).items():
    kind = gguf.GGMLQuantizationType.F32
    values = random.standard_normal(shape, np.float32)
    if len(shape) == 2:
      kind = gguf.GGMLQuantizationType.Q8_0
      values = gguf.quantize(values, kind)
    found = names.get_name(name, try_suffixes=(".weight",))
    writer.add_tensor(found, values, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  growth = _peak_growth_bytes(large / "tiny", path, dtype)
  config = LlamaConfig.from_dict(_LARGE)
  model_bytes = config.num_params * (2 if dtype else 4)
  tensor_bytes = 4 * config.vocab_size * config.hidden_size
  assert 0.9 * model_bytes < growth
  assert growth < model_bytes + tensor_bytes + _SLACK_BYTES


@pytest.mark.parametrize(
  "name",
  [
    "model.safetensors",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
  ],
)
def test_broken_links_are_named(tmp_path, make_config, name):
  """A hub cache that lost a file must not load as if it never had it."""
  ffjax.save(ffjax.random_model(make_config()), tmp_path)
  (tmp_path / name).unlink(missing_ok=True)
  (tmp_path / name).symlink_to(tmp_path / "gone")
  with pytest.raises(ffjax.FfjaxError, match=name):
    ffjax.load(tmp_path)


def test_home_is_expanded(tmp_path, make_config, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  ffjax.save(ffjax.random_model(make_config()), "~/model")
  assert (tmp_path / "model" / "config.json").exists()
  assert ffjax.load("~/model").config == ffjax.load(tmp_path / "model").config


def test_open_reads_no_weights(tmp_path, make_config, monkeypatch):
  config = make_config()
  ffjax.save(ffjax.random_model(config), tmp_path)
  monkeypatch.setattr(checkpoint, "_load_leaf", None)
  opened = checkpoint.open_checkpoint(tmp_path)
  assert opened.config.hidden_size == config.hidden_size
  assert opened.tokenizer is None


def test_model_of_several_dtypes_is_saved(tmp_path, make_config):
  """No dtype but float32 holds bfloat16 and float16, or either and float32."""
  model = ffjax.random_model(make_config(), dtype="bfloat16")
  tree = jax.tree.map(lambda x: x, model.params)
  tree["norm"]["weight"] = tree["norm"]["weight"].astype(jnp.float16)
  ffjax.save(model.replace(params=tree), tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == (
    "float32"
  )
  chex.assert_trees_all_equal(ffjax.load(tmp_path).params, tree)
