"""One step of the kernel in Pallas' interpreter, set against plain `jnp`.

What the tests of the interpreted kernel share. To be imported only where
`interpreter.missing()` finds nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import code_packing, interpreter, kernel, packing, words
from pallas_kernels.formats import BF16, Format
from pallas_kernels.geometry import Geometry
from pallas_kernels.plan import make_plan, operand_shapes

_F32, _BF16 = jnp.float32, jnp.bfloat16

TINY = Geometry(
  hidden_size=128,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=64,
  vocab_size=128,
  rms_norm_eps=1e-5,
  tie_word_embeddings=True,
)
# Wide heads, padding of everything that can be padded, an LM head of its own.
WIDE = Geometry(
  hidden_size=200,
  intermediate_size=300,
  num_hidden_layers=2,
  num_attention_heads=3,
  num_key_value_heads=1,
  head_dim=128,
  vocab_size=150,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One step.

  Attributes:
    geometry: the model.
    num_ctas: P.
    capacity: S.
    positions: of the new tokens, one per sequence.
    active: whether each sequence's cache is to grow.
    layer_format: how the layers' matrices are stored.
    head_format: how the LM head is.
    compute_wgs: warpgroups that compute, or None for the table's choice.
  """

  geometry: Geometry
  num_ctas: int
  capacity: int
  positions: tuple[int, ...]
  active: tuple[bool, ...] = (True,)
  layer_format: Format = BF16
  head_format: Format = BF16
  compute_wgs: int | None = None


# The ninth has no units but the LM head's last one.
NINE_CTAS = Case(dataclasses.replace(TINY, vocab_size=520), 9, 64, (2,))


def _bf16(x):
  return x.astype(_BF16).astype(_F32)


def _dot(spec, x, y):
  """Multiplies bfloat16 operands, accumulates in float32."""
  return jnp.einsum(spec, _bf16(x), _bf16(y), precision=lax.Precision.HIGHEST)


@dataclasses.dataclass
class Step:
  """The operands of a step, before anything is packed: `[out, in]` matrices."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  o: jax.Array
  gate: jax.Array
  up: jax.Array
  down: jax.Array
  embedding: jax.Array
  lm_head: jax.Array
  norms: jax.Array
  token_ids: jax.Array
  cos: jax.Array
  sin: jax.Array
  k_cache: jax.Array
  v_cache: jax.Array
  # Of matrices that are codes: these, scales, and zeros or minimums.
  codes: dict[str, tuple]


def cos_sin(geometry, positions):
  h = geometry.head_dim
  angles = jnp.array(positions, _F32)[:, None] * (
    10000.0 ** (-jnp.arange(0, h, 2, dtype=_F32) / h)[None, :]
  )
  return jnp.cos(angles), jnp.sin(angles)


def make_step(case):
  g, keys = case.geometry, iter(jax.random.split(jax.random.key(0), 20))
  layers, d, f = g.num_hidden_layers, g.hidden_size, g.intermediate_size
  h, heads, kv_heads = (
    g.head_dim,
    g.num_attention_heads,
    g.num_key_value_heads,
  )

  def normal(*shape, scale=1.0):
    return jax.random.normal(next(keys), shape, _F32) * scale

  def matrix(*shape):
    return normal(*shape, scale=shape[-1] ** -0.5).astype(_BF16)

  batch = len(case.positions)
  cache = (layers, batch, kv_heads, case.capacity, h)
  cos, sin = cos_sin(g, case.positions)
  embedding = normal(g.vocab_size, d).astype(_BF16)
  step = Step(
    q=matrix(layers, heads * h, d),
    k=matrix(layers, kv_heads * h, d),
    v=matrix(layers, kv_heads * h, d),
    o=matrix(layers, d, heads * h),
    gate=matrix(layers, f, d),
    up=matrix(layers, f, d),
    down=matrix(layers, d, f),
    embedding=embedding,
    lm_head=embedding if g.tie_word_embeddings else matrix(g.vocab_size, d),
    norms=1 + normal(2 * layers + 1, d, scale=0.1),
    token_ids=jnp.array(
      [g.vocab_size - 3, 3, 50, 77, 11, 13, 17, 19][:batch], jnp.int32
    ),
    cos=cos,
    sin=sin,
    k_cache=normal(*cache).astype(_BF16),
    v_cache=normal(*cache).astype(_BF16),
    codes={},
  )
  return with_codes(case, step)


def _norm(x, weight, eps):
  """Returns what is rounded, and the factor that products are left with.

  Bfloat16 is sent, and multiplied by the weights before it is rounded again.
  """
  x = _bf16(x)
  scale = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
  return x * weight[None, :], scale


def _rotate(x, cos, sin):
  """Rotates `[B, heads, H]`."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos[:, None], sin[:, None]
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )


def reference(case, s):
  """Returns logits `[B, V]` and new keys and values `[L, B, K, H]`."""
  g = case.geometry
  kv_heads, h, batch = g.num_key_value_heads, g.head_dim, len(case.positions)
  x = s.embedding[s.token_ids].astype(_F32)
  new_k, new_v = [], []
  for layer in range(g.num_hidden_layers):
    y, scale = _norm(x, s.norms[2 * layer], g.rms_norm_eps)
    q, k, v = (
      (_dot("bd,od->bo", y, w[layer]) * scale).reshape(batch, -1, h)
      for w in (s.q, s.k, s.v)
    )
    q, k = _rotate(q, s.cos, s.sin), _rotate(k, s.cos, s.sin)
    new_k.append(k)
    new_v.append(v)
    attended = []
    for b, position in enumerate(case.positions):
      keys, values = (
        jnp.concatenate(
          [cache[layer, b, :, :position].astype(_F32), new[b][:, None]], 1
        )
        for cache, new in ((s.k_cache, k), (s.v_cache, v))
      )
      queries = q[b].reshape(kv_heads, g.group, h)
      scores = _dot("kgh,ksh->kgs", queries, keys) * (h**-0.5)
      p = jnp.exp(scores - scores.max(-1, keepdims=True))
      out = _dot("kgs,ksh->kgh", p, values) / p.sum(-1, keepdims=True)
      attended.append(out.reshape(-1))
    x = x + _dot("ba,da->bd", jnp.stack(attended), s.o[layer])
    y, scale = _norm(x, s.norms[2 * layer + 1], g.rms_norm_eps)
    gate, up = (_dot("bd,fd->bf", y, w[layer]) * scale for w in (s.gate, s.up))
    x = x + _dot("bf,df->bd", gate * jax.nn.sigmoid(gate) * up, s.down[layer])
  y, scale = _norm(x, s.norms[-1], g.rms_norm_eps)
  logits = _dot("bd,vd->bv", y, s.lm_head) * scale
  return logits, jnp.stack(new_k), jnp.stack(new_v)


def progress_of(token_ids, positions, active, step, max_steps):
  """Says where sequences stand, as the kernel takes it."""
  rows = (token_ids, positions, active, (step, max_steps))
  rows = [np.asarray(x, np.int32) for x in rows]
  return jnp.asarray(np.stack([np.pad(x, (0, 8 - len(x))) for x in rows]))


def random_codes(rng, shape, f):
  """Makes a matrix `[L, out, in]` of a format whose weights are bfloat16.

  Returns:
    Codes, scales, what is beside them, and the weights, float32.
  """
  *outer, cols = shape
  groups = 1 if f.group is None else cols // f.group
  # Few bits, other ones in each group: products with codes are not rounded.
  fractions = rng.choice([1.0, 1.25, 1.5, 1.75], (*outer, groups))
  if f.bits == 8 and not f.is_float or f.beside == "minimum":
    fractions = rng.choice([0.5, 1.0, 2.0], (*outer, groups))
  scales = fractions * cols**-0.5 / 2 ** (f.bits - 2)
  scales = 2.0 ** np.round(np.log2(scales / fractions)) * fractions
  values = rng.integers(0, 2**f.bits, shape, np.uint8)
  if f.is_float:
    values &= 0xBF  # Below 2.
    codes, numbers = values, values.view(jnp.float8_e4m3fn)
    scales = scales * 2.0**6
  elif f.bits == 8:
    codes, numbers = values, values.view(np.int8)
  else:
    codes, numbers = values[..., ::2] | values[..., 1::2] << 4, values
  numbers = numbers.astype(np.float32).reshape(*outer, groups, -1)
  beside = None
  spread = scales[..., None]
  if f.beside == "zero":
    beside = rng.integers(0, 17, scales.shape, np.uint8)
    weights = spread * (numbers - beside[..., None])
  elif f.beside == "minimum":
    minimums = -scales * rng.integers(0, 17, scales.shape)
    weights = spread * numbers + minimums[..., None]
    beside = jnp.asarray(minimums, f.scale)
  else:
    weights = spread * (numbers - (8.0 if f.bits == 4 else 0.0))
  weights = weights.reshape(shape).astype(np.float32)
  assert (weights == np.asarray(_bf16(weights))).all()
  return (
    jnp.asarray(codes),
    jnp.asarray(scales, f.scale),
    beside if beside is None else jnp.asarray(beside),
  ), jnp.asarray(weights)


def with_codes(case, s):
  """Returns a step whose matrices are random codes, where the case wants some."""
  rng = np.random.default_rng(0)
  formats = dict.fromkeys(
    ("q", "k", "v", "o", "gate", "up", "down"), case.layer_format
  )
  formats["lm_head"] = case.head_format
  made = {
    name: random_codes(rng, getattr(s, name).shape, f)
    for name, f in formats.items()
    if f.is_packed
  }
  weights = {name: w.astype(_BF16) for name, (_, w) in made.items()}
  if "lm_head" in made and case.geometry.tie_word_embeddings:
    weights["embedding"] = weights["lm_head"]
  return dataclasses.replace(
    s, codes={name: stored for name, (stored, _) in made.items()}, **weights
  )


def pack_codes(case, plan, s):
  """Returns the operands of the matrices that are codes."""
  operands = {}
  parts_of = dict(qkv=tuple("qkv"), gate_up=("gate", "up"))
  for m in plan.schedule.matmuls:
    if not m.format.is_packed:
      continue
    names = parts_of.get(m.name, (m.name,))

    def joined(n, name=m.name, names=names):
      parts = [s.codes[x][n] for x in names]
      if parts[0] is None:
        return None
      if name == "gate_up":
        return packing.interleave(*parts)
      if name == "qkv":
        rows = jnp.concatenate(parts, axis=1)
        return packing.permute_heads(rows, case.geometry.head_dim)
      (rows,) = parts
      return rows

    operands[f"w_{m.name}"] = code_packing.pack_codes(m, joined(0))
    operands[f"s_{m.name}"] = code_packing.pack_scales(m, joined(1), joined(2))
  return operands


def pack(case, plan, s):
  """Lays the operands out as the kernel takes them, for the second of two steps.

  Words are as the first one might have left them; its angles are NaN.
  """
  g, m = case.geometry, plan.schedule
  batch = len(case.positions)

  def rows(x):
    return jnp.pad(x, [(0, 0), (0, 8 - batch)] + [(0, 0)] * (x.ndim - 2))

  qkv = jnp.concatenate([s.q, s.k, s.v], 1)
  angles = rows(jnp.stack([s.cos, s.sin]))
  last_step = np.full((plan.num_words, 2), g.num_hidden_layers, np.int32)
  # Of four bfloat16, that is zeros with the stamp's bit, and NaN.
  in_band = g.num_hidden_layers % 2 << words.STAMP_BIT
  last_step[:, 0] = np.float32(np.nan).view(np.int32) | in_band
  first, row_words = plan.exchanges["final"]
  final = slice(first, first + batch * row_words)
  last_step[final, 0] |= 1 << words.STAMP_BIT
  operands = dict(
    table=jnp.asarray(m.table()),
    num_layers=jnp.full((1,), g.num_hidden_layers, jnp.int32),
    progress=progress_of(s.token_ids, case.positions, case.active, 1, 2),
    angles=jnp.stack([jnp.full_like(angles, jnp.nan), angles]),
    norms=jnp.pad(
      s.norms, ((0, 0), (0, g.padded_hidden_size - g.hidden_size))
    ).reshape(operand_shapes(plan)["norms"][0]),
    embedding=packing.pack_matrix(plan.embedding, s.embedding),
    emitted=jnp.full((2, 8), -1, jnp.int32),
    words=jnp.asarray(last_step),
    k_cache=s.k_cache,
    v_cache=s.v_cache,
  )
  rows = dict(
    qkv=packing.permute_heads(qkv, g.head_dim),
    o=s.o,
    gate_up=packing.interleave(s.gate, s.up),
    down=s.down,
    lm_head=s.lm_head,
  )
  operands |= {
    f"w_{x.name}": packing.pack_matrix(x, rows[x.name])
    for x in m.matmuls
    if not x.format.is_packed
  }
  operands |= pack_codes(case, plan, s)
  expected = operand_shapes(plan, 2)
  operands = {name: operands[name] for name in expected}
  assert {k: (x.shape, x.dtype) for k, x in operands.items()} == {
    k: (shape, jnp.dtype(dtype)) for k, (shape, dtype) in expected.items()
  }
  return operands


@functools.cache
def _compiled(plan, detect_races, **kwargs):
  """Returns a function of the operands; compiling it takes most of a run."""
  return jax.jit(
    functools.partial(
      kernel.launch,
      plan,
      interpret=interpreter.interpret_params(detect_races),
      as_cluster=True,
      **kwargs,
    )
  )


def launch(plan, operands, *, detect_races=True, **kwargs):
  """Runs the kernel.

  Args:
    plan: sizes and schedule.
    operands: as `pack` makes them.
    detect_races: whether to look for races.
    **kwargs: for `kernel.make_step`.

  Returns:
    Logits `[B, V]` or None, the operands that have changed, and whether races
    were found.
  """
  interpreter.install()
  interpreter.reset()
  run = _compiled(plan, detect_races, **kwargs)
  logits, changed = jax.block_until_ready(run(operands))
  if logits is not None:
    logits = np.asarray(logits)[:, : plan.geometry.vocab_size]
  return logits, changed, detect_races and interpreter.races_found()


def plan_of(case):
  batch = len(case.positions)
  return make_plan(
    case.geometry,
    batch,
    case.capacity,
    case.num_ctas,
    layer_format=case.layer_format,
    compute_wgs=case.compute_wgs,
    head_format=case.head_format,
  )


def interpret(case, s, *, detect_races=True, perturb=None, **kwargs):
  """Runs one step.

  Args:
    case: what to run.
    s: its operands.
    detect_races: whether to look for races.
    perturb: what maps the packed operands, a dict, to those that are used.
    **kwargs: for `kernel.make_step`.

  Returns:
    Logits and what has changed, and whether races were found.
  """
  plan = plan_of(case)
  operands = pack(case, plan, s)
  if perturb is not None:
    operands = perturb(operands)
  logits, changed, races = launch(
    plan, operands, detect_races=detect_races, **kwargs
  )
  changed = {name: np.asarray(x) for name, x in changed.items()}
  return (logits, changed), races


def assert_close(actual, expected):
  # Sums in another order now and then round an operand to its neighbour, 2^-8
  # away; the sum then moves by a fraction of that.
  bound = 2**-7 * np.abs(expected).max()
  error = np.abs(actual - expected).max()
  assert error < bound, f"{error} is not below {bound}"  # Nor is NaN.


def check(case, **kwargs):
  """Asserts that the kernel does what plain `jnp` does, and without a race.

  All that is wrong is in the error's message, by the names that follow.

  Args:
    case: what to run.
    **kwargs: for `interpret`.
  """
  s = make_step(case)
  (logits, changed), races = interpret(case, s, **kwargs)
  expected_logits, new_k, new_v = reference(case, s)
  active, positions = np.array(case.active), np.array(case.positions)
  batch = len(active)
  next_ids, *progress = changed["progress"][:, :batch]
  found = []

  def expect(name, assertion, *args):
    try:
      assertion(*args)
    except AssertionError as e:
      found.append(f"{name}: {e}")

  def equal(x, y):
    np.testing.assert_array_equal(x, y)

  expect(
    "logits", assert_close, logits[active], np.asarray(expected_logits)[active]
  )
  expect("next ids", equal, next_ids[active], logits.argmax(-1)[active])
  goes_on = active & (positions + 1 < case.capacity)
  expect("kept ids", equal, next_ids[~active], s.token_ids[~active])
  expect("positions", equal, progress[0], np.where(goes_on, positions + 1, 0))
  expect("activity", equal, progress[1], goes_on)
  expect("clock", equal, changed["progress"][3, :2], [2, 2])
  emitted = np.full((2, batch), -1)
  emitted[1, active] = next_ids[active]
  expect("emitted", equal, changed["emitted"][:, :batch], emitted)
  for name, before, new in (
    ("k_cache", s.k_cache, new_k),
    ("v_cache", s.v_cache, new_v),
  ):
    cache = changed[name]
    before = np.array(before.astype(_F32))
    cache = cache.astype(np.float32)
    for b, position in enumerate(case.positions):
      if case.active[b]:
        actual, expected = cache[:, b, :, position], np.asarray(new)[:, b]
        expect("new rows", assert_close, actual, expected)
        before[:, b, :, position] = actual
    # Nothing else in the cache has changed.
    expect("other rows", equal, cache, before)
  if races:
    found.append("races")
  assert not found, "\n".join(found)
