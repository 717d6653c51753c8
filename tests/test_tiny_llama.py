"""The model that the repository carries: golden text and held-out bits."""

import json
import pathlib

import chex
import pytest

import ffjax
from ffjax import decode, scoring
from ffjax.text import ByteTokenizer

_ROOT = pathlib.Path(__file__).parents[1]
_CHECKPOINT = _ROOT / "checkpoints" / "tiny_llama"
_GOLDEN = json.loads(
  (_ROOT / "tests" / "golden" / "tiny_llama.json").read_text()
)


@pytest.fixture(scope="module")
def model():
  return ffjax.load(_CHECKPOINT, dtype="float32")


def test_greedy_text_is_golden(model):
  cases = _GOLDEN["cases"]
  # A prediction this close to a tie would not be worth a golden test.
  assert all(case["smallest_margin"] > 1e-3 for case in cases)
  out = decode.generate(
    model,
    [case["prompt"] for case in cases],
    len(cases[0]["token_ids"]),
    implementation="reference",
    stop_on_eos=False,
  )
  assert out.token_ids == [case["token_ids"] for case in cases]
  assert out.texts == [case["text"] for case in cases]


def test_held_out_bits_per_byte_are_those_logged(model):
  log = (_CHECKPOINT / "training_log.jsonl").read_text().splitlines()
  logged = json.loads(log[-1])["heldout_bits_per_byte"]
  text = (_CHECKPOINT / "heldout.txt").read_text()
  # Chapters were joined by an empty line; each ends with its own newline.
  chapters = [part + "\n" for part in text.rstrip("\n").split("\n\n")]
  assert len(chapters) == 30
  # The log's figure was computed in bfloat16.
  bits = scoring.bits_per_byte(model, chapters)
  assert abs(bits - logged) < 2e-3


def test_checkpoint_is_what_the_kernel_will_need():
  config = ffjax.LlamaConfig.from_json(_CHECKPOINT / "config.json")
  assert config.head_dim == 64
  for size in (config.hidden_size, config.intermediate_size, config.vocab_size):
    assert size % 128 == 0
  files = list(_CHECKPOINT.iterdir())
  assert sum(path.stat().st_size for path in files) <= 8 * 2**20
  model = ffjax.load(_CHECKPOINT)
  assert isinstance(model.tokenizer, ByteTokenizer)
  chex.assert_type(
    model.params["layers"]["mlp"]["gate_proj"]["weight"], "bfloat16"
  )
