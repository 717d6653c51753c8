"""Writes `tiny_llama.json`: greedy continuations by the carried model.

Computed in float32 by recomputing every sequence from its start, token by
token, without the decode loop that the test runs.

  python tests/golden/make_tiny_llama.py
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import ffjax
from ffjax.cache import KVCache
from ffjax.implementation import reference_hidden, reference_logits

_HERE = pathlib.Path(__file__).parent
_CHECKPOINT = _HERE.parents[1] / "checkpoints" / "tiny_llama"
_PROMPTS = (
  "And the LORD said unto Moses, ",
  "Now therefore,",
  "The king answered and said",
  "My son, ",
)
_NEW_TOKENS = 128


@jax.jit
def _logits(model: ffjax.Model, token_ids: jax.Array) -> jax.Array:
  t = len(token_ids)
  cache = KVCache.create(model.config, 1, t, jnp.float32)
  hidden, _ = reference_hidden(
    model, token_ids[None], jnp.full((1,), t, jnp.int32), cache
  )
  return reference_logits(model, hidden[0])


def main() -> None:
  """Recomputes and writes the file."""
  model = ffjax.load(_CHECKPOINT, dtype="float32")
  cases = []
  for prompt in _PROMPTS:
    tokens = model.tokenizer.encode(prompt)
    start, margins = len(tokens), []
    for _ in range(_NEW_TOKENS):
      padded = np.zeros(start + _NEW_TOKENS, np.int32)
      padded[: len(tokens)] = tokens
      logits = np.asarray(_logits(model, padded)[len(tokens) - 1])
      order = np.argsort(-logits)
      margins.append(float(logits[order[0]] - logits[order[1]]))
      tokens.append(int(order[0]))
    cases.append(
      dict(
        prompt=prompt,
        token_ids=tokens[start:],
        text=model.tokenizer.decode(tokens[start:]),
        smallest_margin=round(min(margins), 4),
      )
    )
  path = _HERE / "tiny_llama.json"
  content = dict(made_by="tests/golden/make_tiny_llama.py", cases=cases)
  path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
