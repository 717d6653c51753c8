"""Runs the kernel on a CPU: what JAX's GPU interpreter lacks, for tests only.

Everything here leans on private parts of JAX 0.11; the kernel itself does not
import this module. `install` adds to the interpreter:

* `pl.get_global` semaphores, `semaphore_signal` and `semaphore_wait`, with
  vector clocks, so that the race detector knows what they order;
* an error instead of a hang when a wait can not end;
* `wgmma` operands as reads in the eyes of the race detector.

The interpreter walks a grid one CTA after the other, but runs the CTAs of a
cluster at once: interpret kernels whose CTAs meet with the grid as a cluster.
"""

import dataclasses
import functools
import importlib
import itertools
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
    primitives=root + "primitives",
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
  handlers: dict[Any, Callable[..., Any]] = {
    jx.primitives.get_global_p: _interpret_get_global,
    jx.primitives.semaphore_signal_p: _interpret_signal,
    jx.gpu_primitives.semaphore_signal_p: _interpret_signal,
    jx.primitives.semaphore_wait_p: _interpret_wait,
    jx.gpu_primitives.semaphore_wait_p: _interpret_wait,
  }
  # The interpreter's one big `match` cannot be extended. An operation that it
  # lacks is handed to it as one that it has and no Hopper kernel uses, with the
  # real one inside.
  stand_in = jx.gpu_primitives.try_cluster_cancel_p
  real_interpret = interpreter.interpret
  real_stand_in = interpreter._interpret_try_cluster_cancel_p

  def interpret(self: Any, jaxpr: Any, token: Any, *args: Any) -> Any:
    eqns = [
      eqn.replace(primitive=stand_in, params=dict(real=eqn))
      if eqn.primitive in handlers
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
    return handlers[real.primitive](self, real, token, invals())

  interpreter.interpret = interpret
  interpreter._interpret_try_cluster_cancel_p = interpret_stand_in
  jx.callbacks.wgmma = _recorded_wgmma(jx.callbacks.wgmma)
  jx.memory.Barrier.__init__ = _impatient(jx.memory.Barrier.__init__)
  jx.thread_map._thread_map_callback = _run_threads


# ---- semaphores ------------------------------------------------------------


@dataclasses.dataclass
class _Semaphore:
  """A counter in device memory.

  Attributes:
    count: its value.
    clocks: what is known once the counter has reached 1, 2, ...
  """

  count: int = 0
  clocks: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Semaphores:
  """All semaphores of one launch; they start at zero.

  Attributes:
    changed: guards the rest.
    by_key: key is the array's number and the index into it.
  """

  changed: threading.Condition = dataclasses.field(
    default_factory=threading.Condition
  )
  by_key: dict[tuple[int, ...], _Semaphore] = dataclasses.field(
    default_factory=dict
  )

  def signal(self, key: tuple[int, ...], inc: int, clock: Any) -> None:
    """Adds to a semaphore, and what the signalling thread knows to it."""
    with self.changed:
      semaphore = self.by_key.setdefault(key, _Semaphore())
      if clock is not None:
        if semaphore.clocks:
          clock.update(semaphore.clocks[-1])
        semaphore.clocks += [clock] * inc
      semaphore.count += inc
      self.changed.notify_all()

  def wait(
    self,
    key: tuple[int, ...],
    value: int,
    decrement: bool,
    check: Callable[[], None],
    where: str,
  ) -> Any:
    """Waits until a semaphore has a value.

    Args:
      key: which one.
      value: to reach.
      decrement: subtract it then.
      check: raises when the wait has become pointless.
      where: location of the wait, for the error.

    Returns:
      What the thread knows from the wait, or None. If the semaphore is already
      further, that is no more than its value promises.

    Raises:
      RuntimeError: the semaphore does not get there.
    """
    give_up = time.monotonic() + DEADLOCK_S
    with self.changed:
      semaphore = self.by_key.setdefault(key, _Semaphore())
      while semaphore.count < value:
        check()
        if time.monotonic() > give_up:
          counts = {k: s.count for k, s in sorted(self.by_key.items())}
          raise RuntimeError(
            f"deadlock: semaphore {key[0]}{list(key[1:])} is at "
            f"{semaphore.count} after {DEADLOCK_S:.0f} s, awaited is {value}, "
            f"{where}; all that were used: {counts}"
          )
        self.changed.wait(_POLL_S)
      if decrement:
        semaphore.count -= value
      if not semaphore.clocks or value == 0:
        return None
      # After a decrement, counts no longer say which signals were awaited.
      index = -1 if decrement else value - 1
      return semaphore.clocks[index].copy()


_numbers = itertools.count()
_semaphores_lock = threading.Lock()


def _semaphores(memory: Any) -> _Semaphores:
  # One shared memory is one launch.
  with _semaphores_lock:
    if not hasattr(memory, "_ffjax_semaphores"):
      memory._ffjax_semaphores = _Semaphores()
    return memory._ffjax_semaphores


def _key(semaphore: Any, index: Sequence[Any]) -> tuple[int, ...]:
  return (int(semaphore), *(int(i) for i in index))


def _signal(
  *, token: Any, thread: Any, semaphore: Any, index: Sequence[Any], inc: Any
) -> Any:
  memory = _private().callbacks._get_shared_memory()
  clock = memory.incr_clock(thread) if memory.detect_races else None
  _semaphores(memory).signal(_key(semaphore, index), int(inc), clock)
  return token


def _wait(
  *,
  token: Any,
  thread: Any,
  semaphore: Any,
  index: Sequence[Any],
  value: Any,
  decrement: Any,
  where: str,
) -> Any:
  memory = _private().callbacks._get_shared_memory()
  clock = _semaphores(memory).wait(
    _key(semaphore, index),
    int(value),
    bool(decrement),
    memory.check_failed,
    f"{where}, {thread}",
  )
  if clock is not None:
    with memory.lock:
      memory.clocks[thread].update(clock)
  return token


def _index(transforms: Sequence[Any]) -> list[Any]:
  """Returns the start of what is left of each axis, as one flat list."""
  jx = _private()
  index: list[Any] = []
  for transform in transforms:
    if not isinstance(transform, jx.indexing.NDIndexer) or index:
      raise NotImplementedError(f"semaphore with transforms {transforms}")
    index = [
      i.start if isinstance(i, jx.indexing.Slice) else i
      for i in transform.indices
    ]
  return index


def _callback(fn: Callable[..., Any], **kwargs: Any) -> Any:
  jx = _private()
  return jx.callback.io_callback(
    jx.callbacks.fail_on_exception(fn),
    jx.callbacks.TOKEN_SHAPE_DTYPE,
    **kwargs,
  )


def _interpret_get_global(
  self: Any, eqn: Any, token: Any, invals: Sequence[Any]
) -> Any:
  del self, eqn, invals
  # All threads run one trace, so the number is the same for all of them.
  return token, [jnp.int32(next(_numbers))]


def _interpret_signal(
  self: Any, eqn: Any, token: Any, invals: Sequence[Any]
) -> Any:
  semaphore, transforms, inc, device, *_ = jax.tree.unflatten(
    eqn.params["args_tree"], invals
  )
  if device is not None:
    raise NotImplementedError("signals to other devices")
  token = _callback(
    _signal,
    token=token,
    thread=self.thread,
    semaphore=semaphore,
    index=_index(transforms),
    inc=inc,
  )
  return token, []


def _interpret_wait(
  self: Any, eqn: Any, token: Any, invals: Sequence[Any]
) -> Any:
  semaphore, transforms, value, decrement = jax.tree.unflatten(
    eqn.params["args_tree"], invals
  )
  token = _callback(
    functools.partial(_wait, where=_location(eqn)),
    token=token,
    thread=self.thread,
    semaphore=semaphore,
    index=_index(transforms),
    value=value,
    decrement=decrement,
  )
  return token, []


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
    # Rows that pad the batch may hold anything.
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
