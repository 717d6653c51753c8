"""What the reference makes of a short prompt: shared by tests of stored weights."""

import jax
import numpy as np

from ffjax.cache import KVCache
from ffjax.implementation import reference_hidden, reference_logits


def reference_outputs(model, dtype, token_ids=((1, 5, 9, 7), (3, 2, 0, 0))):
  """Returns logits and the cache after two sequences of 4 and 2 tokens."""
  token_ids = np.asarray(token_ids, np.int32)
  lengths = np.asarray([4, 2], np.int32)

  # Traced anew in each call: tests change what the trace reads.
  @jax.jit
  def run(model):
    cache = KVCache.create(model.config, 2, 8, dtype)
    hidden, cache = reference_hidden(model, token_ids, lengths, cache)
    return reference_logits(model, hidden), cache

  return run(model)
