"""Decoding: the loop against single steps, batches against single prompts."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax import (
  cache,
  decode,
  device_memory,
  implementation,
  scoring,
  stepping,
)
from ffjax.errors import RequestError
from ffjax.sampling import choose

PROMPTS = [[1], [5, 9, 11], list(range(2, 22)), [7, 7, 7, 7, 7]]

SAMPLINGS = {
  "greedy": decode.Sampling(),
  "temperature": decode.Sampling(temperature=1.5, seed=3),
  "everything": decode.Sampling(
    temperature=1.2,
    top_k=20,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    seed=4,
  ),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, make_config):
  return sharpened(make_config(), request.param)


def sharpened(config, dtype="float32"):
  """A random model whose choices are not near ties."""
  model = ffjax.random_model(config, seed=1, dtype=dtype)
  return model.replace(params=jax.tree.map(lambda x: x * 8, model.params))


@pytest.fixture(scope="module")
def ending_model(make_config):
  """Several eos tokens, so that sequences end at different times."""
  return sharpened(make_config(eos_token_ids=(3, 12, 20, 33)))


@functools.partial(jax.jit, static_argnames="dtype")
def all_logits(model, token_ids, dtype=None):
  """Logits `[T, V]` of one whole sequence at once, from an empty cache."""
  t = len(token_ids)
  hidden, _ = implementation.reference_hidden(
    model,
    token_ids[None],
    jnp.full((1,), t, jnp.int32),
    decode.KVCache.create(model.config, 1, t, dtype or model.dtype),
  )
  return implementation.reference_logits(model, hidden[0])


def naive(model, prompt, max_new_tokens, sampling, row=0):
  """Generates by running the whole sequence anew for each token, no cache."""
  tokens = np.zeros(48, np.int32)
  tokens[: len(prompt)] = prompt
  end = len(prompt)
  key = sampling.keys(row + 1)[row:]
  pick = jax.jit(choose)
  while end < len(prompt) + max_new_tokens:
    # What follows `end` is padding, which earlier tokens do not see.
    logits = all_logits(model, tokens)[end - 1][None]
    seen = np.zeros(logits.shape, bool)
    seen[0, tokens[:end]] = True
    position = np.asarray([end], np.int32)
    tokens[end] = int(pick(logits, sampling, key, position, seen)[0])
    end += 1
    if tokens[end - 1] in model.config.eos_token_ids:
      break
  return tokens[len(prompt) : end].tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_generate_equals_recomputing_everything(ending_model, sampling):
  out = decode.generate(ending_model, PROMPTS, 12, sampling=sampling)
  for row, prompt in enumerate(PROMPTS):
    expected = naive(ending_model, prompt, 12, sampling, row)
    assert out.token_ids[row] == expected
    ended = expected[-1] in ending_model.config.eos_token_ids
    assert out.ended[row] == ended
  # Otherwise this test would not see a sequence that ends before the others.
  assert len(set(map(len, out.token_ids))) > 1


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_stream_and_steps_equal_generate(model, sampling):
  expected = decode.generate(model, PROMPTS, 9, sampling=sampling).token_ids
  streamed = np.stack(list(decode.stream(model, PROMPTS, 9, sampling=sampling)))
  np.testing.assert_array_equal(streamed.T, expected)

  lengths = np.asarray([len(prompt) for prompt in PROMPTS], np.int32)
  token_ids = np.zeros((4, 20), np.int32)
  for row, prompt in zip(token_ids, PROMPTS, strict=True):
    row[: len(prompt)] = prompt
  state = decode.prefill(model, token_ids, lengths, sampling, capacity=64)
  stepped = [np.asarray(state.token_ids)]
  for _ in range(8):
    state = decode.decode_step(model, state, sampling)
    stepped.append(np.asarray(state.token_ids))
  np.testing.assert_array_equal(np.stack(stepped).T, expected)
  np.testing.assert_array_equal(state.cache.lengths, lengths + 8)


def test_stream_ends_with_the_last_sequence(ending_model):
  expected = decode.generate(ending_model, PROMPTS, 40).token_ids
  rows = np.stack(list(decode.stream(ending_model, PROMPTS, 40))).T
  assert rows.shape[1] == max(map(len, expected)) < 40
  for row, ids in zip(rows, expected, strict=True):
    assert row.tolist() == ids + [decode.NO_TOKEN] * (len(row) - len(ids))


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_batch_equals_single_prompts(model, batch):
  rng = np.random.default_rng(batch)
  prompts = [
    rng.integers(0, 40, rng.integers(1, 30)).tolist() for _ in range(batch)
  ]
  together = decode.generate(model, prompts, 10).token_ids
  alone = [
    decode.generate(model, prompt, 10).token_ids[0] for prompt in prompts
  ]
  assert together == alone


def test_prompts_may_be_arrays(model):
  rows = [[5, 9, 11], [1, 2, 3]]
  expected = decode.generate(model, rows, 3).token_ids
  for array in (np.asarray(rows), jnp.asarray(rows), list(np.asarray(rows))):
    assert decode.generate(model, array, 3).token_ids == expected
    assert decode.generate(model, array[0], 3).token_ids == expected[:1]
  assert decode.generate(model, tuple(rows[0]), 3).token_ids == expected[:1]


def test_finished_sequences_stay_as_they_are(ending_model):
  sampling = decode.Sampling(repetition_penalty=1.3)
  lengths = np.asarray([len(prompt) for prompt in PROMPTS], np.int32)
  token_ids = np.zeros((4, 20), np.int32)
  for row, prompt in zip(token_ids, PROMPTS, strict=True):
    row[: len(prompt)] = prompt
  state = decode.prefill(
    ending_model, token_ids, lengths, sampling, capacity=64
  )
  ended_early = False
  for _ in range(40):
    before = jax.tree.map(np.asarray, state.replace(keys=None))
    state = decode.decode_step(ending_model, state, sampling)
    ended = np.flatnonzero(before.finished)
    ended_early |= 0 < len(ended) < len(lengths)
    for name in ("token_ids", "finished", "seen"):
      then, now = getattr(before, name), np.asarray(getattr(state, name))
      np.testing.assert_array_equal(then[ended], now[ended], err_msg=name)
    for name in ("k", "v", "lengths"):
      then, now = getattr(before.cache, name), getattr(state.cache, name)
      at = (slice(None), ended) if then.ndim > 1 else (ended,)
      np.testing.assert_array_equal(then[at], np.asarray(now)[at])
  assert ended_early


def test_user_jit_of_the_pieces(model):
  token_ids = jnp.asarray([[5, 9, 11, 0]], jnp.int32)
  lengths = jnp.asarray([3], jnp.int32)

  @jax.jit
  def three_tokens(model, sampling):
    state = decode.prefill(model, token_ids, lengths, sampling, capacity=64)
    tokens = [state.token_ids]
    for _ in range(2):
      state = decode.decode_step(model, state, sampling)
      tokens.append(state.token_ids)
    return jnp.stack(tokens, axis=1)

  for sampling in SAMPLINGS.values():
    expected = decode.generate(model, [5, 9, 11], 3, sampling=sampling)
    assert three_tokens(model, sampling).tolist() == expected.token_ids


def test_cache_is_donated_and_continues(model):
  first = decode.generate(model, [5, 9, 11], 6).token_ids[0]
  state = decode.prefill(
    model,
    jnp.asarray([[5, 9, 11]], jnp.int32),
    jnp.asarray([3], jnp.int32),
    capacity=64,
  )
  k = state.cache.k
  pointer = k.unsafe_buffer_pointer()
  state = decode.decode_step(model, state)
  assert k.is_deleted()
  assert state.cache.k.unsafe_buffer_pointer() == pointer
  # A second turn: the newest token and the user's words after it.
  more = [int(state.token_ids[0]), 2, 30]
  state = decode.prefill(
    model,
    jnp.asarray([more], jnp.int32),
    jnp.asarray([3], jnp.int32),
    cache=state.cache,
  )
  whole = [5, 9, 11, first[0], *more]
  assert int(state.cache.lengths[0]) == len(whole)
  expected = decode.generate(model, whole, 1).token_ids[0]
  assert state.token_ids.tolist() == expected


def test_one_implementation_takes_over_from_another(make_config):
  model = sharpened(make_config())
  whole = decode.generate(model, [4, 8], 10).token_ids[0]
  state = decode.prefill(
    model,
    jnp.asarray([[4, 8]], jnp.int32),
    jnp.asarray([2], jnp.int32),
    capacity=64,
  )
  tokens = state.token_ids.tolist()
  for name in itertools.islice(
    itertools.cycle(["reference", "reference_float32"]), 9
  ):
    state = decode.decode_step(model, state, implementation=name)
    tokens += state.token_ids.tolist()
  assert tokens == whole


def test_steps_equal_the_loop_and_respect_their_number(ending_model):
  def start():
    return decode.prefill(
      ending_model,
      jnp.asarray([[1, 2], [3, 4]], jnp.int32),
      jnp.asarray([2, 2], jnp.int32),
      capacity=64,
      stop_on_eos=False,
    )

  state, tokens = decode.decode_steps(
    ending_model, start(), 5, max_steps=8, stop_on_eos=False
  )
  assert (np.asarray(tokens)[:, 5:] == decode.NO_TOKEN).all()
  assert (np.asarray(tokens)[:, :5] >= 0).all()
  np.testing.assert_array_equal(state.cache.lengths, [7, 7])
  one = start()
  for t in range(5):
    one = decode.decode_step(ending_model, one, stop_on_eos=False)
    np.testing.assert_array_equal(one.token_ids, tokens[:, t])
  chex.assert_trees_all_close(one.cache, state.cache, atol=1e-5)


@pytest.mark.parametrize("stop_on_eos", [True, False])
@pytest.mark.parametrize("num_steps", [0, 3, 8, 9, 16, 21, 30])
def test_rare_looks_change_nothing(
  ending_model, num_steps, stop_on_eos, monkeypatch
):
  # As on a GPU: eight steps between two looks, until fewer than that are left.
  def run():
    state = decode.prefill(
      ending_model,
      np.full((3, 4), 7, np.int32) + np.arange(3, dtype=np.int32)[:, None],
      np.asarray([4, 2, 3], np.int32),
      SAMPLINGS["everything"],
      capacity=64,
      stop_on_eos=stop_on_eos,
    )
    # Not jitted as users do, or the second trace would be the first one.
    loop = jax.jit(
      functools.partial(
        decode.decode_steps.__wrapped__,
        max_steps=21,
        stop_on_eos=stop_on_eos,
      )
    )
    return loop(ending_model, state, num_steps, SAMPLINGS["everything"])

  often = run()
  monkeypatch.setattr(stepping, "_looks_are_costly", lambda *_: True)
  rarely = run()
  jax.tree.map(
    np.testing.assert_array_equal,
    *(jax.tree.map(_plain_key, x) for x in (often, rarely)),
  )


def _plain_key(x):
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(x) if is_key else x


def test_full_cache_ends_a_sequence(model):
  """The decode loop must not write, or claim, a token that has no slot."""
  state = decode.prefill(
    model,
    jnp.asarray([[5, 9, 11]], jnp.int32),
    jnp.asarray([3], jnp.int32),
    capacity=6,
  )
  state, tokens = decode.decode_steps(model, state, 20, max_steps=20)
  assert int(state.cache.lengths[0]) == 6
  assert int((tokens != decode.NO_TOKEN).sum()) == 3
  expected = decode.generate(model, [5, 9, 11], 4).token_ids[0]
  assert tokens[0, :3].tolist() == expected[1:]


def test_long_prompt_in_chunks_equals_whole(make_config, monkeypatch):
  model = sharpened(make_config())
  prompt = np.random.default_rng(0).integers(0, 40, 100).tolist()
  arrays = (
    jnp.asarray([prompt, prompt[:37] + [0] * 63], jnp.int32),
    jnp.asarray([100, 37], jnp.int32),
  )

  def run():
    empty = decode.KVCache.create(model.config, 2, 128, np.float32)
    return decode.forward(model, *arrays, empty)

  whole = run()
  monkeypatch.setattr(stepping, "_MAX_CHUNK", 8)
  assert stepping.chunk_length(2, 100) == 8
  chex.assert_trees_all_close(run(), whole, atol=2e-4)


def test_prefill_memory_grows_with_the_cache_not_its_square(make_config):
  """Temporary memory for T tokens must stay far below T x T scores."""
  config = make_config(max_position_embeddings=1 << 17)
  model = jax.eval_shape(lambda: ffjax.random_model(config).params)
  model = ffjax.Model(params=model, config=config)
  t = 1 << 17
  compiled = decode.prefill.lower(
    model,
    jax.ShapeDtypeStruct((1, t), jnp.int32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    capacity=t,
  ).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 2**30 < 4 * config.num_attention_heads * t * t


@pytest.mark.parametrize(
  ("batch", "tokens", "expected"),
  [
    (1, 1, 1),
    (1, 3, 4),
    (1, 63, 64),
    (1, 65, 128),
    (1, 2048, 2048),
    # Two of about the same length.
    (1, 2049, 1088),
    (1, 131072, 2048),
    (5, 3276, 1638),
    (16, 131072, 512),
    (10000, 5, 1),
  ],
)
def test_chunk_length(batch, tokens, expected):
  assert stepping.chunk_length(batch, tokens) == expected


def test_second_call_of_the_same_shape_compiles_nothing(model):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **kwargs: (
      compiled.append(kwargs) if "backend_compile" in name else None
    )
  )
  for sampling in SAMPLINGS.values():
    decode.generate(model, PROMPTS[:3], 20, sampling=sampling)
  assert compiled
  compiled.clear()
  for sampling in SAMPLINGS.values():
    if not sampling.greedy:
      sampling = sampling.replace(seed=9, temperature=0.3)
    # Lengths that differ within a bucket, and other values, are the same
    # shape.
    decode.generate(model, PROMPTS[1:], 25, sampling=sampling)
  assert not compiled

  decode.warm_up(model, PROMPTS, 20)
  compiled.clear()
  list(decode.stream(model, PROMPTS, 20))
  assert not compiled


def test_auto_is_the_reference_here_and_fused_says_what_is_missing(model):
  assert implementation.resolve("auto").name == "reference"
  with pytest.raises(RequestError, match="implementation='fused' cannot run"):
    decode.generate(model, [1], 1, implementation="fused")
  with pytest.raises(RequestError, match="implementation='x' does not exist"):
    decode.generate(model, [1], 1, implementation="x")


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([], {}, "no prompts"),
    ([[]], {}, "prompt 0 is empty"),
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1], [2, 40]], {}, "prompt 1 has token id 40, outside the vocabulary"),
    ([[-1]], {}, "prompt 0 has token id -1"),
    ([[1.5]], {}, "prompt 0 has 1.5, not a token id"),
    (np.asarray([[1.5]]), {}, "prompt 0 has .*1.5.*, not a token id"),
    (None, {}, "prompts must be text or a sequence, not NoneType"),
    ((x for x in [1]), {}, "prompts must be .* not generator"),
    ([b"x"], {}, "prompt 0 must be text or a sequence, not bytes"),
    ([[1], 2], {}, "prompt 1 must be text or a sequence, not int"),
    ("text", {}, "prompt 0 is text, but the checkpoint has no tokenizer"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ([1], {"max_new_tokens": 2.0}, "max_new_tokens=2.0 is not an integer"),
    ([1] * 100, {"max_new_tokens": 29}, "more than max_position_embeddings"),
    ([1] * 10, {"max_new_tokens": 9, "capacity": 18}, "more than capacity=18"),
    ([1], {"capacity": 64.0}, "capacity=64.0 is not an integer"),
    ([1], {"sampling": 0.7}, "sampling=0.7 is not a decode.Sampling"),
  ],
)
def test_errors_name_the_argument(make_config, prompts, options, message):
  model = sharpened(make_config())
  for function in (decode.generate, decode.stream, decode.warm_up):
    with pytest.raises(RequestError, match=message):
      function(model, prompts, **options)


@pytest.mark.parametrize(
  "call",
  [
    lambda x: decode.generate(x, [1]),
    lambda x: decode.stream(x, [1]),
    lambda x: decode.warm_up(x, [1]),
    lambda x: decode.compare(x, [1, 2]),
    lambda x: scoring.bits_per_byte(x, ["a text"]),
    lambda x: ffjax.pack(x),
    lambda x: ffjax.unpack(x),
    lambda x: ffjax.quantize(x, "int8"),
    lambda x: ffjax.save(x, "never made"),
  ],
)
def test_a_path_in_the_place_of_a_model_is_one_clear_error(call):
  with pytest.raises(RequestError, match="ffjax.load returns, not str"):
    call("checkpoints/tiny_llama")


def test_a_name_in_the_place_of_a_config_is_one_clear_error():
  with pytest.raises(RequestError, match="must be a LlamaConfig, not str"):
    ffjax.random_model("llama-3.2-1b")


def test_wide_integers_are_accepted(make_config):
  model = sharpened(make_config())
  expected = decode.generate(model, [5, 9, 11], 3).token_ids
  with jax.enable_x64(True):
    state = decode.prefill(
      model, np.asarray([[5, 9, 11]]), np.asarray([3]), capacity=64
    )
    state, rest = decode.decode_steps(model, state, 2, max_steps=2)
    assert rest.tolist() == [expected[0][1:]]
    assert decode.generate(model, [5, 9, 11], 3).token_ids == expected


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"implementations": "reference"}, "must be two names"),
    ({"implementations": ("reference",)}, "must be two names"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not an integer"),
  ],
)
def test_compare_names_bad_arguments(make_config, options, message):
  with pytest.raises(RequestError, match=message):
    decode.compare(sharpened(make_config()), [1, 2], **options)


def test_cache_that_does_not_fit_is_refused(make_config, monkeypatch):
  model = sharpened(make_config())
  needed = 128 * model.config.kv_bytes_per_token(4)
  monkeypatch.setattr(device_memory, "free_bytes", lambda device: needed)
  decode.generate(model, [1], 100)
  monkeypatch.setattr(device_memory, "free_bytes", lambda device: needed - 1)
  with pytest.raises(RequestError, match="a KV cache for 1 x 128 tokens takes"):
    decode.generate(model, [1], 100)


def test_capacities_are_rounded_up():
  assert [cache.rounded_capacity(n) for n in (1, 64, 65)] == [64, 64, 128]


def test_compare_sees_no_difference_where_there_is_none(make_config):
  model = sharpened(make_config())
  same = decode.compare(
    model, PROMPTS[1:], ("reference", "reference_float32"), max_new_tokens=8
  )
  assert same.max_logit_error == same.mean_kl == same.mean_abs_delta_nll == 0
  assert same.divergences == (None, None, None)
  assert same.num_positions == sum(len(p) - 1 for p in PROMPTS[1:])


def test_compare_measures_what_it_says(make_config):
  """Against the same measures taken from whole forwards, outside the loop."""
  model = sharpened(make_config(), "bfloat16")
  prompts = [PROMPTS[2], PROMPTS[3]]
  found = decode.compare(model, prompts, max_new_tokens=30)
  errors, squares, kls, deltas = [], [], [], []
  for prompt in prompts:
    log_probs = [
      np.asarray(all_logits(model, jnp.asarray(prompt, jnp.int32), dtype))
      for dtype in (np.float32, jnp.bfloat16)
    ]
    base, other = (np.float64(x[:-1]) for x in log_probs)
    errors.append(other - base)
    squares.append(base**2)
    base, other = (
      x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (base, other)
    )
    kls.append((np.exp(base) * (base - other)).sum(-1))
    rows = np.arange(len(prompt) - 1)
    deltas.append((base - other)[rows, prompt[1:]])
  error = np.concatenate(errors)
  relative = np.sqrt((error**2).mean() / np.concatenate(squares).mean())
  delta = np.concatenate(deltas)
  np.testing.assert_allclose(
    [
      found.max_logit_error,
      found.relative_logit_error,
      found.mean_kl,
      found.mean_abs_delta_nll,
    ],
    [
      np.abs(error).max(),
      relative,
      np.concatenate(kls).mean(),
      np.abs(delta).mean(),
    ],
    rtol=0.05,
  )
  assert found.mean_kl > 1e-6


def test_compare_finds_the_first_diverging_token(make_config, monkeypatch):
  model = sharpened(make_config())
  right = implementation.resolve("reference")
  broken_at = 5

  def wrong_once(model, token_ids, active, kv):
    out = right.step(model, token_ids, active, kv)
    banned = jnp.argmax(out.logits, axis=-1)
    wrong = out.logits.at[jnp.arange(len(banned)), banned].set(-1e9)
    at = (out.cache.lengths == broken_at)[:, None]
    return out._replace(logits=jnp.where(at, wrong, out.logits))

  monkeypatch.setitem(
    implementation._IMPLEMENTATIONS,
    "wrong",
    implementation.Implementation(
      "wrong", right.dtype, right.missing, wrong_once
    ),
  )
  found = decode.compare(
    model, [[4, 8], [1, 2, 3]], ("reference", "wrong"), max_new_tokens=6
  )
  tokens = decode.generate(model, [[4, 8], [1, 2, 3]], 6).token_ids
  for row, (divergence, index) in enumerate(
    zip(found.divergences, [3, 2], strict=True)
  ):
    assert divergence.index == index
    assert divergence.baseline_token == tokens[row][index]
    assert divergence.other_token != divergence.baseline_token
    assert divergence.margin > 0
  with pytest.raises(RequestError, match="prompt 0 has one token"):
    decode.compare(model, [[1]])
