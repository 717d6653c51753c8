"""Runs the PTX of `pallas_kernels.threads` programs on the CPU, all threads at once.

Straight lines only: a branch back, which waits for words, must not be taken. A
register is a numpy array with a value for each thread. There is one memory for all
state spaces; an array of the test is put somewhere in it.
"""

import re
from unittest import mock

import numpy as np
from jax.numpy import bfloat16

from pallas_kernels import mosaic

_COMPARE = dict(
  eq=np.equal, ne=np.not_equal, lt=np.less, gt=np.greater, le=np.less_equal
)
_WARP = 32
_SIZES = dict(b16=2, u16=2, b32=4, u32=4, s32=4, f32=4, b64=8, u64=8)


class Array:
  """An array of the test, in the memory of a `Machine`."""

  def __init__(self, machine, values):
    values = np.ascontiguousarray(values)
    self._machine, self._shape, self._dtype = (
      machine,
      values.shape,
      values.dtype,
    )
    self._begin = machine.allocate(values.tobytes())

  def plus(self, index, item_bytes):
    return self._begin + np.asarray(index, np.int64) * item_bytes

  @property
  def value(self):
    memory = self._machine.memory[self._begin :]
    size = int(np.prod(self._shape)) * self._dtype.itemsize
    return memory[:size].view(self._dtype).reshape(self._shape)


class Machine:
  """Threads, memory, and registers of the program that runs."""

  def __init__(self, num_threads):
    self.num_threads = num_threads
    # Nothing lies at the beginning, where a forgotten address would point.
    self.memory = np.zeros(256, np.uint8)
    self._inside = np.zeros(256, bool)
    self.registers = {}

  def allocate(self, data):
    begin = len(self.memory)
    # Nobody may write between arrays.
    num = 256 + -len(data) % 256
    padding = np.zeros(num, np.uint8)
    self.memory = np.concatenate(
      [self.memory, np.frombuffer(data, np.uint8), padding]
    )
    inside = np.arange(len(data) + num) < len(data)
    self._inside = np.concatenate([self._inside, inside])
    return begin

  def array(self, values):
    return Array(self, values)

  def run(self, emit, what, *args):
    """Emits a program and runs it; returns what it returns."""

    def index(num_threads, anew=True):
      assert num_threads == self.num_threads
      return np.arange(num_threads)

    with (
      mock.patch.object(mosaic, "asm", self._asm),
      mock.patch.object(mosaic, "thread_index", index),
    ):
      return emit(what, *args)

  def _asm(self, code, *operands, num_f32_results=0):
    assert num_f32_results == 0
    shape = (self.num_threads,)
    self.registers = {
      f"${n}": np.broadcast_to(np.asarray(x), shape).copy()
      for n, x in enumerate(operands)
    }
    inside = re.fullmatch(r"\s*\{(.*)\}\s*", code, re.DOTALL).group(1)
    for statement in inside.split(";"):
      statement = re.sub(r"^\s*\w+_\$\{:uid\}:", "", statement).strip()
      if statement and not statement.startswith(".reg"):
        self._run_one(statement)

  def _run_one(self, statement):
    guard, op, rest = re.fullmatch(
      r"(?:@(!?\w+) )?\s*([\w.:]+)\s+(.*)", statement, re.DOTALL
    ).groups()
    active = np.ones(self.num_threads, bool)
    if guard:
      active = self.registers[guard.lstrip("!")].astype(bool)
      active = ~active if guard.startswith("!") else active
    parts = op.split(".")
    if parts[0] == "bra":
      assert not active.any(), f"words are missing: {statement}"
      return
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    if parts[0] in ("ld", "st"):
      self._access(parts, operands, active)
      return
    target, *sources = operands
    if target.startswith("{"):
      whole = self._get(sources[0], np.dtype(np.uint64))
      value = [whole & np.uint64(0xFFFFFFFF), whole >> np.uint64(32)]
      value = [x.astype(np.uint32) for x in value]
    else:
      value = self._compute(parts, sources)
    names = self._names(target)
    values = value if isinstance(value, list) else [value]
    for name, x in zip(names, values, strict=True):
      self.registers[name] = np.where(active, x, self._before(name, x.dtype))

  def _before(self, name, dtype):
    """Returns what a register holds; one that nothing was written to, all ones."""
    nothing = np.full(self.num_threads, -1, np.int64)
    return _as(self.registers.get(name, nothing), dtype)

  def _names(self, operand):
    return [x.strip() for x in operand.strip("{}").split(",")]

  def _get(self, operand, dtype):
    if operand.startswith("0f"):
      value = np.uint32(int(operand[2:], 16)).view(np.float32)
    elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
      value = np.int64(int(operand, 0))
    elif operand == "%laneid":
      value = np.arange(self.num_threads) % _WARP
    else:
      value = self.registers[operand]
    value = np.broadcast_to(value, (self.num_threads,))
    return _as(value, dtype)

  def _access(self, parts, operands, active):
    size = _SIZES[parts[-1]]
    load = parts[0] == "ld"
    address = operands[1 if load else 0].strip("[]").split("+")
    at = self._get(address[0].strip(), np.dtype(np.int64))
    at = at + sum(int(x) for x in address[1:])
    dtype = np.dtype(f"u{size}")
    names = self._names(operands[0 if load else 1])
    assert len(names) == int(
      (re.search(r"\.v(\d)", ".".join(parts)) or "11")[1]
    )
    assert (at[active] % (size * len(names)) == 0).all(), "not aligned"
    for n, name in enumerate(names):
      index = (at + n * size)[:, None] + np.arange(size)
      if load:
        found = self.memory[np.where(active[:, None], index, 0)]
        found = np.ascontiguousarray(found).view(dtype)[:, 0]
        self.registers[name] = np.where(
          active, found, self._before(name, dtype)
        )
        continue
      value = np.ascontiguousarray(self._get(name, _wide(size))).astype(dtype)
      data = value.view(np.uint8).reshape(-1, size)
      flat = index[active].ravel()
      written = np.zeros(len(self.memory), np.int32)
      np.add.at(written, flat, 1)
      assert (written <= 1).all(), "two threads write to the same place"
      assert self._inside[flat].all(), "a thread writes to no array"
      self.memory[flat] = data[active].ravel()

  def _compute(self, parts, sources):
    u32, f32 = np.dtype(np.uint32), np.dtype(np.float32)
    name, kind = parts[0], parts[-1]
    dtype = dict(f32=f32, s32=np.dtype(np.int32), b64=np.dtype(np.uint64)).get(
      kind, u32
    )
    if name == "mov":
      return self._move(kind, sources[0], dtype)
    if name == "setp":
      found = _COMPARE[parts[1]](*(self._get(x, dtype) for x in sources[:2]))
      if parts[2] == "and":
        found = found & self._get(sources[2], np.dtype(bool))
      return found
    if name == "selp":
      which = self._get(sources[2], np.dtype(bool))
      return np.where(which, *(self._get(x, dtype) for x in sources[:2]))
    if name == "cvt":
      return self._convert(parts, sources)
    if name == "shfl":
      lanes = np.arange(self.num_threads) ^ int(sources[1])
      return self._get(sources[0], u32)[lanes]
    if name == "vote":
      each = self._get(sources[0], np.dtype(bool)).reshape(-1, _WARP)
      return np.repeat(each.any(1), _WARP)
    if kind == "pred":
      dtype = np.dtype(bool)
    if name == "lop3":
      a, b, c = (self._get(x, u32) for x in sources[:3])
      table, found = int(sources[3], 16), np.zeros(self.num_threads, u32)
      for n in range(8):
        if table >> n & 1:
          bits = [
            x if n >> (2 - k) & 1 else ~x for k, x in enumerate((a, b, c))
          ]
          found |= bits[0] & bits[1] & bits[2]
      return found
    values = [self._get(x, dtype) for x in sources]
    with np.errstate(all="ignore"):
      return {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
        "neg": lambda a: -a,
        "min": np.minimum,
        "max": np.maximum,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "shl": lambda a, b: a << b,
        "shr": lambda a, b: a >> b,
        "rsqrt": lambda a: 1 / np.sqrt(a),
        "ex2": np.exp2,
        "rcp": lambda a: 1 / a,
      }[name](*values).astype(dtype)

  def _move(self, kind, source, dtype):
    if not source.startswith("{"):
      value = self._get(source, np.dtype(np.uint64) if kind == "b64" else dtype)
      if kind == "b16":
        return value.astype(np.uint16)
      return value
    size = _SIZES[kind] // 2
    low, high = (
      self._get(x, np.dtype(np.uint32)).astype(np.uint64)
      for x in self._names(source)
    )
    return (low | high << np.uint64(8 * size)).astype(f"u{2 * size}")

  def _convert(self, parts, sources):
    f32 = np.dtype(np.float32)
    if "bf16x2" in parts:
      high, low = (
        self._get(x, f32).astype(bfloat16).view(np.uint16).astype(np.uint32)
        for x in sources
      )
      return high << np.uint32(16) | low
    if parts[2] == "bf16":
      return self._get(sources[0], f32).astype(bfloat16).view(np.uint16)
    if parts[1:] == ["rn", "f32", "s32"]:
      return self._get(sources[0], np.dtype(np.int32)).astype(np.float32)
    assert parts[1:] == ["rzi", "s32", "f32"], parts
    return self._get(sources[0], f32).astype(np.int32)


def _as(value, dtype):
  """Returns what a register holds as another type, bit by bit."""
  if value.dtype == dtype or bool in (value.dtype, dtype):
    return value.astype(dtype)
  if value.dtype == np.float32:
    value = np.ascontiguousarray(value).view(np.uint32)
  if dtype == np.float32:
    return value.astype(np.uint32).view(np.float32)
  return value.astype(dtype)


def _wide(size):
  return np.dtype(f"u{max(size, 4)}")
