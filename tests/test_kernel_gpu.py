"""The fused step on a Hopper GPU, by way of what users call.

Models are small, so that all of it takes a minute; bench/check_fused.py is the
long version, of true shapes.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax import decode
from ffjax.cache import KVCache
from ffjax.errors import RequestError
from ffjax.implementation import resolve
from ffjax.sampling import Sampling, choose
from pallas_kernels import mosaic, steps


def _why_not() -> str:
  try:
    resolve("fused")
  except RequestError as e:
    return str(e)
  return ""


pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(bool(_why_not()), reason=_why_not()),
]

_CHECKPOINT = pathlib.Path(__file__).parents[1] / "checkpoints" / "tiny_llama"
# How much further from float32 than the bfloat16 reference the kernel may be.
_MOST_ERROR = 1.5
_NUM_LAUNCHES = 300
_EVEN = dict(
  vocab_size=384,
  hidden_size=256,
  intermediate_size=384,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=64,
  tie_word_embeddings=True,
)
# Nothing fills whole units or chunks.
_ODD = dict(
  vocab_size=391,
  hidden_size=200,
  intermediate_size=150,
  num_attention_heads=3,
  num_key_value_heads=1,
  head_dim=64,
  num_hidden_layers=3,
)
_WIDE_HEADS = dict(
  vocab_size=200,
  hidden_size=136,
  intermediate_size=400,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=128,
  tie_word_embeddings=True,
)
# At batch 3, `down` comes in blocks of 5, 5 and 4 chunks.
_DEEP = dict(_EVEN, intermediate_size=14336)


def _packed(make_config, fields):
  return ffjax.pack(ffjax.random_model(make_config(**fields), seed=0))


@pytest.fixture(scope="module")
def model(make_config):
  """A packed model that no test consumes."""
  return _packed(make_config, _EVEN)


@pytest.fixture(scope="module")
def tiny_llama():
  return ffjax.pack(ffjax.load(_CHECKPOINT, dtype="bfloat16"))


def _random_prompts(model, lengths):
  rng = np.random.default_rng(0)
  vocab_size = model.config.vocab_size
  return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@functools.partial(jax.jit, static_argnames=("name",))
def _step(model, token_ids, active, cache, *, name):
  """Runs one step; unlike `decode_step`, consumes nothing."""
  return resolve(name, model, cache).step(model, token_ids, active, cache)


def _started(model, batch, sampling=decode.GREEDY):
  """Returns the state after prompts of several lengths."""
  prompts = _random_prompts(model, range(60, 60 + batch))
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  ids = np.zeros((batch, lengths.max()), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  return decode.prefill(
    model, ids, lengths, sampling, capacity=128, implementation="fused"
  )


# ---- numbers ---------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(
  "fields",
  [_EVEN, _ODD, _WIDE_HEADS, _DEEP],
  ids=["even", "odd", "wide heads", "deep"],
)
def test_error_is_that_of_bfloat16(make_config, fields, batch):
  _assert_error_is_that_of_bfloat16(_packed(make_config, fields), batch)


def _assert_error_is_that_of_bfloat16(model, batch):
  # Past the edge of a tile of 64 keys, in some sequences.
  prompts = _random_prompts(model, [70, 2, 64, 65, 5, 3, 66, 40][:batch])
  theirs, ours = (
    decode.compare(
      model, prompts, ("reference_float32", name), max_new_tokens=0
    )
    for name in ("reference", "fused")
  )
  assert ours.implementations == ("reference_float32", "fused")
  assert 0 < theirs.relative_logit_error
  assert ours.relative_logit_error <= _MOST_ERROR * theirs.relative_logit_error


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layer_format", [None, "int4_g128"])
def test_error_with_codes_in_the_head(make_config, layer_format, tied, batch):
  config = make_config(**{**_EVEN, "tie_word_embeddings": tied})
  made = ffjax.random_model(
    config, seed=0, format_name=layer_format, head_format="int8"
  )
  _assert_error_is_that_of_bfloat16(ffjax.pack(made), batch)


def test_greedy_tokens_are_the_reference_s_or_part_at_a_tie(tiny_llama):
  prompts = ["In the beginning", "And it came to pass", "O"]
  num_tokens = 200
  ours, theirs = (
    decode.generate(
      tiny_llama, prompts, num_tokens, implementation=name, stop_on_eos=False
    ).token_ids
    for name in ("fused", "reference")
  )
  text = [(_CHECKPOINT / "heldout.txt").read_text()[:300]]
  # How far rounding alone moves a logit, in either.
  rounding = sum(
    decode.compare(
      tiny_llama, text, ("reference_float32", name), max_new_tokens=0
    ).max_logit_error
    for name in ("reference", "fused")
  )
  found = decode.compare(
    tiny_llama, prompts, ("reference", "fused"), num_tokens
  ).divergences
  for a, b, divergence in zip(ours, theirs, found, strict=True):
    assert len(a) == len(b) == num_tokens
    if divergence is None:
      assert a == b
    else:
      assert a[: divergence.index] == b[: divergence.index]
      assert divergence.margin <= rounding


def test_either_takes_over_from_the_other(model):
  num_steps = 90
  ids = np.asarray(_random_prompts(model, [num_steps] * 3), np.int32)
  active = np.ones(3, bool)

  def run(names, dtype):
    """Returns logits `[num_steps, B, V]`, the steps by `names` in turn."""
    cache = KVCache.create(model.config, 3, 128, dtype)
    rows = []
    for t in range(num_steps):
      name = names[t // 10 % len(names)]
      out = _step(model, ids[:, t], active, cache, name=name)
      cache = out.cache
      rows.append(np.asarray(out.logits))
    np.testing.assert_array_equal(cache.lengths, num_steps)
    return np.stack(rows)

  exact = run(["reference_float32"], jnp.float32)
  theirs, ours = (
    np.linalg.norm(run(names, jnp.bfloat16) - exact)
    for names in (["reference"], ["reference", "fused"])
  )
  assert 0 < theirs
  assert ours <= _MOST_ERROR * theirs


def test_a_state_goes_from_one_to_the_other(model):
  state = _started(model, 3)
  lengths = np.asarray(state.cache.lengths)
  for name in ("reference", "fused", "fused", "reference", "fused"):
    state = decode.decode_step(
      model, state, implementation=name, stop_on_eos=False
    )
  np.testing.assert_array_equal(state.cache.lengths, lengths + 5)
  ids = np.asarray(state.token_ids)
  assert ((ids >= 0) & (ids < model.config.vocab_size)).all()


# ---- choices ---------------------------------------------------------------


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(),
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=4),
    Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.3, seed=5),
  ],
  ids=["greedy", "temperature", "top-k and top-p", "min-p and penalty"],
)
def test_tokens_are_the_sampler_s(model, sampling):
  state = _started(model, 3, sampling)
  for _ in range(20):
    out = _step(
      model, state.token_ids, ~state.finished, state.cache, name="fused"
    )
    # From the logits alone, whatever the kernel says of the largest.
    expected = choose(
      out.logits, sampling, state.keys, out.cache.lengths, state.seen
    )
    expected = np.asarray(expected)
    state = decode.decode_step(
      model, state, sampling, implementation="fused", stop_on_eos=False
    )
    np.testing.assert_array_equal(state.token_ids, expected)


def test_auto_is_fused_for_a_packed_model(model, make_config):
  assert resolve("auto", model).name == "fused"
  assert resolve("auto", ffjax.random_model(make_config())).name == "reference"
  prompts = _random_prompts(model, [5])
  found = decode.compare(model, prompts, ("reference", "auto"), 0)
  assert found.implementations == ("reference", "fused")


# ---- launches --------------------------------------------------------------


def _num_kernels(compiled):
  """Counts calls of Mosaic kernels in what XLA made."""
  return sum(
    "custom_call_target=" in line and "mosaic_gpu" in line
    for line in compiled.as_text().splitlines()
  )


def test_a_step_is_one_launch(model):
  state = _started(model, 1)
  step = decode.decode_step.lower(model, state, implementation="fused")
  assert _num_kernels(step.compile()) == 1
  # The block of launches; or once in each of the two loops over steps: several
  # at a time, and one.
  for sampling, num in (
    (Sampling(), steps.LAUNCHES_PER_LOOK),
    (Sampling(temperature=0.5), 2),
  ):
    loop = decode.decode_steps.lower(
      model, state, 50, sampling, max_steps=64, implementation="fused"
    )
    assert _num_kernels(loop.compile()) == num
  reference = decode.decode_step.lower(model, state, implementation="reference")
  assert _num_kernels(reference.compile()) == 0


@pytest.mark.parametrize("stop_on_eos", [True, False])
def test_greedy_launches_are_single_steps(make_config, stop_on_eos):
  # In 75 steps some sequences end, or all fill their caches.
  fields = dict(_EVEN, eos_token_ids=tuple(range(0, 384, 40)))
  model = _packed(make_config, fields)
  options = dict(implementation="fused", stop_on_eos=stop_on_eos)
  state, tokens = decode.decode_steps(
    model, _started(model, 3), 75, max_steps=80, **options
  )
  one = _started(model, 3)
  for t in range(75):
    was_finished = np.asarray(one.finished)
    one = decode.decode_step(model, one, **options)
    expected = np.where(was_finished, decode.NO_TOKEN, one.token_ids)
    np.testing.assert_array_equal(tokens[:, t], expected)
  assert (np.asarray(tokens)[:, 75:] == decode.NO_TOKEN).all()
  assert np.asarray(one.finished).any()
  for ours, theirs in zip(
    (state.token_ids, state.finished, *jax.tree.leaves(state.cache)),
    (one.token_ids, one.finished, *jax.tree.leaves(one.cache)),
    strict=True,
  ):
    ours, theirs = (np.asarray(x).view(np.uint8) for x in (ours, theirs))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("batch", [1, 8])
def test_launches_are_the_same_bit_by_bit(model, batch):
  state = _started(model, batch)
  arguments = (model, state.token_ids, ~state.finished, state.cache)
  first = _step(*arguments, name="fused")

  def bits(x):
    return jax.lax.bitcast_convert_type(
      x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    )

  def differ(out):
    return jnp.stack(
      [
        (bits(x) != bits(y)).any()
        for x, y in zip(
          jax.tree.leaves(out), jax.tree.leaves(first), strict=True
        )
      ]
    ).any()

  differing = [
    differ(_step(*arguments, name="fused")) for _ in range(_NUM_LAUNCHES)
  ]
  assert int(np.sum(jax.device_get(differing))) == 0


_DELAY = (
  "{ .reg .b32 ns, cta; mov.u32 ns, %clock; mov.u32 cta, %ctaid.x;"
  " mad.lo.u32 ns, cta, 0x85EBCA6B, ns; mul.lo.u32 ns, ns, 0x9E3779B1;"
  # Up to 16 us, a fifth of them none.
  " shr.u32 ns, ns, 18; max.u32 ns, ns, 3277; sub.u32 ns, ns, 3277;"
  " nanosleep.u32 ns; } "
)
_SENT = "st.relaxed.gpu.global.b64"
_STAMP_IS_WRONG = "setp.ne.b32 again, missing, 0;"


def _late(code):
  """Delays whatever a thread sends to other CTAs, by random times."""
  return _DELAY + code if _SENT in code else code


def _unchecked(code):
  """Takes words as they are, too."""
  return _late(code).replace(_STAMP_IS_WRONG, "setp.ne.b32 again, 0, 0;")


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
  ("change", "as_before"), [(_late, True), (_unchecked, False)]
)
def test_only_stamps_tell_when_words_have_come(
  model, batch, change, as_before, monkeypatch
):
  start = _started(model, batch)

  def loop():
    state, token_ids = decode.decode_steps(
      model,
      jax.tree.map(jnp.copy, start),
      60,
      max_steps=60,
      implementation="fused",
      stop_on_eos=False,
    )
    return [
      np.asarray(x).view(np.uint8)
      for x in (token_ids, state.cache.k, state.cache.v)
    ]

  expected = loop()
  real = mosaic.asm
  changed = []

  def asm(code, *operands, **kwargs):
    new = change(code)
    changed.append(new != code)
    return real(new, *operands, **kwargs)

  jax.clear_caches()
  try:
    with monkeypatch.context() as patch:
      patch.setattr(mosaic, "asm", asm)
      found = [loop() for _ in range(10)]
  finally:
    jax.clear_caches()
  assert any(changed)
  same = [
    all(np.array_equal(x, y) for x, y in zip(run, expected, strict=True))
    for run in found
  ]
  # With what it looked for gone, the test has to see it.
  assert same == [as_before] * len(found)


def test_inactive_sequences_are_left_alone(model):
  state = _started(model, 3)
  active = jnp.asarray([True, False, True])
  out = _step(model, state.token_ids, active, state.cache, name="fused")
  np.testing.assert_array_equal(
    out.cache.lengths, state.cache.lengths + active.astype(jnp.int32)
  )
  for before, after in (
    (state.cache.k, out.cache.k),
    (state.cache.v, out.cache.v),
  ):
    np.testing.assert_array_equal(
      before[:, 1].astype(jnp.float32), after[:, 1].astype(jnp.float32)
    )
