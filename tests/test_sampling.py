"""Choice of tokens: filters against transformers, frequencies, seeds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax.errors import RequestError
from ffjax.sampling import Sampling, choose, filter_ranked

VOCAB = 50


def logits_of(seed: int, batch: int = 3) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (3 * rng.standard_normal((batch, VOCAB))).astype(np.float32)


def draw(logits, sampling, num_draws=1, seen=None):
  """Draws at `num_draws` positions; returns `[num_draws, B]`."""
  keys = sampling.keys(len(logits))

  @jax.jit
  def one(position, sampling):
    positions = jnp.full((len(logits),), position, jnp.int32)
    return choose(jnp.asarray(logits), sampling, keys, positions, seen)

  positions = jnp.arange(num_draws, dtype=jnp.int32)
  return np.asarray(jax.lax.map(lambda p: one(p, sampling), positions))


def expected_kept(row, top_k=None, top_p=None, min_p=None) -> set[int]:
  """Which tokens may be drawn, spelled out in float64."""
  kept = set(range(len(row)))
  if top_k is not None:
    last = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
    kept = {i for i in kept if row[i] >= last}
  if top_p is not None:
    total = sum(np.exp(float(row[i])) for i in kept)
    mass, chosen = 0.0, set()
    for i in sorted(kept, key=lambda i: -row[i]):
      if mass >= top_p:
        break
      chosen.add(i)
      mass += np.exp(float(row[i])) / total
    kept = chosen
  if min_p is not None:
    best = max(float(row[i]) for i in kept)
    kept = {i for i in kept if np.exp(float(row[i]) - best) >= min_p}
  return kept


FILTERS = [
  {},
  {"top_k": 1},
  {"top_k": 5},
  {"top_k": 1000},
  {"top_p": 0.05},
  {"top_p": 0.6},
  {"top_p": 1.0},
  {"min_p": 0.0},
  {"min_p": 0.2},
  {"min_p": 1.0},
  {"top_k": 12, "top_p": 0.8},
  {"top_k": 12, "top_p": 0.8, "min_p": 0.1},
]


def kept_tokens(row: np.ndarray, sampling: Sampling) -> set[int]:
  order = np.argsort(-row)
  ranked = filter_ranked(jnp.asarray(row[order])[None, :], sampling)[0]
  return set(order[np.isfinite(np.asarray(ranked))].tolist())


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_filters_keep_the_right_tokens(filters, seed):
  for row in logits_of(seed):
    sampling = Sampling(temperature=1.0, **filters)
    assert kept_tokens(row, sampling) == expected_kept(row, **filters)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("penalty", [None, 1.3, 0.7])
def test_filters_are_those_of_transformers(filters, penalty):
  torch = pytest.importorskip("torch", reason="needs the extra `oracle`")
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra `oracle`"
  )
  logits = logits_of(7)
  prompt = np.asarray([[1, 2, 3], [4, 4, 4], [0, 49, 7]])
  scores = torch.tensor(logits)
  if penalty is not None:
    scores = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
      torch.tensor(prompt), scores
    )
  scores = transformers.TemperatureLogitsWarper(0.8)(None, scores)
  for name, warper in (
    ("top_k", transformers.TopKLogitsWarper),
    ("top_p", transformers.TopPLogitsWarper),
    ("min_p", transformers.MinPLogitsWarper),
  ):
    if name in filters:
      scores = warper(filters[name])(None, scores)
  sampling = Sampling(temperature=0.8, repetition_penalty=penalty, **filters)
  seen = np.zeros(logits.shape, bool)
  seen[np.arange(3)[:, None], prompt] = True
  drawn = draw(logits, sampling, 2000, jnp.asarray(seen))
  probs = torch.softmax(scores, -1).numpy()
  for column, expected in zip(drawn.T, probs, strict=True):
    assert set(column.tolist()) <= set(np.flatnonzero(expected).tolist())
    counted = np.bincount(column, minlength=VOCAB) / len(column)
    # Five standard deviations of each frequency.
    bound = 5 * np.sqrt(expected * (1 - expected) / len(column)) + 1e-12
    assert (np.abs(counted - expected) <= bound).all()


def test_frequencies_follow_the_temperature():
  logits = logits_of(3)
  for temperature in (0.5, 2.0):
    drawn = draw(logits, Sampling(temperature=temperature), 4000)
    expected = np.exp(logits / temperature)
    expected /= expected.sum(-1, keepdims=True)
    for column, probs in zip(drawn.T, expected, strict=True):
      counted = np.bincount(column, minlength=VOCAB) / len(column)
      bound = 5 * np.sqrt(probs * (1 - probs) / len(column)) + 1e-12
      assert (np.abs(counted - probs) <= bound).all()


def test_greedy_takes_the_first_of_the_largest():
  logits = logits_of(4)
  logits[1, 7] = logits[1, 3] = 100.0
  drawn = draw(logits, Sampling())
  np.testing.assert_array_equal(drawn[0], [*logits.argmax(-1)])
  assert drawn[0, 1] == 3
  assert Sampling(temperature=0.0).greedy
  assert Sampling(temperature=0.0) == Sampling()


def test_scalars_of_any_kind_mean_the_same():
  expected = Sampling(temperature=0.5, top_k=3, seed=2)
  for scalar in (np.float32, np.float64, jnp.float32, np.asarray):
    found = Sampling(
      temperature=scalar(0.5), top_k=np.int64(3), seed=jnp.int32(2)
    )
    assert found == expected
    assert isinstance(found.temperature, float)
    assert isinstance(found.top_k, int)
    assert Sampling(temperature=scalar(0)).greedy
  assert type(Sampling(temperature=1).temperature) is float
  assert type(Sampling(top_k=3.0).top_k) is int


def test_penalty_needs_the_tokens_so_far():
  with pytest.raises(RequestError, match="pass it to prefill too"):
    draw(logits_of(0), Sampling(repetition_penalty=1.1))


def test_repetition_penalty_acts_on_greedy_choice():
  logits = np.asarray([[2.0, 1.9, -1.0]], np.float32)
  seen = jnp.asarray([[True, False, False]])
  penalty = Sampling(repetition_penalty=1.5)
  assert draw(logits, penalty, seen=seen)[0, 0] == 1
  # A negative logit is pushed down, not up.
  logits = np.asarray([[-1.0, -1.2, -9.0]], np.float32)
  assert draw(logits, penalty, seen=seen)[0, 0] == 1


def test_seed_and_position_decide():
  logits = np.zeros((2, VOCAB), np.float32)
  a = draw(logits, Sampling(temperature=1.0, seed=5), 40)
  np.testing.assert_array_equal(
    a, draw(logits, Sampling(temperature=1.0, seed=5), 40)
  )
  assert (a != draw(logits, Sampling(temperature=1.0, seed=6), 40)).any()
  # Positions and sequences draw independently.
  assert len(set(a[:, 0].tolist())) > 10
  assert (a[:, 0] != a[:, 1]).any()
  # A sequence draws the same whatever the batch is.
  alone = draw(logits[:1], Sampling(temperature=1.0, seed=5), 40)
  np.testing.assert_array_equal(a[:, :1], alone)


def test_other_values_compile_nothing():
  logits, keys = jnp.asarray(logits_of(0)), Sampling().keys(3)
  positions = jnp.zeros((3,), jnp.int32)
  counted = jax.jit(chex.assert_max_traces(choose, n=1))
  for temperature, top_k, seed in ((0.5, 3, 0), (0.9, 7, 1)):
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    counted(logits, sampling, keys, positions, None)
  with pytest.raises(AssertionError, match="traced"):
    counted(logits, Sampling(temperature=1.0), keys, positions, None)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", 0),
    ("top_k", 2.5),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("seed", -1),
    ("seed", 2**31),
    ("temperature", np.float32(-1)),
    ("temperature", "hot"),
    ("temperature", jnp.float32(float("nan"))),
    ("temperature", 1e-45),
    ("top_k", np.int64(0)),
    ("top_k", 2**31),
    ("repetition_penalty", jnp.float32(-1)),
    ("top_k", True),
    ("top_p", [0.5]),
  ],
)
def test_values_out_of_range_are_named(name, value):
  with pytest.raises(RequestError, match=f"{name}="):
    Sampling(**{name: value})
