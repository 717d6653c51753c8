"""Tests of `ffjax.model`, `ffjax.rope`, `ffjax.cache` and `ffjax.params`.

The oracle is transformers' Llama: run here where it is installed, and through
logits that it once computed everywhere else.
"""

import dataclasses
import functools
import json
import math
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle_cases
import pytest

import ffjax
from ffjax import cache as cache_lib
from ffjax import device_memory, params, rope
from ffjax import model as model_lib
from ffjax.cache import KVCache
from ffjax.config import LlamaConfig, RopeScaling
from ffjax.errors import RequestError
from ffjax.model import Llama, init_params
from ffjax.params import Model

_GOLDEN = pathlib.Path(__file__).parent / "golden/transformers_logits.json"
_EPS = float(np.finfo(np.float32).eps)


@functools.partial(jax.jit, static_argnames="dtype")
def _extend(model, token_ids, num_tokens, cache, dtype):
  llama = Llama(model.config, dtype)
  variables = {"params": model.params}
  hidden, cache = llama.apply(variables, token_ids, num_tokens, cache)
  return llama.apply(variables, hidden, method="logits"), cache


def _logits(model, token_ids, chunk=None, capacity=None, cache=None):
  """Returns float32 logits `[B, T, V]`, computed `chunk` tokens at a time."""
  token_ids = np.asarray(token_ids, np.int32)
  batch, length = token_ids.shape
  chunk = chunk or length
  if cache is None:
    cache = KVCache.create(model.config, batch, capacity or length, model.dtype)
  pieces = []
  for start in range(0, length, chunk):
    piece = token_ids[:, start : start + chunk]
    num_tokens = np.full(batch, piece.shape[1], np.int32)
    logits, cache = _extend(model, piece, num_tokens, cache, model.dtype.name)
    pieces.append(np.asarray(logits))
  np.testing.assert_array_equal(cache.lengths, length)
  return np.concatenate(pieces, axis=1)


def _rms(x):
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _assert_rounding_apart(actual, desired, config, rms=None):
  """Checks that two float32 computations of the same logits agree.

  Roundings, one per term of the residual stream, add up like a random walk:
  to eps * sqrt(L * D) of the logits' scale, here with a factor of 3. Single
  logits scatter; 8 standard deviations leave room for positions where
  attention is nearly undecided between two tokens.
  """
  assert actual.dtype == np.float32
  terms = config.num_hidden_layers * config.hidden_size
  bound = 3 * _EPS * math.sqrt(terms) * (rms or _rms(desired))
  error = np.asarray(actual, np.float64) - desired
  assert _rms(error) <= bound
  assert np.abs(error).max() <= 8 * bound


@functools.cache
def _random_model(config, dtype="float32"):
  """Weights large enough for logits near 1 and for attention with peaks."""
  model = params.random_model(config, dtype=dtype)
  return dataclasses.replace(
    model,
    params=jax.tree.map(
      lambda leaf: leaf * jnp.asarray(6 if leaf.ndim > 2 else 1, leaf.dtype),
      model.params,
    ),
  )


@pytest.fixture
def oracle():
  """Builds transformers' model of a case, with its weights, in float32."""
  torch = pytest.importorskip("torch", reason="the extra `oracle` is missing")
  transformers = pytest.importorskip(
    "transformers", reason="the extra `oracle` is missing"
  )
  torch.set_num_threads(1)
  # Its progress bars would fill the report of a failing test.
  transformers.logging.disable_progress_bar()

  def make(name, tensors):
    config = transformers.LlamaConfig(**oracle_cases.CASES[name])
    model = transformers.LlamaForCausalLM(config).float().eval()
    found = model.load_state_dict(
      {key: torch.from_numpy(value) for key, value in tensors.items()},
      strict=False,
    )
    assert not found.unexpected_keys
    # Tied, the head shares the embedding and is listed as missing.
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert found.missing_keys == tied
    return model

  return make


def _oracle_logits(model, token_ids):
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(token_ids).long()).logits.float().numpy()


@pytest.mark.parametrize("name", oracle_cases.CASES)
def test_logits_equal_transformers(name, oracle, tmp_path):
  theirs = oracle(name, oracle_cases.weights(name))
  theirs.save_pretrained(tmp_path)
  token_ids = oracle_cases.token_ids(name)
  desired = _oracle_logits(theirs, token_ids)

  model = ffjax.load(tmp_path)
  assert model.dtype == np.float32
  whole = _logits(model, token_ids)
  _assert_rounding_apart(whole, desired, model.config)
  steps = _logits(model, token_ids, chunk=1, capacity=64)
  _assert_rounding_apart(steps, desired, model.config)


@pytest.mark.parametrize("name", oracle_cases.CASES)
def test_bfloat16_is_as_good_as_transformers(name, oracle, tmp_path):
  # Weights that bfloat16 holds, so that only the computation differs.
  weights = {
    key: value.astype(ml_dtypes.bfloat16).astype(np.float32)
    for key, value in oracle_cases.weights(name).items()
  }
  theirs = oracle(name, weights)
  token_ids = oracle_cases.token_ids(name)
  exact = _oracle_logits(theirs, token_ids)
  their_error = _rms(_oracle_logits(theirs.bfloat16(), token_ids) - exact)

  theirs.save_pretrained(tmp_path)
  model = ffjax.load(tmp_path)
  assert model.dtype == ml_dtypes.bfloat16
  our_error = _rms(_logits(model, token_ids) - exact)
  assert our_error <= 1.5 * their_error
  # They are of the size of bfloat16's rounding, so the comparison is not void.
  assert our_error > 1e-4


@pytest.mark.parametrize("name", oracle_cases.CASES)
def test_rope_frequencies_equal_transformers(name, oracle):
  theirs = oracle(name, oracle_cases.weights(name)).model.rotary_emb
  raw = oracle_cases.CASES[name]
  config = LlamaConfig.from_dict(raw)
  ours = rope.inv_freq(config)
  assert ours.dtype == np.float32
  assert theirs.attention_scaling == 1.0
  # They compute theta ** x in float32: an error of x is one of ln(theta) in
  # the power. Dividing the frequency by a factor divides its error, except
  # within llama3's ramp.
  unscaled = rope.inv_freq(dataclasses.replace(config, rope_scaling=None))
  slack = _EPS * (4 + math.log(config.rope_theta)) * unscaled
  assert (np.abs(ours - theirs.inv_freq.numpy()) <= slack).all()
  if config.rope_scaling is not None:
    assert (ours < unscaled / 1.5).any()


def test_rope_frequencies_of_llama_3_2_equal_transformers():
  pytest.importorskip("torch", reason="the extra `oracle` is missing")
  transformers = pytest.importorskip(
    "transformers", reason="the extra `oracle` is missing"
  )
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  for name in ("llama-3.2-1b", "llama-3.1-8b"):
    config = ffjax.preset(name)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
      transformers.LlamaConfig(**config.to_dict()), device="cpu"
    )
    unscaled = rope.inv_freq(dataclasses.replace(config, rope_scaling=None))
    slack = _EPS * (4 + math.log(config.rope_theta)) * unscaled
    assert (np.abs(rope.inv_freq(config) - theirs.numpy()) <= slack).all()


def test_rope_frequencies_by_hand(make_config):
  config = make_config(head_dim=8, rope_theta=10000.0)
  np.testing.assert_allclose(
    rope.inv_freq(config), [1, 0.1, 0.01, 0.001], rtol=_EPS
  )
  linear = RopeScaling(rope_type="linear", factor=4.0)
  np.testing.assert_allclose(
    rope.inv_freq(dataclasses.replace(config, rope_scaling=linear)),
    [0.25, 0.025, 0.0025, 0.00025],
    rtol=_EPS,
  )
  # 200 pi positions: 100, 10, 1 and 0.1 turns; the ramp is from 0.5 to 4.
  llama3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=0.5,
    high_freq_factor=4.0,
    original_max_position_embeddings=628,
  )
  turns = 628 * 0.01 / (2 * math.pi)
  kept = (turns - 0.5) / 3.5
  np.testing.assert_allclose(
    rope.inv_freq(dataclasses.replace(config, rope_scaling=llama3)),
    [1, 0.1, 0.01 * (kept + (1 - kept) / 8), 0.001 / 8],
    rtol=2 * _EPS,
  )


@pytest.mark.parametrize("name", oracle_cases.CASES)
def test_logits_equal_golden(name, tmp_path):
  golden = json.loads(_GOLDEN.read_text("utf-8"))["cases"]
  assert list(golden) == list(oracle_cases.CASES)
  oracle_cases.write(
    tmp_path, oracle_cases.CASES[name], oracle_cases.weights(name)
  )
  model = ffjax.load(tmp_path)
  logits = _logits(model, oracle_cases.token_ids(name))
  places = tuple(np.transpose(golden[name]["places"]))
  _assert_rounding_apart(
    logits[places],
    np.asarray(golden[name]["logits"]),
    model.config,
    rms=golden[name]["rms"],
  )


@pytest.mark.parametrize(
  ("prompt", "expected"),
  [
    (
      [1],
      "403 407 261 378 432 383 286 261 376 298 315 421 395 317 426 338 401 396"
      " 267 337 410 408 419 292 411 322 265 282 295 433 426",
    ),
    (
      [1, 410, 469, 347],
      "286 261 376 298 315 421 395 317 426 338 401 396 267 337 410",
    ),
    (
      [1, 403, 407, 261, 378, 432, 383, 286, 261, 400, 428, 395],
      "392 412 444 426 392 412 444 401 396 267 337 335",
    ),
  ],
)
def test_stories260k_continues_as_known(shared_models, prompt, expected):
  model = ffjax.load(shared_models / "stories260k")
  cache = KVCache.create(model.config, 1, 64, np.float32)
  found, new = [], prompt
  for _ in expected.split():
    num_tokens = np.asarray([len(new)], np.int32)
    logits, cache = _extend(
      model, np.asarray([new], np.int32), num_tokens, cache, "float32"
    )
    new = [int(logits[0, -1].argmax())]
    found += new
  assert found == [int(token_id) for token_id in expected.split()]


def test_stories260k_logits_are_known(shared_models):
  model = ffjax.load(shared_models / "stories260k")
  logits = _logits(model, [[1]])[0, 0]
  assert logits.argmax() == 403
  # Known to the digits given.
  assert logits.max() == pytest.approx(17.02352, abs=1e-4)
  np.testing.assert_allclose(
    logits[:5], [-6.2229, 8.4043, -6.2237, -6.2225, -6.222], atol=1e-4
  )


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_give_the_logits_of_the_whole(make_config, chunk):
  model = _random_model(make_config())
  token_ids = np.random.RandomState(0).randint(40, size=(2, 15))
  whole = _logits(model, token_ids)
  assert _rms(whole) > 0.05
  _assert_rounding_apart(
    _logits(model, token_ids, chunk=chunk), whole, model.config
  )
  # Spare room in the cache means nothing, and exactly full works.
  _assert_rounding_apart(
    _logits(model, token_ids, chunk=chunk, capacity=64), whole, model.config
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 4])
def test_attention_in_blocks_gives_the_logits_of_the_whole(
  make_config, monkeypatch, dtype, block
):
  model = _random_model(make_config(), dtype)
  ids = np.random.default_rng(0).integers(0, 40, (2, 19))
  jax.clear_caches()
  whole = _logits(model, ids, capacity=32)
  seen = []
  attend = model_lib._attend

  def watched(query, *args):
    seen.append(query.shape[1])
    return attend(query, *args)

  monkeypatch.setattr(model_lib, "_attend", watched)
  # A power of two, though there is room for some more.
  scores_bytes = 4 * 2 * 4 * 32 * block
  monkeypatch.setattr(model_lib, "_SCORES_BYTES", scores_bytes * 3 // 2)
  jax.clear_caches()
  blocks = _logits(model, ids, capacity=32)
  one_chunk = _logits(model, ids, chunk=7, capacity=32)
  assert set(seen) <= {block, 7, 5}
  assert block in seen
  jax.clear_caches()
  atol = 2e-6 if dtype == "float32" else 2e-2
  for found in (blocks, one_chunk):
    np.testing.assert_allclose(found, whole, rtol=0, atol=atol * _rms(whole))


def test_ragged_batch_equals_singles(make_config):
  model = _random_model(make_config())
  random = np.random.RandomState(1)
  first, second = [7, 1, 4, 0], [2, 3, 0, 5]
  cache = KVCache.create(model.config, 4, 16, np.float32)
  rows = [[] for _ in first]
  logits_of = [[] for _ in first]
  for counts in (first, second):
    token_ids = random.randint(40, size=(4, max(counts))).astype(np.int32)
    logits, cache = _extend(
      model, token_ids, np.asarray(counts, np.int32), cache, "float32"
    )
    for row, count in enumerate(counts):
      rows[row] += list(token_ids[row, :count])
      logits_of[row] += list(np.asarray(logits)[row, :count])
  lengths = [a + b for a, b in zip(first, second, strict=True)]
  assert list(cache.lengths) == lengths
  for row, single in enumerate(rows):
    alone = _logits(model, [single], capacity=16)[0]
    _assert_rounding_apart(np.asarray(logits_of[row]), alone, model.config)
  # Padding has written nothing.
  for row, length in enumerate(lengths):
    assert not np.asarray(cache.k)[:, row, :, length:].any()
    assert not np.asarray(cache.v)[:, row, :, length:].any()
    assert np.asarray(cache.k)[:, row, :, :length].any(axis=(0, 1, 3)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_past_the_live_length_changes_no_bit(make_config, dtype):
  model = _random_model(make_config(), dtype)
  random = np.random.RandomState(2)
  prompt = random.randint(40, size=(3, 6)).astype(np.int32)
  more = random.randint(40, size=(3, 5)).astype(np.int32)
  cache = KVCache.create(model.config, 3, 16, dtype)
  _, cache = _extend(
    model, prompt, np.asarray([6, 2, 0], np.int32), cache, dtype
  )

  live = np.arange(16)[:, None] < np.asarray(cache.lengths)[:, None, None, None]

  def noisy(array):
    noise = jnp.asarray(100 * random.standard_normal(array.shape), array.dtype)
    return jnp.where(live, array, noise)

  counts = np.asarray([5, 3, 1], np.int32)
  clean, _ = _extend(model, more, counts, cache, dtype)
  dirty, _ = _extend(
    model,
    more,
    counts,
    cache.replace(k=noisy(cache.k), v=noisy(cache.v)),
    dtype,
  )
  for row, count in enumerate(counts):
    np.testing.assert_array_equal(clean[row, :count], dirty[row, :count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_do_not_depend_on_later_tokens(make_config, dtype):
  model = _random_model(make_config(), dtype)
  token_ids = np.random.RandomState(3).randint(40, size=(2, 9))
  changed = token_ids.copy()
  changed[:, 5:] = (changed[:, 5:] + 1) % 40
  before, after = _logits(model, token_ids), _logits(model, changed)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (before[:, 5:] != after[:, 5:]).any(axis=(0, 2)).all()


def test_logits_do_depend_on_every_earlier_token(make_config):
  model = _random_model(make_config())
  token_ids = np.random.RandomState(4).randint(40, size=(1, 9))
  last = _logits(model, token_ids)[0, -1]
  for position in range(9):
    changed = token_ids.copy()
    changed[0, position] = (changed[0, position] + 1) % 40
    moved = np.abs(_logits(model, changed)[0, -1] - last).max()
    assert moved > 100 * _EPS * _rms(last)


def test_batch_rows_do_not_see_each_other(make_config):
  model = _random_model(make_config())
  token_ids = np.random.RandomState(5).randint(40, size=(3, 6))
  changed = token_ids.copy()
  changed[1] = (changed[1] + 1) % 40
  before, after = _logits(model, token_ids), _logits(model, changed)
  np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-70b"])
def test_shapes_of_large_models_need_no_memory(name):
  config = ffjax.preset(name)
  tree = jax.eval_shape(
    functools.partial(init_params, config=config, dtype=jnp.bfloat16),
    jax.random.key(0),
  )
  flat = flax.traverse_util.flatten_dict(tree)
  assert sum(leaf.size for leaf in flat.values()) == config.num_params
  assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(jnp.bfloat16)}
  assert flat["layers", "mlp", "down_proj", "weight"].shape == (
    config.num_hidden_layers,
    config.hidden_size,
    config.intermediate_size,
  )
  cache = jax.eval_shape(
    lambda: KVCache.create(config, 1, 131072, jnp.bfloat16)
  )
  assert cache.capacity == 131072
  cache_bytes = sum(x.size * x.dtype.itemsize for x in (cache.k, cache.v))
  assert cache_bytes == 131072 * config.kv_bytes_per_token(2)
  logits, after = jax.eval_shape(
    functools.partial(_extend, dtype="bfloat16"),
    Model(params=tree, config=config),
    jax.ShapeDtypeStruct((1, 8), jnp.int32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    cache,
  )
  assert logits.shape == (1, 8, config.vocab_size)
  assert logits.dtype == jnp.float32
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), cache
  )


@pytest.mark.parametrize("name", oracle_cases.CASES)
def test_leaves_list_the_published_names(name):
  raw = oracle_cases.CASES[name]
  config = LlamaConfig.from_dict(raw)
  shapes = {
    tensor: leaf.tensor_shape
    for leaf in params.leaves(config)
    for tensor in leaf.names
  }
  tensors = oracle_cases.weights(name)
  assert shapes == {key: value.shape for key, value in tensors.items()}
  assert sum(x.size for x in tensors.values()) == config.num_params


def test_random_model_leaves_nothing_at_its_default(make_config):
  config = make_config(attention_bias=True, mlp_bias=True)
  model = params.random_model(config, seed=3)
  same = params.random_model(config, seed=3)
  other = params.random_model(config, seed=4)
  for leaf, again, different in zip(
    *(jax.tree.leaves(m.params) for m in (model, same, other)), strict=True
  ):
    assert leaf.dtype == jnp.bfloat16
    assert np.asarray(leaf, np.float32).std() > 0.005
    np.testing.assert_array_equal(leaf, again)
    assert (leaf != different).any()


@pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense", 3])
def test_random_model_refuses_other_dtypes(make_config, dtype):
  with pytest.raises(RequestError, match="dtype=.* is not supported"):
    params.random_model(make_config(), dtype=dtype)


def test_random_model_refuses_what_does_not_fit(make_config, monkeypatch):
  config = make_config(hidden_size=128, intermediate_size=128, head_dim=32)
  # Quantised too: scales and zero points count.
  for name in (None, "int4_g32_asym", "int8"):
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: None)
    made = params.random_model(config, dtype="float32", format_name=name)
    need = sum(x.nbytes for x in jax.tree.leaves(made.params))
    assert name is not None or need == config.num_params * 4
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: need)  # noqa: B023
    params.random_model(config, dtype="float32", format_name=name)
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: need - 1)  # noqa: B023
    with pytest.raises(RequestError, match="the model as .* takes"):
      params.random_model(config, dtype="float32", format_name=name)


@pytest.mark.parametrize(
  ("weights", "activations", "itemsize_bytes"),
  [
    ("float32", "float32", 4),
    ("bfloat16", "bfloat16", 2),
    ("float16", "float32", 2),
  ],
)
def test_model_dtypes(make_config, weights, activations, itemsize_bytes):
  model = params.random_model(make_config(), dtype=weights)
  assert model.dtype.name == activations
  for batch in (1, 3):
    assert model.weight_bytes_per_step(
      batch
    ) == model.config.weight_bytes_per_step(itemsize_bytes, batch)
  token_bytes = model.config.kv_bytes_per_token(model.dtype.itemsize)
  assert model.bytes_per_step(2, 5.5) == (
    model.weight_bytes_per_step(2) + 11 * token_bytes
  )
  assert np.isfinite(_logits(model, [[1, 2]])).all()


def test_one_matrix_in_float32_makes_activations_float32(make_config):
  model = params.random_model(make_config(), dtype="bfloat16")
  tree = jax.tree.map(lambda x: x, model.params)
  tree["norm"]["weight"] = tree["norm"]["weight"].astype(jnp.float32)
  assert model.replace(params=tree).dtype == jnp.bfloat16
  up = tree["layers"]["mlp"]["up_proj"]
  up["weight"] = up["weight"].astype(jnp.float32)
  assert model.replace(params=tree).dtype == np.float32


def test_cache_capacity_is_rounded_up():
  assert [cache_lib.rounded_capacity(n) for n in (1, 64, 65, 128)] == [
    64,
    64,
    128,
    128,
  ]


def test_cache_must_fit(make_config, monkeypatch):
  config = make_config()
  # 2 arrays x 2 layers x 2 heads x 4 elements x 2 bytes.
  need = 3 * 64 * 64
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: need)
  cache_lib.check_fits(config, 3, 64, jnp.bfloat16)
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: need - 1)
  with pytest.raises(RequestError, match="KV cache for 3 x 64 tokens takes"):
    cache_lib.check_fits(config, 3, 64, jnp.bfloat16)


def test_unknown_free_memory_refuses_nothing(make_config, monkeypatch):
  monkeypatch.setattr(device_memory, "free_bytes", lambda _: None)
  cache_lib.check_fits(make_config(), 10**9, 10**9, jnp.bfloat16)
