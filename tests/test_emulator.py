"""Tests of `pallas_kernels.emulator` against two references.

ffjax's own Llama says how far a step's logits and cache may be from float32:
1.5 times as far as its bfloat16 self is. A plain step in NumPy, written below
in the order of the formulas, says the same of what comes between.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ffjax import rope
from ffjax.cache import KVCache
from ffjax.config import LlamaConfig
from ffjax.model import Llama, init_params
from ffjax.params import Model
from pallas_kernels import emulator, packing
from pallas_kernels.geometry import Geometry
from pallas_kernels.plan import (
  ATTENTION,
  DOWN,
  GATE_UP,
  LM_HEAD,
  O_PROJ,
  QKV,
  make_plan,
)
from pallas_kernels.schedule import split_of

_BF16 = np.dtype(ml_dtypes.bfloat16)
_NUM_CTAS = (1, 2, 3, 5, 132)
_CAPACITY = 320
_ALL_POSITIONS = (0, 1, 63, 64, 65, 127, 128, _CAPACITY - 1)
_ARRAYS = ("residual", "qkv", "attended", "hidden", "logits", "next_ids")


@dataclasses.dataclass(frozen=True)
class _Case:
  """A model's sizes, by their letters, and where its sequences stand."""

  d: int
  f: int
  n: int
  k: int
  h: int
  positions: tuple[int, ...]
  v: int = 100
  tied: bool = True
  capacity: int = _CAPACITY

  @property
  def config(self):
    return LlamaConfig(
      vocab_size=self.v,
      hidden_size=self.d,
      intermediate_size=self.f,
      num_hidden_layers=2,
      num_attention_heads=self.n,
      num_key_value_heads=self.k,
      head_dim=self.h,
      max_position_embeddings=4096,
      tie_word_embeddings=self.tied,
    )

  @property
  def batch(self):
    return len(self.positions)

  def plan(self, num_ctas):
    names = [field.name for field in dataclasses.fields(Geometry)]
    geometry = Geometry(**{name: getattr(self.config, name) for name in names})
    return make_plan(geometry, self.batch, self.capacity, num_ctas)

  @functools.cached_property
  def model(self):
    """Weights large enough for attention with peaks; norms that show."""
    shapes = jax.eval_shape(
      functools.partial(init_params, config=self.config, dtype=_BF16),
      jax.random.key(0),
    )
    rng = np.random.default_rng(0)

    def leaf(path, shape):
      x = rng.normal(size=shape.shape)
      if "norm" in jax.tree_util.keystr(path):
        x = 1 + 0.1 * x
      else:
        x *= 0.12 if x.ndim > 2 else 0.02
      return jnp.asarray(x.astype(_BF16))

    return Model(
      params=jax.tree_util.tree_map_with_path(leaf, shapes), config=self.config
    )

  @functools.cached_property
  def caches(self):
    shape = (2, 2, self.batch, self.k, self.capacity, self.h)
    rng = np.random.default_rng(1)
    return rng.normal(size=shape).astype(np.float32).astype(_BF16)

  @functools.cached_property
  def token_ids(self):
    return np.random.default_rng(2).integers(self.v, size=self.batch)


_CASES = {
  "1 query per head of 64": _Case(128, 96, 3, 3, 64, (64,)),
  "3 queries per head of 64": _Case(576, 200, 9, 3, 64, (0, 63, 319)),
  "4 queries per head of 64": _Case(512, 768, 8, 2, 64, _ALL_POSITIONS, v=384),
  "8 queries per head of 64": _Case(200, 300, 8, 1, 64, (127, 128, 1)),
  "1 query per head of 128": _Case(128, 200, 2, 2, 128, _ALL_POSITIONS),
  "4 queries per head of 128": _Case(
    200, 96, 4, 1, 128, (65, 64, 319), tied=False
  ),
  "8 queries per head of 128": _Case(256, 256, 8, 1, 128, (319,), tied=False),
}
# These two are tested with every number of CTAs, the others with a few.
_TWO = ("3 queries per head of 64", "4 queries per head of 128")
_FEW = (3, 132)
# Odd sizes, several KV heads, positions in different tiles.
_MAIN = _CASES[_TWO[0]]
_LONG = _Case(128, 96, 4, 2, 64, (1087, 300, 0), capacity=1088)


def _pad8(values):
  return np.pad(np.asarray(values, np.int32), (0, 8 - len(values)))


def _progress(token_ids, positions, active, step=0, max_steps=1):
  rows = (token_ids, positions, active, (step, max_steps))
  return np.stack([_pad8(x) for x in rows])


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def _pack(tree, config, schedule):
  attention, mlp = tree["layers"]["self_attn"], tree["layers"]["mlp"]
  embedding = tree["embed_tokens"]["weight"]
  qkv = [
    packing.permute_heads(attention[name]["weight"], config.head_dim)
    for name in ("q_proj", "k_proj", "v_proj")
  ]
  lm_head = (
    embedding if config.tie_word_embeddings else tree["lm_head"]["weight"]
  )
  weights = dict(
    w_qkv=(schedule.qkv, jnp.concatenate(qkv, axis=1)),
    w_o=(schedule.o, attention["o_proj"]["weight"]),
    w_gate_up=(
      schedule.gate_up,
      packing.interleave(mlp["gate_proj"]["weight"], mlp["up_proj"]["weight"]),
    ),
    w_down=(schedule.down, mlp["down_proj"]["weight"]),
    w_lm_head=(schedule.lm_head, lm_head),
    embedding=(schedule.lm_head, embedding),
  )
  return {
    name: packing.pack_matrix(matmul, rows)
    for name, (matmul, rows) in weights.items()
  }


@functools.cache
def _operands(case, num_ctas):
  plan = case.plan(num_ctas)
  tree = case.model.params
  norms = np.zeros((5, plan.geometry.padded_hidden_size), np.float32)
  norms[0:4:2, : case.d] = tree["layers"]["input_layernorm"]["weight"]
  norms[1:4:2, : case.d] = tree["layers"]["post_attention_layernorm"]["weight"]
  norms[4, : case.d] = tree["norm"]["weight"]
  cos, sin = rope.cos_sin(case.config, jnp.asarray(_pad8(case.positions)))
  operands = dict(
    table=plan.schedule.table(),
    num_layers=np.asarray([2], np.int32),
    progress=_progress(case.token_ids, case.positions, [1] * case.batch),
    angles=np.stack([cos, sin])[None],
    norms=norms.reshape(5, 8, -1),
    emitted=np.full((1, 8), -1, np.int32),
    words=np.zeros((plan.num_words, 2), np.int32),
    k_cache=case.caches[0],
    v_cache=case.caches[1],
    **_pack(tree, case.config, plan.schedule),
  )
  # A test that wrote to them would change the others.
  operands = {name: np.array(x) for name, x in operands.items()}
  for x in operands.values():
    x.flags.writeable = False
  return operands


@functools.cache
def _trace(case, num_ctas, stop_after=None):
  return emulator.run(
    case.plan(num_ctas), _operands(case, num_ctas), stop_after
  )


def _live(case, logits):
  return np.asarray(logits)[:, : case.v]


def _rms(x):
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _assert_same(one, other, names=_ARRAYS):
  for name in names:
    np.testing.assert_array_equal(
      getattr(one, name), getattr(other, name), strict=True, err_msg=name
    )


# ---- ffjax's reference -----------------------------------------------------


@functools.partial(jax.jit, static_argnames="dtype")
def _step(model, token_ids, num_tokens, cache, dtype):
  llama = Llama(model.config, dtype)
  variables = {"params": model.params}
  hidden, cache = llama.apply(variables, token_ids, num_tokens, cache)
  return llama.apply(variables, hidden[:, 0], method="logits"), cache


@functools.cache
def _reference(case, dtype):
  """Returns logits `[B, V]` and new cache entries `[2, L, B, K, H]`."""
  k, v = (jnp.asarray(x).astype(dtype) for x in case.caches)
  positions = jnp.asarray(case.positions, jnp.int32)
  logits, cache = _step(
    case.model,
    jnp.asarray(case.token_ids, jnp.int32)[:, None],
    jnp.ones_like(positions),
    KVCache(k=k, v=v, lengths=positions),
    dtype,
  )
  return np.asarray(logits), _entries(case, cache.k, cache.v)


def _entries(case, *caches):
  """Takes the new token's entries `[2, L, B, K, H]` out of two caches."""
  rows = np.arange(case.batch)
  return np.stack(
    [
      np.asarray(x)[:, rows, :, list(case.positions)].swapaxes(0, 1)
      for x in caches
    ]
  ).astype(np.float32)


def _errors(case, trace):
  """Returns error over bfloat16's, both against float32: logits, cache."""
  exact, low = _reference(case, "float32"), _reference(case, "bfloat16")
  found = (
    _live(case, trace.logits),
    _entries(case, trace.k_cache, trace.v_cache),
  )
  return [
    _rms(x - y) / _rms(z - y) for x, y, z in zip(found, exact, low, strict=True)
  ]


@pytest.mark.parametrize(
  ("name", "num_ctas"),
  [
    (name, p) for name in _CASES for p in _NUM_CTAS if name in _TWO or p in _FEW
  ],
)
def test_a_step_is_as_exact_as_the_reference_in_bfloat16(name, num_ctas):
  case = _CASES[name]
  trace = _trace(case, num_ctas)
  assert max(_errors(case, trace)) <= 1.5
  assert trace.logits.dtype == np.float32
  np.testing.assert_array_equal(trace.logits[:, case.v :], 0)
  np.testing.assert_array_equal(
    trace.next_ids, np.argmax(_live(case, trace.logits), axis=1)
  )


@pytest.mark.parametrize("name", _CASES)
def test_only_new_entries_of_the_cache_change(name):
  case = _CASES[name]
  trace = _trace(case, 5)
  rows = np.arange(case.batch)
  for before, after in zip(
    case.caches, (trace.k_cache, trace.v_cache), strict=True
  ):
    assert after.dtype == _BF16
    after = after.copy()
    at = (slice(None), rows, slice(None), list(case.positions))
    assert (after[at] != before[at]).mean() > 0.9
    after[at] = before[at]
    np.testing.assert_array_equal(after.view(np.uint16), before.view(np.uint16))


# ---- where it rounds -------------------------------------------------------


def test_what_is_multiplied_or_sent_is_bfloat16_and_nothing_else(
  monkeypatch,
):
  multiplied = []

  def record(of, *args):
    # All but the softmax's state and the number of visible keys.
    arrays = [x for x in args if getattr(x, "ndim", 0) > 0]
    multiplied.extend(np.dtype(x.dtype) for x in arrays)
    return of(*args)

  for name in ("_multiply", "_attend_tiles"):
    of = getattr(emulator, name)
    monkeypatch.setattr(emulator, name, functools.partial(record, of))
  trace = emulator.run(_MAIN.plan(3), _operands(_MAIN, 3))
  assert len(multiplied) > 20
  assert set(multiplied) == {_BF16}
  for name in ("residual", "qkv", "attended", "hidden", "logits"):
    x = getattr(trace, name)
    x = x[x != 0]
    assert x.dtype == np.float32
    rounded = (x.astype(_BF16).astype(np.float32) != x).mean()
    if name in ("residual", "logits"):
      assert rounded > 0.5, name
    else:
      assert rounded == 0, name


def test_softmax_weights_are_rounded_and_their_sum_is_not():
  rng = np.random.default_rng(4)
  q, k, v = (rng.normal(size=(rows, 64)).astype(_BF16) for rows in (8, 64, 64))
  nothing = (
    np.full((8, 1), -1e30, np.float32),
    np.zeros((8, 1), np.float32),
    np.zeros((8, 64), np.float32),
  )
  top, total, out = emulator._attend_tiles(nothing, q, k, v, np.int32(50))
  scores = q.astype(np.float64) @ k[:50].T.astype(np.float64) / 8
  p = np.exp(scores - scores.max(axis=1, keepdims=True))
  # Powers are of 2.
  largest = scores.max(axis=1) * np.log2(np.e)
  np.testing.assert_allclose(top[:, 0], largest, rtol=1e-6)
  np.testing.assert_allclose(total[:, 0], p.sum(axis=1), rtol=1e-6)
  v = v[:50].astype(np.float64)
  rounded = p.astype(np.float32).astype(_BF16).astype(np.float64) @ v
  # One weight in a thousand may be rounded the other way.
  assert _rms(out - rounded) < 0.1 * _rms(p @ v - rounded)


# ---- what does not matter --------------------------------------------------


@pytest.mark.parametrize("name", _TWO)
def test_the_number_of_ctas_matters_for_rounding_only(name):
  case = _CASES[name]
  first = _trace(case, 1, (0, QKV)).qkv
  exact, low = (_reference(case, x)[0] for x in ("float32", "bfloat16"))
  bound = 0.5 * _rms(low - exact)
  for num_ctas in _NUM_CTAS[1:]:
    # Nothing has been rounded to bfloat16 twice yet.
    qkv = _trace(case, num_ctas, (0, QKV)).qkv
    np.testing.assert_allclose(qkv, first, rtol=0, atol=2e-6 * _rms(first))
    logits = _trace(case, num_ctas).logits
    assert _rms(logits - _trace(case, 1).logits) <= bound


@pytest.mark.parametrize("num_ctas", [1, 132])
def test_noise_beyond_the_live_length_changes_no_bit(num_ctas):
  case = _CASES["1 query per head of 128"]
  operands = dict(_operands(case, num_ctas))
  noise = 100 * np.random.default_rng(3).normal(size=case.caches[0].shape)
  # The new token's own slot is not live before the step.
  slots = (
    np.arange(case.capacity)[None, :] >= np.asarray(case.positions)[:, None]
  )
  slots = slots[None, :, None, :, None]
  for name in ("k_cache", "v_cache"):
    operands[name] = np.where(
      slots, noise.astype(np.float32).astype(_BF16), operands[name]
    )
  noisy = emulator.run(case.plan(num_ctas), operands)
  trace = _trace(case, num_ctas)
  _assert_same(trace, noisy)
  for name in ("k_cache", "v_cache"):
    np.testing.assert_array_equal(
      _entries(case, getattr(noisy, name)), _entries(case, getattr(trace, name))
    )


def test_chunks_beyond_a_run_change_no_bit():
  operands = dict(_operands(_MAIN, 3))
  poisoned = 0
  for i, name in enumerate(
    ("w_qkv", "w_o", "w_gate_up", "w_down", "w_lm_head")
  ):
    packed = operands[name].copy()
    per_unit = _MAIN.plan(3).schedule.matmuls[i].chunks_per_unit
    for cta, count in enumerate(operands["table"][:, i, 1] * per_unit):
      poisoned += packed[..., cta, count:, :, :].size
      packed[..., cta, count:, :, :] = np.nan
    operands[name] = packed
  assert poisoned > 0
  _assert_same(_trace(_MAIN, 3), emulator.run(_MAIN.plan(3), operands))


def test_inactive_sequences_change_nothing():
  operands = dict(_operands(_MAIN, 5))
  # The middle one ends: it stands at 0 and runs along.
  positions = [_MAIN.positions[0], 0, _MAIN.positions[2]]
  operands["progress"] = _progress(_MAIN.token_ids, positions, [1, 0, 1])
  cos, sin = rope.cos_sin(_MAIN.config, jnp.asarray(_pad8(positions)))
  operands["angles"] = np.stack([cos, sin])[None]
  found = emulator.run(_MAIN.plan(5), operands)
  trace = _trace(_MAIN, 5)
  for name in ("qkv", "attended", "hidden", "logits", "next_ids"):
    np.testing.assert_array_equal(
      getattr(found, name)[::2], getattr(trace, name)[::2]
    )
  for name in ("k_cache", "v_cache"):
    after, before = getattr(found, name), operands[name]
    np.testing.assert_array_equal(after[:, 1], before[:, 1])
    np.testing.assert_array_equal(after[:, ::2], getattr(trace, name)[:, ::2])
  assert not np.isnan(found.logits).any()


def test_where_sequences_stand_next():
  plan, operands = _MAIN.plan(5), dict(_operands(_MAIN, 5))
  ids = _trace(_MAIN, 5).next_ids
  assert _MAIN.positions == (0, 63, _CAPACITY - 1)
  # The first goes on, the second ends by its token, the third fills the cache.
  found = emulator.run(plan, operands, eos_token_ids=(int(ids[1]),))
  expected = _progress(ids, [1, 0, 0], [1, 0, 0], step=1)
  np.testing.assert_array_equal(found.progress[:, :3], expected[:, :3])
  np.testing.assert_array_equal(found.emitted[0, :3], ids)
  # Nothing is left to do.
  operands["progress"] = found.progress
  after = emulator.run(plan, operands)
  for name in ("progress", "emitted", "k_cache", "v_cache"):
    np.testing.assert_array_equal(getattr(after, name), operands[name])
  assert np.isnan(after.logits).all()
  # A second step emits a row of its own, and turns by angles of its own.
  operands = dict(_operands(_MAIN, 5))
  operands |= dict(
    progress=_progress(
      _MAIN.token_ids, _MAIN.positions, [1, 0, 1], step=1, max_steps=2
    ),
    angles=np.concatenate([operands["angles"] + 1, operands["angles"]]),
    emitted=np.full((2, 8), -1, np.int32),
  )
  second = emulator.run(plan, operands)
  np.testing.assert_array_equal(second.next_ids, ids)
  np.testing.assert_array_equal(
    second.emitted[:, :3], [[-1] * 3, [ids[0], -1, ids[2]]]
  )
  assert second.progress[0, 1] == _MAIN.token_ids[1]


# ---- split attention -------------------------------------------------------


def test_keys_of_a_head_are_split_and_merged(monkeypatch):
  merges = []

  def counted(ours, theirs, merge=emulator._merge):
    merges.append(len(theirs))
    return merge(ours, theirs)

  monkeypatch.setattr(emulator, "_merge", counted)
  plan = _LONG.plan(132)
  trace = emulator.run(plan, _operands(_LONG, 132))
  num_splits = [split_of(p, 0, plan.splits)[3] for p in _LONG.positions]
  assert num_splits == [5, 2, 1]
  assert sum(merges) == 2 * _LONG.k * sum(n - 1 for n in num_splits)
  assert max(_errors(_LONG, trace)) <= 1.5
  merges.clear()
  whole = emulator.run(_LONG.plan(1), _operands(_LONG, 1), (0, ATTENTION))
  assert not merges
  # Splits round their softmax weights relative to a maximum of their own:
  # each part of the sum by at most 2^-8 of itself.
  split = _trace(_LONG, 132, (0, ATTENTION)).attended
  assert 0 < _rms(split - whole.attended) <= 2**-8 * _rms(whole.attended)


# ---- what comes between ----------------------------------------------------


def _plain_step(case, to_dtype):
  """Yields layer, phase, and the name and value of what the phase computes.

  In float64 with `to_dtype` after every operation that the reference rounds.
  """

  def weight(*path, layer=None):
    leaf = case.model.params
    for key in path:
      leaf = leaf[key]
    leaf = np.asarray(leaf["weight"], np.float64)
    return leaf if layer is None else leaf[layer]

  def norm(x, gain):
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return to_dtype(x / np.sqrt(mean + case.config.rms_norm_eps) * gain)

  def heads(x):
    return to_dtype(x).reshape(case.batch, -1, case.h)

  def turned(x, angle):
    z = x[..., : case.h // 2] + 1j * x[..., case.h // 2 :]
    z = z * np.exp(1j * angle)
    return to_dtype(np.concatenate([z.real, z.imag], axis=-1))

  angle = np.asarray(case.positions)[:, None, None] * rope.inv_freq(
    case.config
  ).astype(np.float64)
  embedding = weight("embed_tokens")
  x = embedding[case.token_ids]
  embedded = x
  for layer in range(2):
    w = functools.partial(weight, "layers", layer=layer)
    y = norm(x, w("input_layernorm"))
    q, k, v = (
      heads(y @ w("self_attn", f"{name}_proj").T) for name in ("q", "k", "v")
    )
    q, k = turned(q, angle), turned(k, angle)
    if layer == 0:
      yield 0, QKV, "before", embedded
    yield layer, QKV, "qkv", np.concatenate([q, k, v], axis=1)
    attended = np.zeros((case.batch, case.n, case.h))
    for b, position in enumerate(case.positions):
      for head in range(case.n):
        source = head * case.k // case.n
        keys, values = (
          np.concatenate(
            [
              cache[layer, b, source, :position].astype(np.float64),
              to_dtype(new[b, source])[None],
            ]
          )
          for cache, new in zip(case.caches, (k, v), strict=True)
        )
        scores = keys @ q[b, head] / np.sqrt(case.h)
        p = np.exp(scores - scores.max())
        attended[b, head] = to_dtype(p / p.sum()) @ values
    attended = to_dtype(attended).reshape(case.batch, -1)
    yield layer, ATTENTION, "attended", attended
    x = to_dtype(x + to_dtype(attended @ w("self_attn", "o_proj").T))
    yield layer, O_PROJ, "between", x
    y = norm(x, w("post_attention_layernorm"))
    gate, up = (to_dtype(y @ w("mlp", f"{s}_proj").T) for s in ("gate", "up"))
    hidden = to_dtype(gate / (1 + np.exp(-gate)) * up)
    yield layer, GATE_UP, "hidden", hidden
    x = to_dtype(x + to_dtype(hidden @ w("mlp", "down_proj").T))
    yield layer, DOWN, "before", x
  lm_head = embedding if case.tied else weight("lm_head")
  yield 1, LM_HEAD, "logits", norm(x, weight("norm")) @ lm_head.T


@functools.cache
def _plain(case):
  """Returns what `_plain_step` yields, exact and with bfloat16 rounding."""
  exact = _plain_step(case, lambda x: x)
  low = _plain_step(case, lambda x: x.astype(_BF16).astype(np.float64))
  return [(*x, y[-1]) for x, y in zip(exact, low, strict=True)]


def _named(trace):
  """Returns a trace's arrays under the names that `_plain_step` has."""
  before, between = trace.residual
  names = ("qkv", "attended", "hidden", "logits")
  return dict(
    before=before, between=between, **{x: getattr(trace, x) for x in names}
  )


@pytest.mark.parametrize("name", _CASES)
def test_the_plain_step_is_the_reference(name):
  case = _CASES[name]
  *_, exact, _ = _plain(case)[-1]
  reference = _reference(case, "float32")[0]
  assert _rms(reference - exact) <= 1e-5 * _rms(exact)


@pytest.mark.parametrize("num_ctas", [3, 132])
@pytest.mark.parametrize("name", _TWO)
@pytest.mark.parametrize("index", range(1, 12))
def test_a_step_stops_after_any_phase(name, num_ctas, index):
  case = _CASES[name]
  layer, phase, *_ = _plain(case)[index]
  trace = _trace(case, num_ctas, (layer, phase))
  found = _named(trace)
  # What has been computed by then, the last layer's.
  latest = {x: rest for _, _, x, *rest in _plain(case)[: index + 1]}
  for array, value in found.items():
    if array not in latest:
      assert np.isnan(value).all(), array
      continue
    exact, low = latest[array]
    value = value[:, : exact.shape[1]]
    if array == "before" and (layer, phase) < (0, DOWN):
      np.testing.assert_array_equal(value, exact.astype(np.float32))
      continue
    # A head that is nearly undecided between two tokens scatters.
    bound = 2 * _rms(low - exact)
    assert _rms(value - exact) <= bound, array
    # Far less than what tells one layer's array from another's.
    assert bound <= 0.05 * _rms(exact)
  if phase != LM_HEAD:
    np.testing.assert_array_equal(trace.next_ids, -1)
  # The cache has the new token in the layers whose attention has run.
  for written in range(2):
    came = (written, ATTENTION) <= (layer, phase)
    for name_, before in zip(("k_cache", "v_cache"), case.caches, strict=True):
      after = getattr(trace, name_)[written]
      assert (after != before[written]).any() == came


def test_the_last_stop_is_the_whole_step():
  _assert_same(
    _trace(_MAIN, 3),
    _trace(_MAIN, 3, (1, LM_HEAD)),
    (*_ARRAYS, "k_cache", "v_cache"),
  )


def test_the_number_of_layers_is_an_operand():
  operands = dict(_operands(_MAIN, 3), num_layers=np.asarray([1], np.int32))
  found = emulator.run(_MAIN.plan(3), operands)
  trace = _trace(_MAIN, 3, (0, DOWN))
  _assert_same(found, trace, ("residual", "qkv", "k_cache", "v_cache"))
  assert not np.isnan(found.logits).any()


# ---- errors ----------------------------------------------------------------


def _change(cta, matmul, column, by):
  def change(table):
    table = table.copy()
    table[cta, matmul, column] += by
    return table

  return change


def _add(row, by):
  def change(sequences):
    sequences = sequences.copy()
    sequences[row] += by
    return sequences

  return change


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    # Three of qkv's units for each CTA too few, and from another's.
    ("table", _change(2, 0, 1, -3), "qkv: units that somebody has are"),
    ("table", _change(2, 0, 0, -3), "qkv: units that somebody has are"),
    ("progress", _add(0, 100), r"token_ids=.* is not in \[0, 100\)"),
    ("progress", _add(1, -1), r"positions=.* is not in \[0, 320\)"),
    ("progress", _add(1, 1), r"positions=.* is not in \[0, 320\)"),
    ("num_layers", lambda x: x + 1, r"num_layers=\[3\] is not in \[0, 3\)"),
    (
      "angles",
      lambda x: x[:, :, :3],
      r"angles is float32\[1, 2, 3, 32\], not float32\[1, 2, 8, 32\]",
    ),
    ("norms", lambda x: x.astype(_BF16), "norms is bfloat16"),
  ],
)
def test_operands_that_cannot_be_right_are_errors(name, change, message):
  operands = dict(_operands(_MAIN, 5))
  operands[name] = change(operands[name])
  with pytest.raises(ValueError, match=message):
    emulator.run(_MAIN.plan(5), operands)


def test_missing_operands_are_errors():
  operands = dict(_operands(_MAIN, 5))
  del operands["angles"]
  with pytest.raises(ValueError, match=r"operands differ: \['angles'\]"):
    emulator.run(_MAIN.plan(5), operands)


def test_a_tile_of_keys_may_not_straddle_the_end():
  case = dataclasses.replace(_MAIN, capacity=330)
  operands = dict(_operands(_MAIN, 5))
  operands.update(k_cache=case.caches[0], v_cache=case.caches[1])
  with pytest.raises(ValueError, match="capacity=330"):
    emulator.run(case.plan(5), operands)


@pytest.mark.parametrize("stop_after", [(2, QKV), (0, LM_HEAD)])
def test_a_stop_that_never_comes_is_an_error(stop_after):
  with pytest.raises(ValueError, match="no such layer and phase"):
    _trace(_MAIN, 5, stop_after)


def test_operands_are_not_written():
  operands = {name: x.copy() for name, x in _operands(_MAIN, 5).items()}
  emulator.run(_MAIN.plan(5), operands)
  for name, x in _operands(_MAIN, 5).items():
    np.testing.assert_array_equal(operands[name], x)
