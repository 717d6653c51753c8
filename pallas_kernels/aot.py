"""Compiles the kernel for Hopper on a machine without a GPU.

XLA, LLVM and ptxas are the real ones, so this tells what no interpreter can:
that the kernel compiles, in how many registers, and whether they spill. It
needs JAX's CUDA plugin and ptxas, but neither a driver nor CUDA's libraries.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import kernel, mosaic, times
from pallas_kernels.plan import CHANGED, Plan, operand_shapes

# Where Mosaic writes what it and ptxas make of a kernel.
_DUMP = "MOSAIC_GPU_DUMP_TO"
# An mbarrier in shared memory.
_BARRIER_BYTES = 8
# CTAs of a grid on an H100 SXM: one per SM.
NUM_SMS = 132

# An H100 SXM in XLA's words. Without a driver version XLA would leave custom
# calls out of command buffers.
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {NUM_SMS}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compilers say about a kernel.

  Attributes:
    registers: per thread, at launch.
    spill_store_bytes: per thread, registers written to memory for want of room.
    spill_load_bytes: likewise, read back.
    stack_bytes: per thread.
    smem_bytes: shared memory of a CTA: arrays and barriers.
    ptx_sha256: hexadecimal, of the PTX but for the lines of the source; of two
      trees in which it is the same, the kernel is.
    compile_s: seconds from tracing to machine code.
  """

  registers: int
  spill_store_bytes: int
  spill_load_bytes: int
  stack_bytes: int
  smem_bytes: int
  ptx_sha256: str
  compile_s: float

  @property
  def spills(self) -> bool:
    """Whether the registers did not suffice."""
    return self.spill_store_bytes + self.spill_load_bytes > 0


def hopper() -> SingleDeviceSharding:
  """Returns where arguments of a compilation for an H100 are."""
  topology = topologies.get_topology_desc(
    "h100", platform="cuda", target_config=_H100, topology="1x1x1"
  )
  return SingleDeviceSharding(topology.devices[0])


def missing() -> str | None:
  """Says what is not there to compile the kernel, or None."""
  reason = mosaic.missing()
  if reason is not None:
    return reason
  try:
    hopper()
  except RuntimeError as e:
    return f"JAX's CUDA plugin is not installed ({e})"
  return None


def compile_for_hopper(
  fn: Callable[..., Any],
  *shape_dtypes: tuple[Sequence[int], Any],
  donate: Sequence[int] = (),
) -> Report:
  """Compiles a function that launches one kernel, for sm_90a.

  Args:
    fn: of arrays; it calls one `plgpu.kernel`.
    *shape_dtypes: of each argument.
    donate: which arguments `fn` may overwrite.

  Raises:
    RuntimeError: no kernel was compiled, or another than one. A process that
      compiles the same kernel twice gets the first one again.
  """
  target = hopper()
  args = [
    jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=target)
    for shape, dtype in shape_dtypes
  ]
  with tempfile.TemporaryDirectory(prefix="mosaic_dump_") as folder:
    before = os.environ.get(_DUMP)
    # Mosaic looks at its environment anew for every kernel.
    os.environ[_DUMP] = folder
    try:
      begin = time.perf_counter()
      with mosaic.silent_constraints():
        jax.jit(fn, donate_argnums=tuple(donate)).trace(*args).lower().compile()
      compile_s = time.perf_counter() - begin
    finally:
      if before is None:
        del os.environ[_DUMP]
      else:
        os.environ[_DUMP] = before
    return _report(pathlib.Path(folder), compile_s)


def compile_step(
  plan: Plan, *, timed: bool = False, with_logits: bool = True
) -> Report:
  """Compiles the decode step of a plan as `kernel.launch` does it.

  Args:
    plan: sizes and schedule.
    timed: whether it counts where its time goes, see `times`.
    with_logits: whether it returns logits.
  """
  shapes = operand_shapes(plan)
  counters = ((plan.num_ctas, *times.SHAPE), jnp.int32)
  of_times = [counters] if timed else []

  def step(*args: jax.Array) -> Any:
    operands = dict(zip(shapes, args[len(of_times) :], strict=True))
    if not timed:
      return kernel.launch(plan, operands, with_logits=with_logits)
    times_ref = jax.new_ref(args[0])
    out = kernel.launch(
      plan, operands, times_ref=times_ref, with_logits=with_logits
    )
    return out, jax.freeze(times_ref)

  changed = [i for i, name in enumerate(shapes) if name in CHANGED]
  donate = [len(of_times) + i for i in changed]
  return compile_for_hopper(step, *of_times, *shapes.values(), donate=donate)


def _without_lines(ptx: str) -> str:
  """Returns PTX without what it says of source lines, comments and spaces."""
  code, _, _ = ptx.partition(".section")
  code = re.sub(r"(?m)^\s*\.(loc|file)\b.*$|//.*$", "", code)
  return " ".join(code.split())


def _report(folder: pathlib.Path, compile_s: float) -> Report:
  said = {
    suffix: [p.read_text("utf-8") for p in folder.glob(f"*.{suffix}")]
    for suffix in ("ptxas", "resources.txt", "ptx")
  }
  for suffix, texts in said.items():
    if len(texts) != 1:
      raise RuntimeError(
        f"expected one dump *.{suffix}, found {len(texts)} among "
        f"{sorted(p.name for p in folder.iterdir())}"
      )
  (ptxas,), (resources,), (ptx,) = said.values()

  def number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if len(found) != 1:
      raise RuntimeError(f"{len(found)} times {pattern!r} in:\n{text}")
    return int(found[0])

  # Where registers spill, a warning counts the bytes too.
  frame = "bytes stack frame, "
  barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
  return Report(
    registers=number(r"Used (\d+) registers", ptxas),
    spill_store_bytes=number(rf"{frame}(\d+) bytes spill stores", ptxas),
    spill_load_bytes=number(
      rf"{frame}\d+ bytes spill stores, (\d+) bytes spill loads", ptxas
    ),
    stack_bytes=number(r"(\d+) bytes stack frame", ptxas),
    smem_bytes=number(r"smem_scratch_bytes=(\d+)", resources)
    + _BARRIER_BYTES * sum(int(n) * int(count) for n, count in barriers),
    ptx_sha256=hashlib.sha256(_without_lines(ptx).encode()).hexdigest(),
    compile_s=compile_s,
  )
