"""Writes `transformers_logits.json` beside it, from transformers' Llama.

Needs the extra `oracle`. From the repository's root:

  python tests/golden/make_transformers_logits.py
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import oracle_cases


def _logits(name: str) -> np.ndarray:
  """Returns the float32 logits `[B, T, V]` of a case."""
  config = transformers.LlamaConfig(**oracle_cases.CASES[name])
  model = transformers.LlamaForCausalLM(config).float().eval()
  weights = oracle_cases.weights(name)
  found = model.load_state_dict(
    {key: torch.from_numpy(value) for key, value in weights.items()},
    strict=False,
  )
  # A tied head is listed as missing, and shares the embedding all the same.
  assert not found.unexpected_keys
  tied = ["lm_head.weight"] if config.tie_word_embeddings else []
  assert found.missing_keys == tied
  with torch.no_grad():
    ids = torch.from_numpy(oracle_cases.token_ids(name)).long()
    return model(ids).logits.numpy()


def main() -> None:
  """Writes the file."""
  torch.set_num_threads(1)
  cases = {}
  for name in oracle_cases.CASES:
    logits = _logits(name)
    batch, length, vocab_size = logits.shape
    # [sequence, position, token id] of a few logits, the last position's
    # among them, which depends on every token before it.
    places = [
      [sequence, position, token_id]
      for sequence in range(batch)
      for position in (0, length // 2, length - 1)
      for token_id in (0, 1, vocab_size // 2, vocab_size - 1)
    ]
    cases[name] = {
      "rms": float(np.sqrt(np.mean(np.square(logits, dtype=np.float64)))),
      "places": places,
      "logits": [round(float(logits[tuple(place)]), 7) for place in places],
    }
  golden = {
    "made_by": "tests/golden/make_transformers_logits.py",
    "numpy": np.__version__,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "cases": cases,
  }
  path = pathlib.Path(__file__).with_name("transformers_logits.json")
  # One line per case keeps the file short and its differences readable.
  lines = ",\n".join(
    f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()
  )
  head = json.dumps({**golden, "cases": None}, indent=1)
  text = head.removesuffix("null\n}") + "{\n" + lines + "\n }\n}\n"
  assert json.loads(text) == golden
  path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
