"""SmolLM2-135M-Instruct, real weights, if `get_smollm2.py` has fetched them.

The ids and the perplexity were computed by an implementation that shares no
code with this one, on the dequantised weights in float32.
"""

import pathlib

import numpy as np
import pytest

import ffjax
from ffjax import decode, scoring

_PATH = (
  pathlib.Path(__file__).parents[1]
  / "checkpoints"
  / "smollm2"
  / "SmolLM2-135M-Instruct.Q4_1.gguf"
)
pytestmark = pytest.mark.skipif(
  not _PATH.exists(),
  reason="no SmolLM2: `python checkpoints/get_smollm2.py` fetches it",
)


@pytest.fixture(scope="module")
def model():
  return ffjax.load(_PATH)


def test_completes_a_sentence(model):
  out = decode.generate(model, "The capital of France is", 5)
  assert out.token_ids == [[7042, 30, 198, 198, 504]]


def test_answers_a_question(model):
  text = model.tokenizer.render_chat(
    [{"role": "user", "content": "What is the capital of France?"}]
  )
  prompt = model.tokenizer.encode(text, add_special_tokens=False)
  assert len(prompt) == 37
  out = decode.generate(model, prompt, 20)
  assert out.token_ids == [[504, 3575, 282, 4649, 314, 7042, 30, 2]]
  assert out.ended == [True]
  assert out.texts == ["The capital of France is Paris."]


def test_batch_of_different_lengths(model):
  text = model.tokenizer.render_chat(
    [{"role": "user", "content": "What is the capital of France?"}]
  )
  question = model.tokenizer.encode(text, add_special_tokens=False)
  out = decode.generate(model, [question, [504, 3575, 282, 4649, 314]], 8)
  assert out.token_ids[0] == [504, 3575, 282, 4649, 314, 7042, 30, 2]
  assert out.token_ids[1][:5] == [7042, 30, 198, 198, 504]


def test_english_is_likelier_than_its_words_shuffled(model):
  text = (
    "The sun rises in the east and sets in the west, and every morning the"
    " birds begin to sing before the first light appears."
  )
  words = text.split()
  shuffled = " ".join(np.random.default_rng(0).permutation(words))
  bits = [
    scoring.bits_per_byte(model, [t], window=64) for t in (text, shuffled)
  ]
  assert bits[0] < 1.2
  assert bits[1] > 2 * bits[0]


def test_bfloat16_stays_close_to_float32():
  model = ffjax.load(_PATH, dtype="bfloat16")
  found = decode.compare(
    model, "The capital of France is Paris.", max_new_tokens=0
  )
  assert found.mean_kl < 0.01
