"""The model that the repository carries: golden text and held-out bits."""

import json
import pathlib

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from bench import checks
from ffjax import decode, packed, rope, scoring
from ffjax.text import ByteTokenizer
from pallas_kernels import emulator, steps
from pallas_kernels.plan import make_plan

_ROOT = pathlib.Path(__file__).parents[1]
_CHECKPOINT = _ROOT / "checkpoints" / "tiny_llama"
_CAPACITY = 1024
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


def _logits(model, packed_model, token_ids, lengths, scale):
  """Returns float32's, bfloat16's and the kernel's, after so many tokens."""
  batch = len(lengths)
  state = decode.prefill(
    model,
    jnp.broadcast_to(token_ids, (batch, len(token_ids))),
    lengths,
    capacity=_CAPACITY,
    implementation="reference",
  )
  cache, active = state.cache, jnp.ones(batch, bool)
  config, params = model.config, packed_model.params
  plan = make_plan(
    packed.geometry_of(config), batch, _CAPACITY, params.num_ctas
  )
  cos, sin = (scale * x for x in rope.cos_sin(config, cache.lengths))
  operands = steps.operands(
    *(plan, params.operands(), state.token_ids, cache.lengths, active),
    *(cos[None], sin[None], 1, cache.k, cache.v),
  )
  ours = emulator.run(plan, {k: np.asarray(v) for k, v in operands.items()})
  newest = np.asarray(state.token_ids)[:, None]
  exact, bf16 = (
    checks.implementation_steps(model, name)(cache, newest)[0]
    for name in (checks.BASELINE, "reference")
  )
  return [
    np.asarray(x, np.float64)
    for x in (exact, bf16, ours.logits[:, : config.vocab_size])
  ]


# The other makes queries and keys 2% too large.
@pytest.mark.parametrize(("scale", "passes"), [(1, True), (1.02, False)])
def test_rounding_where_the_kernel_does_errs_no_more_than_bfloat16(
  scale, passes
):
  model = ffjax.load(_CHECKPOINT, dtype="bfloat16")
  packed_model = ffjax.pack(
    ffjax.load(_CHECKPOINT, dtype="bfloat16"), num_ctas=3
  )
  text = (_CHECKPOINT / "heldout.txt").read_text()
  token_ids = jnp.asarray(model.tokenizer.encode(text)[:1000])
  lengths = np.random.default_rng(0).permutation(1000)[:32] + 1
  found = [
    _logits(model, packed_model, token_ids, some, scale)
    for some in lengths.reshape(4, 8)
  ]
  exact, bf16, ours = np.concatenate(found, axis=1)
  head = np.asarray(model.params["embed_tokens"]["weight"], np.float64)
  # What of the hidden state nearly all logits share: a single number, so that in
  # a single step either's error there is small by chance.
  shared = np.linalg.svd(head, full_matrices=False)[0][:, 0]

  def errors(logits):
    error = logits - exact
    return np.linalg.norm(error - np.outer(error @ shared, shared), axis=1)

  within = errors(ours) <= 1.5 * errors(bf16)
  assert within.all() if passes else not within.any()
