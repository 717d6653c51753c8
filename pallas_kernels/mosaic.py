"""Everything private or unstable in JAX that the kernel leans on.

Written against JAX 0.11.2. The rest of the package uses `jax`, `pl` and `plgpu`
by their public names.
"""

import functools
import importlib
import types
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

MIN_JAX = (0, 11)


def missing() -> str | None:
  """Says what this JAX lacks to build the kernel, or None."""
  version = jax.__version_info__
  if version < MIN_JAX:
    wanted = ".".join(map(str, MIN_JAX))
    return f"it needs JAX {wanted} or later, and this is {jax.__version__}"
  return None


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


def thread_index() -> Int:
  """Returns the thread's number in its warpgroup.

  Read anew, so that what follows from it is not computed before a loop and held
  in registers all the while.
  """
  m = _mlir()
  i32 = m.ir.IntegerType.get_signless(32)
  read = m.llvm.inline_asm(
    i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True
  )
  return Int(read) % 128


def warpgroup_barrier() -> None:
  """Lets the warpgroup's threads see each other's writes."""
  _mlir().utils.warpgroup_barrier()


def asm(code: str, *operands: Int) -> None:
  """Emits PTX that reads its operands: `$0`, `$1` and so on."""
  m = _mlir()
  constraints = ",".join(
    "l" if x.value.type == m.ir.IntegerType.get_signless(64) else "r"
    for x in operands
  )
  m.llvm.inline_asm(
    m.ir.Type.parse("!llvm.void"),
    [x.value for x in operands],
    code,
    f"{constraints},~{{memory}}",
    has_side_effects=True,
  )
