"""The kernel's step without a GPU: the same schedule over the same arrays.

What a CTA multiplies, what it hands on and in which order sums are taken all
come from the table and from `schedule.split_of`, weights from the packed
arrays, and bfloat16 rounding happens where the kernel rounds. So a difference
between the two is one of the kernel's own, and `stop_after` says in which
phase it begins. Only sums within half a chunk of columns, over segments and
blocks of columns, or over a tile of keys, and `exp` and `rsqrt`, round as the
platform likes; of codes, sums within a whole chunk, whose weights are scaled
before they are multiplied and not after.

The arithmetic is JAX's, in pieces of one shape whatever the model, so that
little is compiled; the CTAs are a Python loop. What they exchange is NaN until
somebody sends it, and a table by which a CTA would wait forever is an error.

Axis letters: L layers, B batch, D width, N query heads, K KV heads, G = N / K,
H head size, F MLP width, V vocabulary, S cache slots, P CTAs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.code_packing import chunk_values
from pallas_kernels.formats import Format
from pallas_kernels.geometry import (
  CHUNK_COLS,
  MAX_BATCH,
  SEGMENTS,
  TILE,
  UNIT_ROWS,
)
from pallas_kernels.plan import (
  ATTENTION,
  DOWN,
  GATE_UP,
  LM_HEAD,
  MASKED,
  O_PROJ,
  QKV,
  Plan,
  operand_shapes,
)
from pallas_kernels.schedule import Matmul, split_of
from pallas_kernels.steps import CLOCK, advance

_BF16 = np.dtype(jnp.bfloat16)
# Chunks that are multiplied at once.
_BLOCK = 64

_State = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Trace:
  """What a step has left when it ends; NaN or -1 where it never came.

  D', F' and V' are rounded up to whole units of rows. Of arrays that each layer
  overwrites, it is the last layer's.

  Attributes:
    residual: `[2, B, D']` float32, the residual stream: 0 is before a layer's
      attention, so embeddings and after DOWN; 1 is before its MLP, after
      O_PROJ.
    qkv: `[B, N + 2 K, H]`, queries and keys after rope, and values; float32
      that holds bfloat16, as it is sent.
    attended: `[B, N H]` likewise, the heads' outputs.
    hidden: `[B, F']` likewise, `silu(gate) * up`.
    logits: `[B, V']` float32; zero beyond V.
    next_ids: `[B]` int32, the largest logit, the first of equals.
    k_cache: `[L, B, K, S, H]` bfloat16, with the new key of active sequences
      in each layer whose attention has run.
    v_cache: likewise, of values.
    progress: `[4, 8]` int32, where the sequences stand next, see `steps`.
    emitted: `[T, 8]` int32, with this step's row.
  """

  residual: np.ndarray
  qkv: np.ndarray
  attended: np.ndarray
  hidden: np.ndarray
  logits: np.ndarray
  next_ids: np.ndarray
  k_cache: np.ndarray
  v_cache: np.ndarray
  progress: np.ndarray
  emitted: np.ndarray


def run(
  plan: Plan,
  operands: Mapping[str, Any],
  stop_after: tuple[int, int] | None = None,
  eos_token_ids: tuple[int, ...] = (),
) -> Trace:
  """Runs one step, or the beginning of one; or nothing, if nothing is to do.

  Args:
    plan: model, batch, capacity and CTAs.
    operands: the arrays that `operand_shapes` lists; none is changed. As in
      the kernel, it is `num_layers` that says how many layers run.
    stop_after: layer and phase; None for the whole step. LM_HEAD counts as the
      last layer's.
    eos_token_ids: tokens that end a sequence.

  Raises:
    ValueError: if operands do not have the plan's shapes and dtypes, a token
      or position is out of range, there is no such layer and phase, or the
      kernel would never finish with this table.
  """
  step = _Step(plan, operands, eos_token_ids)
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
  expected = operand_shapes(plan, len(operands.get("emitted", ())))
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
  token_ids, positions, _, _ = operands["progress"][:, : plan.batch]
  step, max_steps = operands["progress"][CLOCK, :2]
  for name, values, limit in (
    ("token_ids", token_ids, g.vocab_size),
    ("positions", positions, plan.capacity),
    ("num_layers", operands["num_layers"], g.num_hidden_layers + 1),
    ("step", step, max_steps + 1),
    ("max_steps", max_steps, len(operands["emitted"]) + 1),
  ):
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
  """Multiplies chunks `[_, 128, 64]` by their columns `[_, 2, 8, 8, 64]`.

  Args:
    chunks: for each half, row and segment 64 columns.
    x: for each half, segment and sequence the same columns.

  Returns:
    `[_, 2, 8, 8, 8]` float32: one product for each half, sequence, row and
    segment.
  """
  weights = chunks.reshape(-1, 2, UNIT_ROWS, SEGMENTS, CHUNK_COLS // 2)
  return _dot("ihrsc,ihsbc->ihbrs", weights, x)


@functools.partial(jax.jit, static_argnames=("f", "tiles"))
def _multiply_codes(
  f: Format, tiles: int, chunks: jax.Array, entries: jax.Array, x: jax.Array
) -> jax.Array:
  """Multiplies chunks of codes by their columns `[_, 8, 8, columns]`.

  Args:
    f: the format.
    tiles: times 128 columns in a chunk.
    chunks: `[_, rows of the ring, 64]` bfloat16, in name.
    entries: `[_, rows, 32]` int32, their scales.
    x: for each segment and sequence the same columns, bfloat16.

  Returns:
    `[_, 8, 8, 8]` float32: one product for each sequence, row and segment.
  """
  values = jax.vmap(functools.partial(chunk_values, f, tiles))(chunks, entries)
  weights = values.reshape(-1, UNIT_ROWS, SEGMENTS, tiles * CHUNK_COLS)
  return _dot("irsc,isbc->ibrs", weights, x)


@jax.jit
def _norm(
  x: jax.Array, gain: jax.Array, inverse_size: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns bfloat16 `x` `[8, D']` times gain, and the inverse RMS `[8, 1]`."""
  x = x.astype(jnp.float32)
  mean = jnp.sum(x * x, axis=1, keepdims=True) * inverse_size
  return (x * gain[None, :]).astype(jnp.bfloat16), lax.rsqrt(mean + eps)


@jax.jit
def _rotate(y: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns pairs `[8, n, 2]` by angles `[8, n]`; all float32."""
  a, b = y[..., 0], y[..., 1]
  return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)


@jax.jit
def _swiglu(y: jax.Array) -> jax.Array:
  """Returns `silu(gate) * up`, `[8, n]`, of pairs `[8, n, 2]`."""
  gate, up = y[..., 0], y[..., 1]
  return gate * (1 / (1 + jnp.exp(-gate))) * up


@jax.jit
def _attend_tiles(
  state: _State, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> _State:
  """Adds a few tiles of keys to the online softmax of one KV head.

  Args:
    state: running maximum `[8, 1]`, in powers of 2, sum `[8, 1]` and output
      `[8, H]`, float32.
    q: `[8, H]` bfloat16, the G queries and whatever comes after them.
    k: `[n, H]` bfloat16.
    v: `[n, H]` bfloat16.
    visible: how many of the keys, int32 scalar.
  """
  top, total, out = state
  scale = np.float32(q.shape[1] ** -0.5 * math.log2(math.e))
  scores = _dot("gh,sh->gs", q, k) * scale
  seen = jnp.arange(k.shape[0], dtype=jnp.int32) < visible
  scores = jnp.where(seen[None, :], scores, np.float32(MASKED))
  new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
  alpha = jnp.exp2(top - new_top)
  p = jnp.exp2(scores - new_top)
  total = total * alpha + jnp.sum(p, axis=1, keepdims=True)
  out = out * alpha + _dot("gs,sh->gh", p.astype(jnp.bfloat16), v)
  return new_top, total, out


@jax.jit
def _merge(ours: _State, theirs: list[_State]) -> _State:
  """Adds the attention of some sets of keys to that of another."""
  top = functools.reduce(jnp.maximum, [x[0] for x in theirs], ours[0])
  weight = jnp.exp2(ours[0] - top)
  total, out = (x * weight for x in ours[1:])
  for part in theirs:
    weight = jnp.exp2(part[0] - top)
    total, out = total + part[1] * weight, out + part[2] * weight
  return top, total, out


def _products(
  matmul: Matmul, weights: tuple[np.ndarray, ...], x: np.ndarray
) -> np.ndarray:
  """Multiplies every chunk by the columns that it meets.

  Args:
    matmul: the matrix.
    weights: chunks `[n, ...]`, and if they are codes their scales.
    x: `[8, 8, m, columns]` bfloat16, by sequence, segment and chunk: of the m
      chunks of each unit in turn.

  Returns:
    `[n, pieces, 8, 8, 8]` float32: products of each chunk, in the order in which
    they are added, for each sequence, row and segment.
  """
  if matmul.format.is_packed:
    x = x.transpose(2, 1, 0, 3)
    multiply: Callable[..., jax.Array] = functools.partial(
      _multiply_codes, matmul.format, matmul.tiles
    )
  else:
    multiply = _multiply
    x = x.reshape(*x.shape[:3], 2, CHUNK_COLS // 2).transpose(2, 3, 1, 0, 4)
  found = []
  for i in range(0, len(weights[0]), _BLOCK):
    some = [array[i : i + _BLOCK] for array in weights]
    # Whole blocks only, so that little is compiled.
    missing = _BLOCK - len(some[0])
    some = [np.pad(array, ((0, missing), (0, 0), (0, 0))) for array in some]
    meets = x[(i + np.arange(_BLOCK)) % len(x)]
    found.append(np.asarray(multiply(*some, meets))[: _BLOCK - missing])
  products = np.concatenate(found)
  return products.reshape(len(products), -1, *products.shape[-3:])


def _sent(x: Any) -> np.ndarray:
  """Rounds to what is sent."""
  return np.asarray(x).astype(_BF16).astype(np.float32)


# ---- the step --------------------------------------------------------------


class _Step:
  """Everything that the CTAs of a step share, and what each of them does.

  Arrays per sequence have 8 rows, the largest batch; those beyond the batch stay
  NaN.
  """

  def __init__(
    self,
    plan: Plan,
    operands: Mapping[str, Any],
    eos_token_ids: tuple[int, ...],
  ):
    self._plan, self._geometry = plan, plan.geometry
    ops = {name: np.asarray(x) for name, x in operands.items()}
    _check_operands(plan, ops)
    self._ops = ops
    self._num_layers = int(ops["num_layers"][0])
    self._k_cache = ops["k_cache"].copy()
    self._v_cache = ops["v_cache"].copy()
    self._progress, self._emitted = (
      ops["progress"].copy(),
      ops["emitted"].copy(),
    )
    self._eos_token_ids = eos_token_ids

    def unpublished(*shape: int) -> np.ndarray:
      return np.full(shape, np.nan, np.float32)

    g, rows = plan.geometry, MAX_BATCH
    self._token_ids, self._positions, self._active, clock = ops["progress"]
    self._now, self._max_steps = clock[:2].tolist()
    self._residual = unpublished(2, rows, g.hidden_rows)
    self._qkv = unpublished(rows, g.num_qkv_heads, g.head_dim)
    self._attended = unpublished(rows, g.attention_size)
    self._hidden = unpublished(rows, g.gate_up_rows // 2)
    self._logits = unpublished(rows, g.vocab_rows)
    self._next_ids = np.full(rows, -1, np.int32)
    self._embed()

  def phases(self) -> Iterator[tuple[int, int]]:
    """Yields layer and phase in the order in which they run."""
    active = self._active[: self._plan.batch].any()
    if not active or self._now >= self._max_steps:
      return
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
      progress=self._progress,
      emitted=self._emitted,
    )

  def run_phase(self, layer: int, phase: int) -> None:
    """Runs a phase on all CTAs, after everything before it has run."""
    schedule = self._plan.schedule
    before, between = self._residual
    if phase == QKV:
      x, scale = self._normed(before, 2 * layer)
      self._matmul(schedule.qkv, layer, x, self._finish_qkv, scale)
    elif phase == ATTENTION:
      self._attention(layer)
    elif phase == O_PROJ:
      x = self._attended.astype(_BF16)
      finish = functools.partial(self._finish_residual, before, between)
      self._matmul(schedule.o, layer, x, finish)
    elif phase == GATE_UP:
      x, scale = self._normed(between, 2 * layer + 1)
      self._matmul(schedule.gate_up, layer, x, self._finish_gate_up, scale)
    elif phase == DOWN:
      x = self._hidden.astype(_BF16)
      finish = functools.partial(self._finish_residual, between, before)
      self._matmul(schedule.down, layer, x, finish)
    elif phase == LM_HEAD:
      x, scale = self._normed(before, 2 * self._num_layers)
      self._matmul(schedule.lm_head, None, x, self._finish_lm_head, scale)
      self._choose()

  def _embed(self) -> None:
    """Takes the tokens' rows out of the packed table."""
    table = self._plan.embedding
    per_unit = table.chunks_per_unit
    for b, token in enumerate(self._token_ids[: self._plan.batch]):
      cta, unit = divmod(token // UNIT_ROWS, table.run)
      chunks = self._ops["embedding"][cta, unit * per_unit :][:per_unit]
      chunks = chunks.reshape(-1, 2, UNIT_ROWS, SEGMENTS, CHUNK_COLS // 2)
      row = chunks[:, :, token % UNIT_ROWS]  # chunk, half, segment
      row = np.moveaxis(row, 2, 0).reshape(-1)
      self._residual[0, b] = row[: self._residual.shape[2]]

  def _normed(self, x: np.ndarray, norm: int) -> list[np.ndarray]:
    gain = self._ops["norms"][norm].reshape(-1)[: x.shape[1]]
    found = _norm(
      x.astype(_BF16),
      gain,
      np.float32(1 / self._geometry.hidden_size),
      np.float32(self._geometry.rms_norm_eps),
    )
    return [np.asarray(y) for y in found]

  def _weights(
    self, matmul: Matmul, layer: int | None
  ) -> tuple[np.ndarray, ...]:
    """Returns a matrix's chunks `[P, n, ...]`, and scales if there are any."""
    kinds = "ws" if matmul.format.is_packed else "w"
    arrays = tuple(self._ops[f"{kind}_{matmul.name}"] for kind in kinds)
    return arrays if layer is None else tuple(x[layer] for x in arrays)

  def _matmul(
    self,
    matmul: Matmul,
    layer: int | None,
    x: np.ndarray,
    finish: Callable[[int, np.ndarray], None],
    scale: np.ndarray | float = 1.0,
  ) -> None:
    """Runs all CTAs' units of a matrix.

    Args:
      matmul: the matrix.
      layer: whose it is, or None if it is no layer's.
      x: `[8, columns]` bfloat16; columns of padding may be missing.
      finish: takes the first row of a CTA's units and their sums `[8, rows]`
        float32.
      scale: what the sums are multiplied with, `[8, 1]` float32.
    """
    per_unit = matmul.chunks_per_unit
    index = self._plan.schedule.matmuls.index(matmul)
    runs = self._ops["table"][:, index].tolist()
    units = [u for first, count in runs for u in range(first, first + count)]
    if units != list(range(matmul.num_units)):
      raise ValueError(f"{matmul.name}: units that somebody has are {units}")
    x = np.pad(x, ((0, 0), (0, matmul.cols - x.shape[1])))
    x = x.reshape(MAX_BATCH, SEGMENTS, per_unit, -1)
    weights = self._weights(matmul, layer)
    for cta, (first, count) in enumerate(runs):
      if not count:
        continue
      own = tuple(array[cta, : count * per_unit] for array in weights)
      products = _products(matmul, own, x)
      # Chunks in their order, then segments.
      products = products.reshape(count, -1, *products.shape[2:])
      sums = np.zeros_like(products[:, 0])
      for n in range(products.shape[1]):
        sums = sums + products[:, n]
      sums = np.moveaxis(sums.sum(-1), 0, 1).reshape(MAX_BATCH, -1)
      finish(first * UNIT_ROWS, sums * np.float32(scale))

  def _finish_qkv(self, row: int, sums: np.ndarray) -> None:
    g = self._geometry
    half = g.head_dim // 2
    pairs = sums.reshape(MAX_BATCH, -1, 2)
    head, i = np.divmod(row // 2 + np.arange(pairs.shape[1]), half)
    cos, sin = self._ops["angles"][self._now][:, :, i]
    # Values are turned by the angle 0.
    turned = head < g.num_attention_heads + g.num_key_value_heads
    cos, sin = np.where(turned, cos, 1), np.where(turned, sin, 0)
    rotated = _sent(_rotate(pairs, cos, sin))
    for n in range(2):
      self._qkv[:, head, i + n * half] = rotated[..., n]

  def _finish_residual(
    self, source: np.ndarray, target: np.ndarray, row: int, sums: np.ndarray
  ) -> None:
    at = slice(row, row + sums.shape[1])
    target[:, at] = sums + source[:, at]

  def _finish_gate_up(self, row: int, sums: np.ndarray) -> None:
    hidden = _sent(_swiglu(sums.reshape(MAX_BATCH, -1, 2)))
    self._hidden[:, row // 2 : row // 2 + hidden.shape[1]] = hidden

  def _finish_lm_head(self, row: int, sums: np.ndarray) -> None:
    self._logits[:, row : row + sums.shape[1]] = sums

  def _choose(self) -> None:
    # Comparisons do not round, so it does not matter in which order CTAs take
    # the best of their rows and then of each other.
    real = self._logits[:, : self._geometry.vocab_size]
    self._next_ids = np.argmax(real, axis=1).astype(np.int32)
    sequences = advance(
      self._token_ids,
      self._positions,
      self._active,
      self._next_ids,
      self._plan.capacity,
      self._eos_token_ids,
    )
    self._progress[:CLOCK] = sequences
    self._progress[CLOCK, 0] += 1
    active = self._active[: self._plan.batch] > 0
    self._emitted[self._now, : len(active)][active] = self._next_ids[
      : len(active)
    ][active]

  def _attention(self, layer: int) -> None:
    """Runs all items of attention, each of one sequence, KV head and split."""
    g, plan = self._geometry, self._plan
    for b in range(plan.batch):
      position = int(self._positions[b])
      _, _, _, num_splits = split_of(position, 0, plan.splits)
      for head in range(g.num_key_value_heads):
        parts = [
          self._attend(layer, b, head, split) for split in range(plan.splits)
        ]
        come = [part for part in parts if part is not None]
        if parts[0] is None or len(come) != num_splits:
          raise ValueError(f"{len(come)} of {num_splits} splits do anything")
        state, *come = come
        for n in range(0, len(come), plan.part.at_once):
          state = _merge(state, come[n : n + plan.part.at_once])
        _, total, out = state
        start = head * g.group * g.head_dim
        self._attended[b, start : start + g.group * g.head_dim] = _sent(
          out / total
        )[: g.group].reshape(-1)

  def _attend(self, layer: int, b: int, head: int, split: int) -> _State | None:
    """Returns one split's state; None if there is nothing for it to do."""
    g = self._geometry
    position = int(self._positions[b])
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
    at_once = self._plan.tiles_at_once * TILE
    for begin in range(first * TILE, end * TILE, at_once):
      num_keys = min(at_once, end * TILE - begin)
      # What takes the place of missing tiles is not seen.
      k, v = np.zeros((2, at_once, g.head_dim), _BF16)
      for x, cache, entry in zip((k, v), caches, new, strict=True):
        x[:num_keys] = cache[begin : begin + num_keys]
        # The new token is not in the cache yet.
        at = position - begin
        if at < num_keys:
          x[at], x[at + 1 :] = entry, 0
      visible = np.int32(min(num_keys, position + 1 - begin))
      state = _attend_tiles(state, q, k, v, visible)
    # The split with the last tile writes the new key and value.
    if end == tiles and self._active[b] > 0:
      for cache, entry in zip(caches, new, strict=True):
        cache[position] = entry
    return state
