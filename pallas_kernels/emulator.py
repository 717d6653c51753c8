"""The kernel's step without a GPU: the same schedule over the same arrays.

What a CTA multiplies, what it hands on and in which order sums are taken all
come from the table and from `schedule.split_of`, weights from the packed
arrays, and bfloat16 rounding happens where the kernel rounds. So a difference
between the two is one of the kernel's own, and `stop_after` says in which
phase it begins. Only sums within half a chunk of columns or a tile of keys, and
`exp` and `rsqrt`, round as the platform likes.

The arithmetic is JAX's, in pieces of one shape whatever the model, so that
little is compiled; the CTAs are a Python loop. What they exchange is NaN until
somebody publishes it, and a table by which a CTA would wait forever is an
error.

Axis letters: L layers, B batch, D width, N query heads, K KV heads, G = N / K,
H head size, F MLP width, V vocabulary, S cache slots, P CTAs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.geometry import (
  CHUNK_COLS,
  CHUNK_ROWS,
  HALF,
  MAX_BATCH,
  TILE,
)
from pallas_kernels.plan import (
  ATTENTION,
  DOWN,
  EMBED,
  GATE_UP,
  LM_HEAD,
  MASKED,
  O_PROJ,
  QKV,
  Plan,
  operand_shapes,
)
from pallas_kernels.schedule import Matmul, split_of

_BF16 = np.dtype(jnp.bfloat16)
# Chunks that are multiplied at once.
_BLOCK = 64

_State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Trace:
  """What a step has left when it ends; NaN or -1 where it never came.

  Padded sizes D', F' and V' are those of `Geometry`. Of arrays that each layer
  overwrites, it is the last layer's.

  Attributes:
    residual: `[2, B, D']` float32, the residual stream: 0 is before a layer's
      attention, so after EMBED and DOWN; 1 is before its MLP, after O_PROJ.
    qkv: `[B, N + 2 K, H]` float32, queries and keys after rope, and values.
    attended: `[B, N H]` float32, the heads' outputs.
    hidden: `[B, F']` float32, `silu(gate) * up`.
    logits: `[B, V']` float32; zero beyond V.
    next_ids: `[B]` int32, the largest logit, the first of equals.
    k_cache: `[L, B, K, S, H]` bfloat16, with the new key of active sequences
      in each layer whose attention has run.
    v_cache: likewise, of values.
  """

  residual: np.ndarray
  qkv: np.ndarray
  attended: np.ndarray
  hidden: np.ndarray
  logits: np.ndarray
  next_ids: np.ndarray
  k_cache: np.ndarray
  v_cache: np.ndarray


def run(
  plan: Plan,
  operands: Mapping[str, Any],
  stop_after: tuple[int, int] | None = None,
) -> Trace:
  """Runs one step, or the beginning of one.

  Args:
    plan: model, batch, capacity and CTAs.
    operands: the arrays that `operand_shapes` lists; none is changed. As in
      the kernel, it is `num_layers` that says how many layers run.
    stop_after: layer and phase; None for the whole step. EMBED counts as layer
      0's, LM_HEAD as the last layer's.

  Raises:
    ValueError: if operands do not have the plan's shapes and dtypes, a token
      or position is out of range, there is no such layer and phase, or the
      kernel would never finish with this table.
  """
  step = _Step(plan, operands)
  phases = list(step.phases())
  if stop_after is not None:
    if stop_after not in phases:
      raise ValueError(f"{stop_after=}: there is no such layer and phase")
    phases = phases[: phases.index(stop_after) + 1]
  for layer, phase in phases:
    step.run_phase(layer, phase)
  return step.trace()


def _check_operands(plan: Plan, operands: Mapping[str, np.ndarray]) -> None:
  g = plan.geometry
  expected = operand_shapes(plan)
  if set(operands) != set(expected):
    raise ValueError(
      f"operands differ: {sorted(set(operands) ^ set(expected))}"
    )
  for name, (shape, dtype) in expected.items():
    found = operands[name]
    if found.shape != shape or found.dtype != dtype:
      raise ValueError(
        f"{name} is {found.dtype}{list(found.shape)}, not"
        f" {np.dtype(dtype)}{list(shape)}"
      )
  if plan.capacity % TILE:
    raise ValueError(f"capacity={plan.capacity} is not a multiple of {TILE}")
  for name, rows, limit in (
    ("token_ids", plan.batch, g.vocab_size),
    ("positions", plan.batch, plan.capacity),
    ("num_layers", 1, g.num_hidden_layers + 1),
  ):
    values = operands[name][:rows]
    if not ((values >= 0) & (values < limit)).all():
      raise ValueError(f"{name}={values.tolist()} is not in [0, {limit})")


# ---- arithmetic ------------------------------------------------------------


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  # Products of bfloat16 are exact in float32, so widening first changes
  # nothing.
  return jnp.einsum(
    spec,
    x.astype(jnp.float32),
    y.astype(jnp.float32),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


@jax.jit
def _multiply(chunks: jax.Array, x: jax.Array) -> jax.Array:
  """Multiplies chunks `[_, 128, 64]` by their columns `[_, 2, 8, 64]`.

  Returns:
    `[_, 2, 8, 64]` float32, one product for each half of a chunk.
  """
  return _dot("ihrc,ihbc->ihbr", chunks.reshape(-1, 2, TILE, TILE), x)


@jax.jit
def _norm(
  x: jax.Array, gain: jax.Array, inverse_size: jax.Array, eps: jax.Array
) -> jax.Array:
  """Returns the RMS norm `[8, D']` bfloat16 of float32 `x`."""
  mean = jnp.sum(x * x, axis=1, keepdims=True) * inverse_size
  return (x * lax.rsqrt(mean + eps) * gain[None, :]).astype(jnp.bfloat16)


@jax.jit
def _rotate(
  y: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Turns the halves of `[8, 64]` by angles `[8, 32]`; all float32."""
  a, b = y[:, :HALF], y[:, HALF:]
  return a * cos - b * sin, b * cos + a * sin


@jax.jit
def _swiglu(y: jax.Array) -> jax.Array:
  """Returns `silu(gate) * up`, `[8, 32]`, of the two halves of `[8, 64]`."""
  gate, up = y[:, :HALF], y[:, HALF:]
  return gate * (1 / (1 + jnp.exp(-gate))) * up


@jax.jit
def _attend_tile(
  state: _State, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> _State:
  """Adds one tile of keys to the online softmax of one KV head.

  Args:
    state: running maximum `[8, 1]`, sum `[8, 1]` and output `[8, H]`, float32.
    q: `[8, H]` bfloat16, the G queries and whatever comes after them.
    k: `[64, H]` bfloat16.
    v: `[64, H]` bfloat16.
    visible: how many of the keys, int32 scalar.
  """
  top, total, out = state
  scores = _dot("gh,sh->gs", q, k) * np.float32(q.shape[1] ** -0.5)
  seen = jnp.arange(TILE, dtype=jnp.int32) < visible
  scores = jnp.where(seen[None, :], scores, np.float32(MASKED))
  new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
  alpha = jnp.exp(top - new_top)
  p = jnp.exp(scores - new_top)
  total = total * alpha + jnp.sum(p, axis=1, keepdims=True)
  out = out * alpha + _dot("gs,sh->gh", p.astype(jnp.bfloat16), v)
  return new_top, total, out


@jax.jit
def _merge(ours: _State, theirs: _State) -> _State:
  """Joins the attention of two sets of keys."""
  top = jnp.maximum(ours[0], theirs[0])
  alpha, beta = jnp.exp(ours[0] - top), jnp.exp(theirs[0] - top)
  return (
    top,
    ours[1] * alpha + theirs[1] * beta,
    ours[2] * alpha + theirs[2] * beta,
  )


def _products(packed: np.ndarray, x_chunks: np.ndarray) -> np.ndarray:
  """Multiplies every chunk of a matrix by the columns that it meets.

  Args:
    packed: `[P, n, 128, 64]` bfloat16.
    x_chunks: `[P, n, 2, 8, 64]` bfloat16.

  Returns:
    `[P, n, 2, 8, 64]` float32.
  """
  lead = packed.shape[:2]
  chunks = packed.reshape(-1, CHUNK_ROWS, CHUNK_COLS // 2)
  x = x_chunks.reshape(-1, 2, MAX_BATCH, TILE)
  # Whole blocks only, so that `_multiply` is compiled once.
  missing = -len(chunks) % _BLOCK
  chunks = np.pad(chunks, ((0, missing), (0, 0), (0, 0)))
  x = np.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0)))
  found = [
    _multiply(chunks[i : i + _BLOCK], x[i : i + _BLOCK])
    for i in range(0, len(chunks), _BLOCK)
  ]
  products = np.concatenate(found)[: len(chunks) - missing]
  return products.reshape(*lead, 2, MAX_BATCH, TILE)


# ---- the step --------------------------------------------------------------


class _Step:
  """Everything that the CTAs of a step share, and what each of them does.

  Arrays per sequence have 8 rows, as many as `wgmma` takes; those beyond the
  batch stay NaN.
  """

  def __init__(self, plan: Plan, operands: Mapping[str, Any]):
    self._plan, self._geometry = plan, plan.geometry
    ops = {name: np.asarray(x) for name, x in operands.items()}
    _check_operands(plan, ops)
    self._ops = ops
    self._num_layers = int(ops["num_layers"][0])
    self._k_cache = ops["k_cache"].copy()
    self._v_cache = ops["v_cache"].copy()

    def unpublished(*shape: int) -> np.ndarray:
      return np.full(shape, np.nan, np.float32)

    g, rows = plan.geometry, MAX_BATCH
    self._residual = unpublished(2, rows, g.padded_hidden_size)
    self._qkv = unpublished(rows, g.num_qkv_heads, g.head_dim)
    self._attended = unpublished(rows, g.num_attention_heads * g.head_dim)
    self._hidden = unpublished(rows, g.padded_intermediate_size)
    self._logits = unpublished(rows, g.padded_vocab_size)
    self._next_ids = np.full(rows, -1, np.int32)

  def phases(self) -> Iterator[tuple[int, int]]:
    """Yields layer and phase in the order in which they run."""
    yield 0, EMBED
    for layer in range(self._num_layers):
      for phase in (QKV, ATTENTION, O_PROJ, GATE_UP, DOWN):
        yield layer, phase
    yield max(0, self._num_layers - 1), LM_HEAD

  def trace(self) -> Trace:
    """Returns what there is so far."""
    batch = self._plan.batch
    return Trace(
      residual=self._residual[:, :batch],
      qkv=self._qkv[:batch],
      attended=self._attended[:batch],
      hidden=self._hidden[:batch],
      logits=self._logits[:batch],
      next_ids=self._next_ids[:batch],
      k_cache=self._k_cache,
      v_cache=self._v_cache,
    )

  def run_phase(self, layer: int, phase: int) -> None:
    """Runs a phase on all CTAs, after everything before it has run."""
    ops, schedule = self._ops, self._plan.schedule
    before, between = self._residual
    if phase == EMBED:
      self._embed()
    elif phase == QKV:
      x = self._normed(before, 2 * layer)
      packed = ops["w_qkv"][layer]
      self._matmul(schedule.qkv, packed, x, self._finish_qkv)
    elif phase == ATTENTION:
      self._attention(layer)
    elif phase == O_PROJ:
      x = self._attended.astype(_BF16)
      finish = functools.partial(self._finish_residual, before, between)
      self._matmul(schedule.o, ops["w_o"][layer], x, finish)
    elif phase == GATE_UP:
      x = self._normed(between, 2 * layer + 1)
      packed = ops["w_gate_up"][layer]
      self._matmul(schedule.gate_up, packed, x, self._finish_gate_up)
    elif phase == DOWN:
      x = self._hidden.astype(_BF16)
      finish = functools.partial(self._finish_residual, between, before)
      self._matmul(schedule.down, ops["w_down"][layer], x, finish)
    elif phase == LM_HEAD:
      x = self._normed(before, 2 * self._num_layers)
      packed = ops["w_lm_head"]
      self._matmul(schedule.lm_head, packed, x, self._finish_lm_head)
      self._choose()

  def _embed(self) -> None:
    """Takes the tokens' rows out of the packed table."""
    lm_head = self._plan.schedule.lm_head
    for b, token in enumerate(self._ops["token_ids"][: self._plan.batch]):
      for i in range(lm_head.chunks_per_tile):
        chunk = token // TILE * lm_head.chunks_per_tile + i
        packed = self._ops["embedding"][
          chunk // lm_head.run, chunk % lm_head.run
        ]
        # The two halves of a row of 128 columns.
        row = packed[token % TILE :: TILE].reshape(-1)
        self._residual[0, b, i * CHUNK_COLS : (i + 1) * CHUNK_COLS] = row

  def _normed(self, x: np.ndarray, norm: int) -> np.ndarray:
    return np.asarray(
      _norm(
        x,
        self._ops["norms"][norm],
        np.float32(1 / self._geometry.hidden_size),
        np.float32(self._geometry.rms_norm_eps),
      )
    )

  def _matmul(
    self,
    matmul: Matmul,
    packed: np.ndarray,
    x: np.ndarray,
    finish: Callable[[int, np.ndarray], None],
  ) -> None:
    """Runs all CTAs' runs of a matrix.

    Args:
      matmul: the matrix.
      packed: `[P, n, 128, 64]` bfloat16.
      x: `[8, columns]` bfloat16; columns of padding may be missing.
      finish: takes a tile's index and its sums `[8, 64]` float32.
    """
    per_tile, num_ctas = matmul.chunks_per_tile, matmul.num_ctas
    index = self._plan.schedule.matmuls.index(matmul)
    runs = self._ops["table"][:, index].tolist()
    x = np.pad(x, ((0, 0), (0, matmul.cols - x.shape[1])))
    x = x.reshape(MAX_BATCH, per_tile, 2, TILE).transpose(1, 2, 0, 3)
    first = self._ops["table"][:, index, :1]
    x_chunk = (first + np.arange(matmul.run)[None]) % per_tile
    products = _products(packed, x[x_chunk])

    # What each CTA hands to the owner of a tile, and who has handed on to whom.
    partial = np.full((num_ctas, MAX_BATCH, TILE), np.nan, np.float32)
    joined = [0] * num_ctas
    awaited = [0] * num_ctas
    owned: list[tuple[int, int, np.ndarray]] = []
    for cta, (first, count, joins) in enumerate(runs):
      end = first + count
      if not count:
        continue
      for tile in range(first // per_tile, -(-end // per_tile)):
        begin = max(first, tile * per_tile)
        stop = min(end, (tile + 1) * per_tile)
        sums = np.zeros((MAX_BATCH, TILE), np.float32)
        for halves in products[cta, begin - first : stop - first]:
          sums = sums + halves[0] + halves[1]
        if begin != tile * per_tile:
          partial[cta] = sums
          joined[tile * per_tile // matmul.run] += 1
          continue
        owned.append((cta, tile, sums))
        if stop < (tile + 1) * per_tile:
          awaited[cta] = joins
    tiles = [tile for _, tile, _ in owned]
    if tiles != list(range(matmul.num_tiles)):
      raise ValueError(f"{matmul.name}: tiles with owners are {tiles}")
    if joined != awaited:
      raise ValueError(
        f"{matmul.name}: CTAs wait for {awaited} parts, and {joined} come"
      )
    owners = [cta for cta, _, _ in owned]
    if len(set(owners)) != matmul.num_owners:
      raise ValueError(f"{matmul.name}: not {matmul.num_owners} CTAs publish")
    for i, (cta, tile, sums) in enumerate(owned):
      # Only the last tile of a run goes on in others.
      if owners[i + 1 : i + 2] != [cta]:
        for theirs in partial[cta + 1 : cta + 1 + awaited[cta]]:
          sums = sums + theirs
      finish(tile, sums)

  def _finish_qkv(self, tile: int, sums: np.ndarray) -> None:
    g = self._geometry
    head, block = divmod(tile, g.head_dim // TILE)
    at = slice(block * HALF, (block + 1) * HALF)
    cos, sin = self._ops["cos"][:, at], self._ops["sin"][:, at]
    if head >= g.num_attention_heads + g.num_key_value_heads:
      # Values are turned by the angle 0.
      cos, sin = np.ones_like(cos), np.zeros_like(sin)
    halves = self._qkv.reshape(MAX_BATCH, -1, 2, g.head_dim // 2)
    for j, y in enumerate(_rotate(sums, cos, sin)):
      halves[:, head, j, at] = y

  def _finish_residual(
    self, source: np.ndarray, target: np.ndarray, tile: int, sums: np.ndarray
  ) -> None:
    at = slice(tile * TILE, (tile + 1) * TILE)
    target[:, at] = sums + source[:, at]

  def _finish_gate_up(self, tile: int, sums: np.ndarray) -> None:
    self._hidden[:, tile * HALF : (tile + 1) * HALF] = _swiglu(sums)

  def _finish_lm_head(self, tile: int, sums: np.ndarray) -> None:
    self._logits[:, tile * TILE : (tile + 1) * TILE] = sums

  def _choose(self) -> None:
    # Comparisons do not round, so it does not matter in which order CTAs take
    # the best of their tiles and then of each other.
    real = self._logits[:, : self._geometry.vocab_size]
    self._next_ids = np.argmax(real, axis=1).astype(np.int32)

  def _attention(self, layer: int) -> None:
    """Runs all items of attention, each of one sequence, KV head and split."""
    g, plan = self._geometry, self._plan
    for b in range(plan.batch):
      position = int(self._ops["positions"][b])
      _, _, _, num_splits = split_of(position, 0, plan.splits)
      for head in range(g.num_key_value_heads):
        parts = [
          self._attend(layer, b, head, split) for split in range(plan.splits)
        ]
        come = [part for part in parts if part is not None]
        if parts[0] is None or len(come) != num_splits:
          raise ValueError(f"{len(come)} of {num_splits} splits do anything")
        _, total, out = functools.reduce(_merge, come)
        start = head * g.group * g.head_dim
        self._attended[b, start : start + g.group * g.head_dim] = np.asarray(
          out / total
        )[: g.group].reshape(-1)

  def _attend(self, layer: int, b: int, head: int, split: int) -> _State | None:
    """Returns one split's state; None if there is nothing for it to do."""
    g = self._geometry
    position = int(self._ops["positions"][b])
    first, end, tiles, _ = map(
      int, split_of(position, split, self._plan.splits)
    )
    if first >= end:
      return None
    # As many rows as `wgmma` takes; those beyond G have no meaning.
    q = np.zeros((MAX_BATCH, g.head_dim), _BF16)
    q[: g.group] = self._qkv[b, head * g.group : (head + 1) * g.group]
    key_head = g.num_attention_heads + head
    new = self._qkv[b, key_head :: g.num_key_value_heads][:2].astype(_BF16)
    state: _State = (
      jnp.full((MAX_BATCH, 1), MASKED, jnp.float32),
      jnp.zeros((MAX_BATCH, 1), jnp.float32),
      jnp.zeros((MAX_BATCH, g.head_dim), jnp.float32),
    )
    caches = self._k_cache[layer, b, head], self._v_cache[layer, b, head]
    for tile in range(first, end):
      k, v = (x[tile * TILE : (tile + 1) * TILE] for x in caches)
      if tile == tiles - 1:
        # The new token is not in the cache yet.
        k, v = k.copy(), v.copy()
        k[position % TILE], v[position % TILE] = new
        k[position % TILE + 1 :] = v[position % TILE + 1 :] = 0
      visible = np.int32(min(TILE, position + 1 - tile * TILE))
      state = _attend_tile(state, q, k, v, visible)
    # The split with the last tile writes the new key and value.
    if end == tiles and self._ops["active"][b] > 0:
      for cache, entry in zip(caches, new, strict=True):
        cache[position] = entry
    return state
