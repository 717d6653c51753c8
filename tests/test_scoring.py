"""Tests of `ffjax.scoring`."""

import math

import jax
import numpy as np
import pytest

from ffjax import params, scoring
from ffjax.cache import KVCache
from ffjax.errors import RequestError
from ffjax.model import Llama
from ffjax.text import ByteTokenizer


@pytest.fixture(scope="module")
def model(make_config):
  config = make_config(vocab_size=384, max_position_embeddings=16)
  made = params.random_model(config, dtype="float32")
  # Larger weights, so that tokens differ in likelihood.
  grown = jax.tree.map(lambda leaf: 6 * leaf, made.params)
  return made.replace(params=grown, tokenizer=ByteTokenizer())


@jax.jit
def _logits(model, token_ids):
  llama = Llama(model.config)
  variables = {"params": model.params}
  cache = KVCache.create(model.config, 1, token_ids.shape[1], np.float32)
  num_tokens = np.asarray([token_ids.shape[1]], np.int32)
  hidden, _ = llama.apply(variables, token_ids, num_tokens, cache)
  return llama.apply(variables, hidden, method="logits")


def _nats(model, ids):
  """Scores every token after the first, in float64."""
  # Filled up to one length; later tokens change nothing.
  row = np.asarray([[*ids, *[0] * (48 - len(ids))]], np.int32)
  logits = np.asarray(_logits(model, row)[0], np.float64)
  log_sums = np.log(np.exp(logits).sum(axis=-1))
  return [
    log_sums[place] - logits[place, token_id]
    for place, token_id in enumerate(ids[1:])
  ]


def test_token_nll(model):
  random = np.random.RandomState(0)
  token_ids = random.randint(384, size=(3, 6)).astype(np.int32)
  lengths = np.asarray([6, 3, 1], np.int32)
  nll = np.asarray(scoring.token_nll(model, token_ids, lengths))
  assert nll.shape == (3, 5)
  assert nll.dtype == np.float32
  for row, length in enumerate(lengths):
    alone = _nats(model, list(token_ids[row, :length]))
    np.testing.assert_allclose(nll[row, : length - 1], alone, rtol=1e-5)
    assert not nll[row, length - 1 :].any()
  assert nll[0].std() > 0.01  # Not all alike.


def test_token_nll_is_differentiable(model):
  token_ids = np.asarray([[1, 5, 9, 7]], np.int32)

  def mean_nll(tree):
    lengths = np.asarray([4], np.int32)
    return scoring.token_nll(
      model.replace(params=tree), token_ids, lengths
    ).sum()

  gradients = jax.grad(mean_nll)(model.params)
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient).any()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_bits_per_byte(model, window):
  texts = ["Hello, naïve world! It is late.", "", "x", "abc" * 9]
  step = window or 16
  nats = 0.0
  for text in texts:
    ids = model.tokenizer.encode(text)
    for start in range(0, len(ids) - 1, step):
      nats += sum(_nats(model, ids[start : start + step + 1]))
  num_bytes = sum(len(text.encode()) for text in texts)
  assert scoring.bits_per_byte(model, texts, window) == pytest.approx(
    nats / math.log(2) / num_bytes, rel=1e-5
  )


def test_requests_that_are_refused(model):
  with pytest.raises(RequestError, match="no tokenizer"):
    scoring.bits_per_byte(model.replace(tokenizer=None), ["a"])
  for texts in ([], [""]):
    with pytest.raises(RequestError, match="no text to score"):
      scoring.bits_per_byte(model, texts)
  for window in (0, -1):
    with pytest.raises(RequestError, match=f"window={window} must be"):
      scoring.bits_per_byte(model, ["a"], window)
