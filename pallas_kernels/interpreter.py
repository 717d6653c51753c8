"""Runs the kernel on a CPU: what JAX's GPU interpreter lacks, for tests only.

Everything here leans on private parts of JAX 0.11; the kernel itself does not
import this module. `install` adds to the interpreter:

* the programs of `threads`. Words order nothing but themselves, so the race detector
  learns nothing from them;
* an error instead of a hang when a wait can not end;
* `wgmma` operands as reads in the eyes of the race detector.

The interpreter walks a grid one CTA after the other, but runs the CTAs of a
cluster at once: interpret kernels whose CTAs meet with the grid as a cluster.
"""

import dataclasses
import functools
import importlib
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
  choosing,
  code_packing,
  codes,
  embedding,
  finishing,
  fragments,
  parts,
  patching,
  threads,
  words,
)
from pallas_kernels.formats import ROW_BYTES
from pallas_kernels.geometry import SEGMENTS, TILE, UNIT_ROWS
from pallas_kernels.plan import GROUP_ROWS

# A wait that has not ended by then never will.
DEADLOCK_S = 60.0
# Bulk copies in flight that the race detector tells apart.
_NUM_TMA_CLOCKS = 64
_POLL_S = 0.5
# XLA takes no more computations at once; further ones would never start.
_MAX_THREADS = 32

_install_lock = threading.Lock()
_installed = False


def missing() -> str | None:
  """Says why this JAX cannot be extended here, or None."""
  if jax.__version_info__[:2] != (0, 11):
    return (
      "interpreting the kernel leans on private parts of JAX 0.11, and this is "
      f"JAX {jax.__version__}"
    )
  return None


@functools.cache
def _private() -> types.SimpleNamespace:
  """Imports JAX's private modules; by name, since other JAXes lack them."""
  reason = missing()
  if reason is not None:
    raise RuntimeError(reason)
  root = "jax._src.pallas."
  paths = dict(
    callback="jax._src.callback",
    indexing="jax._src.state.indexing",
    state_types="jax._src.state.types",
    thread_map=root + "mosaic.interpret.thread_map",
    gpu_primitives=root + "mosaic_gpu.primitives",
    callbacks=root + "mosaic_gpu.interpret.gpu_callbacks",
    interpreter=root + "mosaic_gpu.interpret.jaxpr_interpret",
    memory=root + "mosaic_gpu.interpret.shared_memory",
    source_info="jax._src.source_info_util",
    xla_client="jaxlib.xla_client",
  )
  return types.SimpleNamespace(
    **{name: importlib.import_module(path) for name, path in paths.items()}
  )


def interpret_params(detect_races: bool) -> Any:
  """Returns what to pass to a kernel as `interpret`.

  Memory that nobody has written holds NaN, or the largest integer.

  Args:
    detect_races: look for pairs of accesses that nothing orders; `races_found`
      answers. Slower.
  """
  _private()
  return plgpu.InterpretGPUParams(
    detect_races=detect_races,
    uninitialized_memory="nan",
    num_tma_threads_per_device=_NUM_TMA_CLOCKS,
  )


def races_found() -> bool:
  """Says whether the last kernel that looked for races found one."""
  return _private().callbacks.get_races().races_found


def reset() -> None:
  """Forgets the last kernel; needed after one that has raised."""
  _private().callbacks.reset_gpu_interpret_mode_state()


def install() -> None:
  """Extends JAX's interpreter, once, for the rest of the process.

  Raises:
    RuntimeError: this is not JAX 0.11.
  """
  global _installed
  with _install_lock:
    if not _installed:
      _install()
      _installed = True


def _install() -> None:
  jx = _private()
  interpreter = jx.interpreter.JaxprInterpreter
  lacking = jx.gpu_primitives.inline_mgpu_p
  # The interpreter's one big `match` cannot be extended. An operation that it
  # lacks is handed to it as one that it has and no Hopper kernel uses, with the
  # real one inside.
  stand_in = jx.gpu_primitives.try_cluster_cancel_p
  real_interpret = interpreter.interpret
  real_stand_in = interpreter._interpret_try_cluster_cancel_p

  def interpret(self: Any, jaxpr: Any, token: Any, *args: Any) -> Any:
    eqns = [
      eqn.replace(primitive=stand_in, params=dict(real=eqn))
      if eqn.primitive is lacking
      else eqn
      for eqn in jaxpr.eqns
    ]
    return real_interpret(self, jaxpr.replace(eqns=eqns), token, *args)

  def interpret_stand_in(
    self: Any, eqn: Any, token: Any, invals: Callable[[], Sequence[Any]]
  ) -> Any:
    real = eqn.params.get("real")
    if real is None:
      return real_stand_in(self, eqn, token, invals)
    return _interpret_words(self, real, token, invals())

  interpreter.interpret = interpret
  interpreter._interpret_try_cluster_cancel_p = interpret_stand_in
  jx.callbacks.wgmma = _recorded_wgmma(jx.callbacks.wgmma)
  jx.memory.Barrier.__init__ = _impatient(jx.memory.Barrier.__init__)
  jx.thread_map._thread_map_callback = _run_threads


# ---- words -----------------------------------------------------------------


@dataclasses.dataclass
class _Words:
  """The words, in device memory, from where the next launch has them.

  Attributes:
    array: `[words, 2]` int32, bits of a word as they are on the device.
    stamps: of the words that this launch has sent, by index.
    changed: guards both.
  """

  array: np.ndarray
  stamps: dict[int, int] = dataclasses.field(default_factory=dict)
  changed: threading.Condition = dataclasses.field(
    default_factory=threading.Condition
  )

  def send(self, index: np.ndarray, payload: np.ndarray, stamp: int) -> None:
    """Writes words; payloads are unsigned, of 4 or 8 bytes."""
    bits = np.empty((len(index), 2), np.int32)
    if payload.itemsize == 8:
      bits[:] = _stamped(payload, stamp).view(np.int32).reshape(-1, 2)
    else:
      bits[:, 0], bits[:, 1] = payload.view(np.int32), stamp
    with self.changed:
      for i, value in zip(index.tolist(), bits, strict=True):
        if self.stamps.get(i, 0) >= stamp:
          raise RuntimeError(
            f"word {i} has stamp {self.stamps[i]} and is sent with {stamp}"
          )
        self.array[i], self.stamps[i] = value, stamp
      self.changed.notify_all()

  def receive(
    self,
    index: np.ndarray,
    stamp: int,
    payload_bytes: int,
    check: Callable[[], None],
    where: str,
  ) -> np.ndarray:
    """Waits for words and returns their payloads.

    Args:
      index: which ones.
      stamp: that they must bear.
      payload_bytes: of a word.
      check: raises when the wait has become pointless.
      where: location of the wait, for the error.

    Raises:
      RuntimeError: they do not come, or others would be taken for them.
    """
    give_up = time.monotonic() + DEADLOCK_S
    in_band = payload_bytes == 8
    with self.changed:
      while True:
        others = [i for i in index.tolist() if self.stamps.get(i, 0) != stamp]
        if not others:
          bits = self.array[index]
          if in_band:
            return _unstamped(bits.view(np.uint64).ravel())
          return np.ascontiguousarray(bits[:, 0]).view(np.uint32)
        i = others[0]
        found = self.stamps.get(i, 0)
        if found > stamp:
          raise RuntimeError(
            f"word {i} has been written again: it is at stamp {found}, awaited"
            f" is {stamp}, {where}"
          )
        seen = self.array[i, 0] >> words.STAMP_BIT if in_band else None
        if seen is not None and seen % 2 == stamp % 2:
          raise RuntimeError(
            f"word {i} is at stamp {found} and is taken for {stamp}, {where}"
          )
        check()
        if time.monotonic() > give_up:
          raise RuntimeError(
            f"deadlock: word {i} is at stamp {found} after"
            f" {DEADLOCK_S:.0f} s, awaited is {stamp}, {where}"
          )
        self.changed.wait(_POLL_S)


def _stamped(payload: np.ndarray, stamp: int) -> np.ndarray:
  """Puts one bit of a stamp into four bfloat16 each, see `words`."""
  sign_and_rest = payload & ~np.uint64(0x7FFF)
  first = payload & np.uint64(0x7FFF)
  top = first >> np.uint64(words.STAMP_BIT)
  first = np.where(top == 0, np.uint64(0), first)
  first = np.where(top == 3, np.uint64(0x7FFF), first)
  first &= ~np.uint64(1 << words.STAMP_BIT)
  return sign_and_rest | first | np.uint64(stamp % 2 << words.STAMP_BIT)


def _unstamped(bits: np.ndarray) -> np.ndarray:
  """Undoes `_stamped`, but for what is too small or too large."""
  bit = np.uint64(1 << words.STAMP_BIT)
  first = bits & np.uint64(0x7FFF) & ~bit
  first |= ~(first >> np.uint64(1)) & bit
  first = np.where(first == words.SMALLEST, np.uint64(0), first)
  first = np.where(first == words.LARGEST, np.uint64(0x7FFF), first)
  return (bits & ~np.uint64(0x7FFF)) | first


_words_lock = threading.Lock()


def _words_of(memory: Any, ref: Any) -> _Words:
  key = _private().callbacks.HostAllocationKey.from_array(ref[0])
  # One shared memory is one launch.
  with _words_lock:
    if not hasattr(memory, "_ffjax_words"):
      # Past the race detector, to which words are no accesses.
      memory._ffjax_words = _Words(memory.mem[key].content)
    return memory._ffjax_words


class _Threads:
  """A warpgroup that runs a program, with what it may touch."""

  def __init__(
    self,
    token: Any,
    mesh_location: Any,
    thread: Any,
    where: str,
    source: Any,
    first_ref: Any,
  ):
    self._token, self._mesh, self._thread = token, mesh_location, thread
    self._source = source
    self.where = f"{where}, {thread}"
    self.memory = _private().callbacks._get_shared_memory()
    self._first_ref = first_ref

  @property
  def words(self) -> _Words:
    """The words, for programs whose first ref they are."""
    return _words_of(self.memory, self._first_ref)

  def _at(self, ref: Any, begins: Sequence[int], sizes: Sequence[int]) -> Any:
    jx = _private()
    key, transforms, shape, _ = ref
    slices = tuple(
      jx.indexing.Slice(int(b), int(n))
      for b, n in zip(begins, sizes, strict=True)
    )
    region = jx.indexing.NDIndexer(slices, shape, ())
    return key, (*transforms, region)

  def read(
    self, ref: Any, begins: Sequence[int], sizes: Sequence[int]
  ) -> np.ndarray:
    """Returns a part of an array."""
    key, transforms = self._at(ref, begins, sizes)
    _, value = _private().callbacks._get(
      self._token,
      self._mesh,
      self._thread,
      key,
      transforms,
      source_info=self._source,
    )
    return np.ascontiguousarray(value)

  def write(self, ref: Any, begins: Sequence[int], value: np.ndarray) -> None:
    """Overwrites a part of an array."""
    key, transforms = self._at(ref, begins, value.shape)
    _private().callbacks._swap(
      self._token,
      self._mesh,
      self._thread,
      key,
      transforms,
      value,
      None,
      source_info=self._source,
    )


def _run_send(
  what: words.Send, run: _Threads, refs: Sequence[Any], scalars: Sequence[int]
) -> None:
  target, source = refs
  first, start, count, stamp = scalars
  t = np.arange(what.num_payloads)
  sent, payload, word = what.place(t, start, count)
  rows, cols = what.num_rows, source[2][1]
  values = run.read(source, (0, 0), (rows, cols))
  if what.stamped:
    bits = values.view(np.uint64).ravel()
    run.words.send(first + word[sent], bits[payload[sent]], stamp)
  elif count > 0:
    run.write(target, (0, start), values[:, :count])


def _run_receive(
  what: tuple[words.Receive, ...],
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  norm, square, stamp, *rest = scalars
  refs = refs[1:]
  norms, squares, *refs = refs if what[0].gained else (None, None, *refs)
  for n, (one, target) in enumerate(zip(what, refs, strict=True)):
    first, column, offset_bytes, valid = rest[4 * n : 4 * n + 4]
    shape, dtype = target[2], target[3]
    for sequence in range(one.num_sequences):
      t = np.arange(one.num_pairs)
      wants_a, wants_b, word, _ = one.place(sequence, t, column, valid)
      index = first + np.stack([word, word + 1], 1).ravel()
      wanted = np.stack([wants_a, wants_b], 1).ravel()
      payload = np.zeros(len(index), np.uint64)
      payload[wanted] = run.words.receive(
        index[wanted],
        stamp,
        payload.itemsize,
        run.memory.check_failed,
        run.where,
      )
      values = payload.view(dtype).reshape(one.num_rows, -1)
      if one.gained:
        num_warps = one.num_threads // threads.WARP
        at = square + sequence * num_warps
        values = _gained(run, values, norms, norm, squares, at, num_warps)
      begin_bytes = offset_bytes + sequence * one.sequence_bytes
      row = begin_bytes // (shape[1] * dtype.itemsize)
      run.write(target, (row, 0), values)


def _gained(
  run: _Threads,
  values: np.ndarray,
  norms: Any,
  norm: int,
  squares: Any,
  square: int,
  num_warps: int,
) -> np.ndarray:
  """Multiplies by a norm's weights; stores the sum of squares."""
  gain = run.read(norms, (norm, 0, 0), (1, *values.shape))[0]
  wide = values.astype(np.float32)
  sums = np.zeros(num_warps, np.float32)
  sums[0] = np.sum(wide * wide)
  run.write(squares, (square,), sums)
  return (wide * gain).astype(values.dtype)


def _run_embed(
  what: embedding.Embed,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  embedding, norms, squares, residual, x = refs
  norm, square, first_sequence, start, *firsts = scalars
  _, per_cta, rows, half = embedding[2]
  num_warps = what.num_threads // threads.WARP
  for k, first in enumerate(firsts):
    b = first_sequence + k
    chunk, element = divmod(first, rows * half)
    owner, local = divmod(chunk, per_cta)
    read = run.read(
      embedding, (owner, local, 0, 0), (1, what.unit_chunks, rows, half)
    )
    t = np.arange(what.num_pieces)
    begins, _ = what.piece(t)
    flat = read.ravel()
    each = np.arange(SEGMENTS * what.segment // len(t))
    values = flat[element + begins[:, None] + each].reshape(SEGMENTS, -1)
    row = b * what.sequence_bytes // (x[2][1] * x[3].itemsize)
    at = square + k * num_warps
    values = _gained(run, values, norms, norm, squares, at, num_warps)
    run.write(x, (row, 0), values)
    t = np.arange(what.num_columns)
    there, elements = what.residual(t, start)
    if there.any():
      columns = flat[element + elements[there]].astype(np.float32)
      run.write(residual, (b, 0), columns[None])


def _run_patch(
  what: patching.Patch,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  new, ring = refs
  k_row, v_row, row = scalars
  rows = ring[2][1]
  values = run.read(new, (0, 0), (2, what.head_dim))
  for first, value in zip((k_row, v_row), values, strict=True):
    for n, block in enumerate(value.reshape(-1, 64)):
      slot, begin = divmod(first + 64 * n, rows)
      run.write(ring, (slot, begin + row, 0), block[None, None])
      if first == v_row and row < 63:
        zeros = np.zeros((1, 63 - row, 64), values.dtype)
        run.write(ring, (slot, begin + row + 1, 0), zeros)


def _part_words(part: parts.Part) -> list[np.ndarray]:
  """Returns the words `[64, columns that are sent]` of each array of a state."""
  row, col = np.ogrid[:TILE, : 2 * part.pairs]
  every_row = 0 * row
  return [
    part.most(col) + every_row,
    part.total(col) + every_row,
    *(part.value(n, row, col) for n in range(part.blocks)),
  ]


def _run_send_part(
  what: fragments.SendPart,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
  *state: np.ndarray,
) -> None:
  del refs
  first, stamp = scalars
  for n, (word, x) in enumerate(
    zip(_part_words(what.part), state, strict=True)
  ):
    # Maxima and sums are the same in all rows, and are sent once.
    rows = slice(0, 1 if n < 2 else TILE)
    bits = np.ascontiguousarray(x[rows, : word.shape[1]]).view(np.uint32)
    run.words.send(first + word[rows].ravel(), bits.ravel(), stamp)


def _run_merge_parts(
  what: fragments.MergeParts,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
  *state: np.ndarray,
) -> list[np.ndarray]:
  del refs
  first, count, stamp = scalars
  words_of = _part_words(what.part)
  most, total, *out = (np.array(x) for x in state)

  def come(j: int) -> list[np.ndarray]:
    found = []
    for word, x in zip(words_of, state, strict=True):
      # Queries that pad the group mean nothing.
      values = np.zeros_like(x)
      payload = run.words.receive(
        first + j * what.part.num_words + word.ravel(),
        stamp,
        4,
        run.memory.check_failed,
        run.where,
      )
      values[:, : word.shape[1]] = payload.view(np.float32).reshape(word.shape)
      found.append(values)
    return found

  with np.errstate(all="ignore"):
    for begin in range(0, count, what.part.at_once):
      end = min(count, begin + what.part.at_once)
      some = [come(j) for j in range(begin, end)]
      new = functools.reduce(np.maximum, [x[0] for x in some], most)
      shrink, most = np.exp2(most - new), new
      total, *out = (x * shrink for x in (total, *out))
      for top, *theirs in some:
        weight = np.exp2(top - most)
        total, *out = (
          x + y * weight for x, y in zip((total, *out), theirs, strict=True)
        )
  return [most, total, *out]


def _run_reduce(
  what: fragments.ReduceRows,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
  values: np.ndarray,
) -> list[np.ndarray]:
  del run, refs, scalars
  found = (values.max if what.kind == "max" else values.sum)(0)
  return [np.broadcast_to(found, values.shape)]


def _run_store_own(
  what: fragments.StoreOwn,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
  *arrays: np.ndarray,
) -> None:
  (sums,) = refs
  products = np.concatenate(arrays, axis=1)
  at = scalars[0] * UNIT_ROWS
  row = np.arange(TILE)
  for b in range(what.batch):
    own = products[row, SEGMENTS * b + what.column(row)]
    own = own.reshape(1, UNIT_ROWS, SEGMENTS).sum(2)
    if scalars[1]:
      own = own + run.read(sums, (b, at), (1, UNIT_ROWS))
    run.write(sums, (b, at), own)


def _rows_of(
  what: finishing.Rows, run: _Threads, refs: Sequence[Any]
) -> np.ndarray:
  """Returns a group's results `[B, 64]`, normed if they are to be."""
  rows = run.read(refs[0], (0, 0), (what.batch, GROUP_ROWS))
  norm = what.norm
  if norm is None:
    return rows
  squares = run.read(refs[1], (0,), (what.batch * norm.num_warps,))
  total = squares.reshape(what.batch, norm.num_warps).sum(1)
  mean = total / np.float32(norm.hidden_size)
  return rows / np.sqrt(mean + np.float32(norm.eps))[:, None]


def _run_load_angles(
  what: finishing.LoadAngles,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  angles, cos_sin = refs
  found = run.read(angles, (scalars[0], 0, 0, 0), (1, *angles[2][1:])).ravel()
  source, target = what.place(np.arange(what.num_pieces))
  copied = np.empty(cos_sin[2], np.float32)
  each = np.arange(finishing.PIECE_FLOATS)
  copied.ravel()[target[:, None] + each] = found[source[:, None] + each]
  run.write(cos_sin, (0, 0, 0), copied)


def _run_add_residual(
  what: finishing.AddResidual,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  _, residual, results = refs
  rows = _rows_of(what, run, refs)
  rows = rows + run.read(residual, (0, scalars[0]), rows.shape)
  run.write(residual, (0, scalars[0]), rows)
  run.write(results, (0, 0), rows.astype(results[3]))


def _run_apply_rope(
  what: finishing.ApplyRope,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  *_, cos_sin, results = refs
  pair, start = scalars
  num = GROUP_ROWS // 2
  rows = _rows_of(what, run, refs)
  angles = run.read(cos_sin, (0, 0, start), (2, what.batch, num))
  turned = pair + np.arange(num) < what.num_turned
  cos, sin = (
    np.where(turned, x, np.float32(one))
    for x, one in zip(angles, (1, 0), strict=True)
  )
  x, y = rows[:, ::2], rows[:, 1::2]
  rows = np.concatenate([x * cos - y * sin, y * cos + x * sin], axis=1)
  run.write(results, (0, 0), rows.astype(results[3]))


def _run_apply_swiglu(
  what: finishing.ApplySwiglu,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  del scalars
  results = refs[-1]
  rows = _rows_of(what, run, refs)
  gate, up = rows[:, ::2], rows[:, 1::2]
  with np.errstate(over="ignore"):
    rows = gate * (1 / (1 + np.exp(-gate))) * up
  run.write(results, (0, 0), rows.astype(results[3]))


def _run_keep_best(
  what: finishing.KeepBest,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  *_, results, best = refs
  first, num_rows = scalars
  rows = _rows_of(what, run, refs)
  run.write(results, (0, 0), rows)
  lane = np.arange(GROUP_ROWS)
  index = first + lane
  kept = run.read(best, (0, 0), (2 * what.batch, GROUP_ROWS))
  most, at = np.split(kept, 2)
  better = (index < what.vocab_size) & (lane < num_rows) & (rows > most)
  most, at = np.where(better, rows, most), np.where(better, index, at)
  run.write(best, (0, 0), np.concatenate([most, at]).astype(np.float32))


def _run_begin_best(
  what: choosing.BeginBest,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  del scalars
  (best,) = refs
  begin = np.repeat(np.array([-np.inf, what.vocab_size], "f4"), what.batch)
  run.write(best, (0, 0), np.tile(begin[:, None], best[2][1]))


def _best(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
  """Returns the largest logit and its index, the lowest of equals."""
  most = values.max()
  return np.stack([most, indices[values == most].min()])


def _run_send_best(
  what: choosing.SendBest,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  first, stamp = scalars
  best = run.read(refs[1], (0, 0), refs[1][2])
  for b in range(what.batch):
    found = _best(best[b], best[what.batch + b])
    words = first + (b + np.arange(2) * what.batch) * what.row_words
    run.words.send(words, found.view(np.uint32), stamp)


def _run_choose(
  what: choosing.Choose,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
) -> None:
  first, stamp = scalars
  chosen = np.empty(what.batch, np.int32)
  for b in range(what.batch):
    values, indices = (
      run.words.receive(
        first
        + (b + n * what.batch) * what.row_words
        + np.arange(what.num_ctas),
        stamp,
        threads.F32_BYTES,
        run.memory.check_failed,
        run.where,
      ).view(np.float32)
      for n in range(2)
    )
    chosen[b] = min(_best(values, indices)[1], what.vocab_size - 1)
  run.write(refs[1], (0,), chosen)


def _run_store_weights(
  what: fragments.StoreWeights,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
  *weights: np.ndarray,
) -> None:
  del what, scalars
  (p,) = refs
  values = np.concatenate(weights).T.astype(p[3])
  run.write(p, (0, 0), np.ascontiguousarray(values))


def _run_multiply(
  what: codes.MultiplyCodes,
  run: _Threads,
  refs: Sequence[Any],
  scalars: Sequence[int],
  *sums: np.ndarray,
) -> list[np.ndarray]:
  scales, ring, x = refs
  _, slot, column = scalars
  f, tiles = what.format, what.tiles
  chunk = run.read(ring, (slot, 0, 0), (1, f.chunk_rows(tiles), 64))
  shape = (1, f.scale_rows(tiles), ROW_BYTES // 4)
  entries = run.read(scales, (slot, 0, 0), shape)
  weights = np.asarray(
    code_packing.chunk_values(
      f, tiles, jnp.asarray(chunk[0]), jnp.asarray(entries)
    )
  )
  found = []
  for b, before in enumerate(sums):
    rows = run.read(x, (SEGMENTS * b, column), (SEGMENTS, what.columns))
    found.append(before + weights @ rows.astype(np.float32).T)
  return found


_PROGRAMS: dict[Any, Callable[..., Sequence[np.ndarray] | None]] = {
  words.Send: _run_send,
  tuple: _run_receive,
  embedding.Embed: _run_embed,
  patching.Patch: _run_patch,
  fragments.SendPart: _run_send_part,
  fragments.MergeParts: _run_merge_parts,
  fragments.ReduceRows: _run_reduce,
  fragments.StoreOwn: _run_store_own,
  fragments.StoreWeights: _run_store_weights,
  choosing.BeginBest: _run_begin_best,
  choosing.SendBest: _run_send_best,
  choosing.Choose: _run_choose,
  finishing.LoadAngles: _run_load_angles,
  finishing.AddResidual: _run_add_residual,
  finishing.ApplyRope: _run_apply_rope,
  finishing.ApplySwiglu: _run_apply_swiglu,
  finishing.KeepBest: _run_keep_best,
  codes.MultiplyCodes: _run_multiply,
  threads.Meet: lambda *_: None,
}


def _run_words(
  *,
  token: Any,
  mesh_location: Any,
  thread: Any,
  keys: Sequence[Any],
  transforms: Sequence[Any],
  scalars: Sequence[Any],
  arrays: Sequence[Any],
  what: Any,
  kinds: Sequence[Any],
  where: str,
  source: Any,
) -> Any:
  refs = [
    (key, tuple(t), *kind)
    for key, t, kind in zip(keys, transforms, kinds, strict=True)
  ]
  # What several warpgroups do, the first does here for all.
  first_what = what[0] if isinstance(what, tuple) else what
  num_threads = getattr(first_what, "num_threads", threads.THREADS)
  if num_threads > threads.THREADS and int(thread.warpgroup_id) > 0:
    return token, []
  first = refs[0] if refs else None
  run = _Threads(token, mesh_location, thread, where, source, first)
  results = _PROGRAMS[type(what)](
    what,
    run,
    refs,
    [int(x) for x in scalars],
    *(np.asarray(x) for x in arrays),
  )
  return token, results or []


def _interpret_words(
  self: Any, eqn: Any, token: Any, invals: Sequence[Any]
) -> Any:
  jx = _private()
  params = eqn.params
  num = params["pytree_args"].num_leaves
  all_transforms = jax.tree.unflatten(
    params["pytree_ref_transforms"], invals[num:]
  )
  keys, transforms, kinds = [], [], []
  scalars: list[Any] = []
  arrays: list[Any] = []
  for var, value, transform in zip(
    eqn.invars[:num], invals[:num], all_transforms, strict=True
  ):
    if transform is None:
      (arrays if value.ndim else scalars).append(value)
      continue
    key, resolved = jx.interpreter.resolve_ref(var.aval, value, transform)
    view = _view(var.aval, transform)
    keys.append(key)
    transforms.append(tuple(resolved))
    kinds.append((view.shape, np.dtype(view.dtype)))
  return _callback(
    functools.partial(
      _run_words,
      what=params["mgpu_fn"].what,
      kinds=kinds,
      where=_location(eqn),
      source=eqn.source_info,
    ),
    [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars],
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    keys=keys,
    transforms=transforms,
    scalars=scalars,
    arrays=arrays,
  )


def _callback(fn: Callable[..., Any], results: Any, **kwargs: Any) -> Any:
  """Calls back and returns the next token, and results."""
  jx = _private()
  return jx.callback.io_callback(
    jx.callbacks.fail_on_exception(fn),
    (jx.callbacks.TOKEN_SHAPE_DTYPE, results),
    **kwargs,
  )


def _view(aval: Any, transforms: Sequence[Any]) -> jax.ShapeDtypeStruct:
  view = _private().state_types.transform_type(tuple(transforms), aval)
  return jax.ShapeDtypeStruct(view.shape, view.dtype)


def _location(eqn: Any) -> str:
  return _private().source_info.summarize(eqn.source_info)


# ---- barriers and tensor cores ---------------------------------------------


class _ImpatientCondition(threading.Condition):
  """A condition that raises rather than wait for ever."""

  def __init__(self, barrier: Any):
    super().__init__()
    self._barrier = barrier

  def wait(self, timeout: float | None = None) -> bool:
    if super().wait(DEADLOCK_S if timeout is None else timeout):
      return True
    raise RuntimeError(
      f"deadlock: {self._barrier}, phase {self._barrier.phase}, has not moved "
      f"for {DEADLOCK_S:.0f} s"
    )


def _impatient(real: Callable[..., None]) -> Callable[..., None]:
  """Wraps the constructor of the interpreter's barriers."""

  def init(self: Any, *args: Any, **kwargs: Any) -> None:
    real(self, *args, **kwargs)
    self.cv = _ImpatientCondition(self)

  return init


def _recorded_wgmma(real: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps the interpreter's `wgmma`: its operands count as reads."""
  jx = _private()

  def wgmma(
    *, token: Any, thread: Any, source_info: Any = None, **kwargs: Any
  ) -> Any:
    memory = jx.callbacks._get_shared_memory()
    if memory.detect_races:
      for name in "ab":
        key = jx.callbacks.HostAllocationKey.from_array(
          kwargs[f"{name}_allocation_key_as_array"]
        )
        transforms = jx.callbacks._remove_noop_transforms(
          kwargs[f"{name}_transforms"]
        )
        jx.callbacks.get_races().check_read(
          thread,
          _async_read_clock(memory, thread),
          key,
          memory.access(key, jax.tree.map(int, transforms)),
          source_info=source_info,
        )
    # Rows that pad the group may hold anything.
    with np.errstate(all="ignore"):
      return real(token=token, thread=thread, source_info=source_info, **kwargs)

  return wgmma


def _async_read_clock(memory: Any, thread: Any) -> Any:
  """Returns the clock of a tensor core that reads shared memory.

  It reads by the asynchronous proxy, and thus sees what has been committed. It
  is a step ahead of its thread, as a bulk copy is. The thread then knows that
  it is done, since the interpreter lets it wait at once.
  """
  step = memory.get_next_tma_thread_id()
  with memory.lock:
    memory.clocks[thread].inc(step)
    return memory.clocks[thread].async_smem_clock.copy()


# ---- threads ---------------------------------------------------------------


@functools.cache
def _device() -> Any:
  """Returns the device that runs the kernel's threads: a CPU of our own.

  A thread that waits holds on to one of the CPU client's threads. JAX's usual
  client has as many as the machine has cores, and then nothing moves.
  """
  client = _private().xla_client.make_cpu_client(num_devices=_MAX_THREADS)
  return client.local_devices()[0]


@functools.lru_cache(maxsize=16)
def _compiled(jaxpr: Any) -> Any:
  """Compiles one thread of a kernel, for all its threads and launches."""

  def run(consts: Any, args: Any) -> None:
    jax.core.eval_jaxpr(jaxpr.jaxpr, consts, *args)

  consts, args = (
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
    for xs in (jaxpr.consts, jaxpr.in_avals)
  )
  with jax.default_device(_device()):
    return jax.jit(run).trace(consts, args).lower().compile()


def _run_threads(
  jaxpr: Any,
  token: Any,
  device_id: Any,
  num_threads: Any,
  consts: Any,
  args: Any,
  *,
  on_exception: Callable[..., None],
) -> Any:
  """Runs `jaxpr` once per thread, all at once; its first input says which."""
  run = _compiled(jaxpr)
  consts, args = (
    [np.asarray(x) for x in jax.tree.leaves(xs)] for xs in (consts, args)
  )
  num_threads = int(num_threads)
  if num_threads > _MAX_THREADS:
    raise NotImplementedError(
      f"{num_threads} threads at once (it takes at most {_MAX_THREADS})"
    )
  with futures.ThreadPoolExecutor(num_threads) as executor:
    running = [
      executor.submit(
        lambda i: jax.block_until_ready(run(consts, [np.int32(i), *args])), i
      )
      for i in range(num_threads)
    ]
  errors = [error for error in (x.exception() for x in running) if error]
  if errors:
    device = None if device_id is None else int(device_id)
    on_exception(errors[0], device_id=device, token=token)
    raise errors[0]
  return token
