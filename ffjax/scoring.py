"""How well a model predicts given tokens, by the reference implementation."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ffjax.cache import KVCache
from ffjax.errors import RequestError
from ffjax.implementation import reference_hidden, reference_logits
from ffjax.params import Model, check_model


def token_nll(
  model: Model,
  token_ids: jax.Array,
  lengths: jax.Array,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Computes the negative log-likelihood of each token given those before.

  Pure and differentiable in `model.params`. The logits of all T tokens are in
  memory at once.

  Args:
    model: the model.
    token_ids: `[B, T]` int32, padded at the end.
    lengths: `[B]` int32, tokens that are not padding.
    dtype: dtype of the activations; None is the model's own.

  Returns:
    `[B, T - 1]` float32, in nats; entry t scores token t + 1, and is 0 where
    that token is padding.
  """
  dtype = model.dtype if dtype is None else dtype
  # Under x64 NumPy's own integers are 64 bits wide.
  token_ids, lengths = jnp.int32(token_ids), jnp.int32(lengths)
  b, t = token_ids.shape
  cache = KVCache.create(model.config, b, t, dtype)
  hidden, _ = reference_hidden(model, token_ids, lengths, cache)
  logits = reference_logits(model, hidden[:, :-1])
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  targets = token_ids[:, 1:]
  nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  scored = jnp.arange(1, t, dtype=jnp.int32)[None, :] < lengths[:, None]
  return jnp.where(scored, nll, 0.0)


def bits_per_byte(
  model: Model, texts: Sequence[str], window: int | None = None
) -> float:
  """Computes the mean bits that the model needs per UTF-8 byte of text.

  Every text is cut into windows that the model sees alone, so the first
  tokens of a window are predicted from little context.

  Args:
    model: a model with a tokenizer.
    texts: documents; each begins with the bos token if there is one.
    window: tokens per window; None is `max_position_embeddings`.

  Raises:
    RequestError: if the model has no tokenizer, there is no text, or a window
      has no tokens.
  """
  check_model(model)
  if model.tokenizer is None:
    raise RequestError("the model has no tokenizer")
  if not any(texts):
    raise RequestError("there is no text to score")
  if window is not None and window < 1:
    raise RequestError(f"window={window} must be at least 1")
  length = (window or model.config.max_position_embeddings) + 1
  rows, lengths = [], []
  for text in texts:
    ids = model.tokenizer.encode(text)
    # Windows overlap by one token: the last target is the next first input.
    for start in range(0, len(ids) - 1, length - 1):
      row = ids[start : start + length]
      rows.append(row + [0] * (length - len(row)))
      lengths.append(len(row))
  token_ids = np.asarray(rows, np.int32)
  total_nats = 0.0
  for start in range(0, len(rows), 8):
    nll = _jitted_nll(
      model,
      token_ids[start : start + 8],
      np.asarray(lengths[start : start + 8], np.int32),
    )
    total_nats += float(np.asarray(nll, np.float64).sum())
  num_bytes = sum(len(text.encode("utf-8")) for text in texts)
  return total_nats / math.log(2) / num_bytes


@jax.jit
def _jitted_nll(
  model: Model, token_ids: jax.Array, lengths: jax.Array
) -> jax.Array:
  return token_nll(model, token_ids, lengths)
