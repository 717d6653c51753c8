"""Everything private or unstable in JAX that the kernel leans on.

Written against JAX 0.11.2. The rest of the package uses `jax`, `pl` and `plgpu`
by their public names.
"""

import contextlib
import dataclasses
import functools
import importlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

MIN_JAX = (0, 11)


def missing() -> str | None:
  """Says what this JAX lacks to build the kernel, or None."""
  version = jax.__version_info__
  if version < MIN_JAX:
    wanted = ".".join(map(str, MIN_JAX))
    return f"it needs JAX {wanted} or later, and this is {jax.__version__}"
  return None


@contextlib.contextmanager
def silent_constraints() -> Iterator[None]:
  """Keeps Mosaic from writing out what it infers layouts from, where it dumps.

  That takes longer than all the rest of a compilation.
  """
  constraints = importlib.import_module(
    "jax.experimental.mosaic.gpu.constraints"
  )
  system = constraints.ConstraintSystem
  real = system.__str__
  system.__str__ = lambda self: ""
  try:
    yield
  finally:
    system.__str__ = real


def keep_plain(*refs: jax.Array) -> None:
  """Tells layout inference that these shared-memory refs are not tiled.

  It would otherwise try tilings for each of them, and the product of those
  choices exhausts its search.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
  def use(context, *refs):  # type: ignore[no-untyped-def]
    del context, refs

  use(*refs)


def store(ref: Any, value: jax.Array) -> None:
  """Stores to a shared-memory ref that is not tiled, bank conflicts or not.

  From JAX 0.12 on, an assignment refuses to conflict.
  """
  if hasattr(plgpu, "store"):
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


# ---- programs of single threads --------------------------------------------


@functools.cache
def _mlir() -> types.SimpleNamespace:
  """Imports what emits instructions; by name, since other JAXes lack it."""
  paths = dict(
    ir="jax._src.lib.mlir.ir",
    arith="jax._src.lib.mlir.dialects.arith",
    llvm="jax._src.lib.mlir.dialects.llvm",
    utils="jax.experimental.mosaic.gpu.utils",
    fragmented_array="jax.experimental.mosaic.gpu.fragmented_array",
  )
  found = {}
  for name, path in paths.items():
    module, _, attribute = path.rpartition(".")
    try:
      found[name] = importlib.import_module(path)
    except ModuleNotFoundError:
      found[name] = getattr(importlib.import_module(module), attribute)
  return types.SimpleNamespace(**found)


class Int:
  """A non-negative int32 of a thread, with Python's operators."""

  def __init__(self, value: Any):
    # A scalar argument comes as an array of no dimensions.
    is_array = hasattr(value, "registers")
    self.value = value.registers.flat[0] if is_array else value

  def _operand(self, other: Any) -> Any:
    if isinstance(other, Int):
      return other.value
    return _mlir().utils.c(int(other), self.value.type)

  def _binary(self, name: str, other: Any) -> "Int":
    return Int(getattr(_mlir().arith, name)(self.value, self._operand(other)))

  def __add__(self, other: Any) -> "Int":
    return self._binary("addi", other)

  def __sub__(self, other: Any) -> "Int":
    return self._binary("subi", other)

  def __mul__(self, other: Any) -> "Int":
    return self._binary("muli", other)

  __radd__, __rmul__ = __add__, __mul__

  def __floordiv__(self, other: Any) -> "Int":
    return self._binary("divui", other)

  def __mod__(self, other: Any) -> "Int":
    return self._binary("remui", other)

  def __xor__(self, other: Any) -> "Int":
    return self._binary("xori", other)

  def __and__(self, other: Any) -> "Int":
    return self._binary("andi", other)

  def __lt__(self, other: Any) -> "Int":
    m = _mlir()
    less = m.arith.cmpi(
      m.arith.CmpIPredicate.slt, self.value, self._operand(other)
    )
    return Int(m.arith.extui(self.value.type, less))


class Address:
  """Where a ref of shared or device memory begins."""

  def __init__(self, ref: Any):
    m = _mlir()
    pointer = m.utils.memref_ptr(ref)
    bits = 32 if m.utils.is_smem_ref(ref) else 64
    self._type = m.ir.IntegerType.get_signless(bits)
    self._value = m.llvm.ptrtoint(self._type, pointer)

  def plus(self, index: Int, item_bytes: int) -> Int:
    """Returns the address of an item."""
    m = _mlir()
    offset = index.value
    if offset.type != self._type:
      offset = m.arith.extui(self._type, offset)
    scale = m.utils.c(item_bytes, self._type)
    return Int(m.arith.addi(self._value, m.arith.muli(offset, scale)))


def thread_index(num_threads: int, *, anew: bool = True) -> Int:
  """Returns the thread's number among so many, its warpgroup's or several ones'.

  Args:
    num_threads: how many.
    anew: whether to read it here, so that what follows from it is not computed
      before a loop and held in registers all the while.
  """
  m = _mlir()
  i32 = m.ir.IntegerType.get_signless(32)
  read = m.llvm.inline_asm(
    i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=anew
  )
  return Int(read) % num_threads


def warpgroup_barrier() -> None:
  """Lets the warpgroup's threads see each other's writes."""
  _mlir().utils.warpgroup_barrier()


def named_barrier(name: int, num_threads: int) -> None:
  """Likewise those of several warpgroups.

  Args:
    name: 0 to 15, of which Mosaic takes 0 and one for each warpgroup.
    num_threads: how many wait for each other.
  """
  asm(f"barrier.sync {name}, {num_threads};")


def asm(code: str, *operands: Any, num_f32_results: int = 0) -> list[Any]:
  """Emits PTX with operands `$0`, `$1` and so on, the results first.

  Args:
    code: what to emit.
    *operands: what it reads.
    num_f32_results: how many values it sets.

  Returns:
    These values.
  """
  m = _mlir()
  letters = {
    m.ir.IntegerType.get_signless(64): "l",
    m.ir.IntegerType.get_signless(32): "r",
    m.ir.F32Type.get(): "f",
  }
  constraints = ["=f"] * num_f32_results
  constraints += [letters[x.value.type] for x in operands]
  results = ", ".join(["f32"] * num_f32_results)
  found = m.llvm.inline_asm(
    m.ir.Type.parse(f"!llvm.struct<({results})>" if results else "!llvm.void"),
    [x.value for x in operands],
    code,
    ",".join([*constraints, "~{memory}"]),
    has_side_effects=True,
  )
  f32 = m.ir.F32Type.get()
  return [
    Register(m.llvm.extractvalue(f32, found, [k]))
    for k in range(num_f32_results)
  ]


@dataclasses.dataclass(frozen=True)
class Register:
  """A float32 of a thread."""

  value: Any


def registers(array: Any) -> list[Register]:
  """Returns what a thread holds of `[64, n]` float32, a result of `wgmma`.

  For each 8 columns two of the first of its rows, then two of the second.
  """
  m = _mlir()
  i32 = m.ir.IntegerType.get_signless(32)
  return [
    Register(m.llvm.extractelement(pair, m.utils.c(k, i32)))
    for pair in array.registers.flat
    for k in range(2)
  ]


def wgmma_array(values: Sequence[Register]) -> Any:
  """Returns `[64, n]` of such values, as an array."""
  m = _mlir()
  f32, i32 = m.ir.F32Type.get(), m.ir.IntegerType.get_signless(32)
  layout = plgpu.Layout.WGMMA.to_mgpu()
  pairs = []
  for at in range(0, len(values), 2):
    pair = m.llvm.mlir_undef(m.ir.VectorType.get((2,), f32))
    for k in range(2):
      pair = m.llvm.insertelement(pair, values[at + k].value, m.utils.c(k, i32))
    pairs.append(pair)
  shape = layout.registers_shape((64, 2 * len(values)))
  return m.fragmented_array.FragmentedArray(
    _registers=np.array(pairs, dtype=object).reshape(shape),
    _layout=layout,
    _is_signed=None,
  )
