"""Products of codes: converted in registers on their way to the tensor core.

A code becomes a whole number in bfloat16, without rounding; the products of the
columns that share a scale are summed up in float32, and the scale is a factor of
that sum. Each warp has 16 rows of the operand to itself and takes them by
`mma.sync`, which reads both operands from registers and leaves all order to the
compiler; `wgmma` with 8 columns is slower here (bench/LOG.md).

Row `m` of the operand is row `8 r + s` of the unit: segment s of its row r. Of
its products only those with segment s of the activations count, so each segment
may take its columns in an order of its own, if both operands have it. Thread
`4 s + c` of a warp has, of each 32 columns, columns `8 c` to `8 c + 7` of the
activations' segment s, which are 16 bytes, and of the weights' two rows of segment
s; the first four are for one step of 16, the others for the next. Of odd segments,
the two 32 of a tile of 64 columns are swapped. `code_packing` puts codes so.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import mosaic, threads
from pallas_kernels.formats import (
  PIECE_BYTES,
  ROW_BYTES,
  STEP_COLUMNS,
  Format,
)
from pallas_kernels.geometry import CHUNK_BYTES, CHUNK_COLS, SEGMENTS, TILE
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.schedule import Matmul
from pallas_kernels.threads import (
  THREADS,
  TILE_BYTES,
  TILE_ROW_BYTES,
  WARP,
  swizzled_byte,
)

# Products of one sequence that a thread has: two columns of two rows.
_VALUES = 4
# Columns of which a thread loads its activations at once.
_BLOCK = 32
# Two weights of one; products with them are the sums of the activations.
_ONE = "0x3F803F80"


@dataclasses.dataclass(frozen=True)
class MultiplyCodes:
  """Multiplies the codes of a chunk with activations.

  Attributes:
    format: of the codes.
    tiles: times 128 columns in a chunk.
    batch: B.
    x_columns: columns of x in shared memory.
  """

  format: Format
  tiles: int
  batch: int
  x_columns: int

  @property
  def columns(self) -> int:
    """Columns of each segment in the chunk."""
    return self.tiles * CHUNK_COLS


def multiply(
  matmul: Matmul,
  ring: Ref,
  scales: Ref,
  x: Ref,
  slot: Index,
  column: Index,
  sums: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
  """Adds the products of a chunk.

  Args:
    matmul: the matrix.
    ring: the slots.
    scales: `[slots, rows, 32]` int32, beside them.
    x: `[8 B, columns]` bfloat16, the operand.
    slot: where the chunk is; it has arrived.
    column: the first one of x that it meets.
    sums: `[64, 8]` float32 of each sequence.

  Returns:
    The new sums. The chunk has been read by the thread that goes on.
  """
  what = MultiplyCodes(matmul.format, matmul.tiles, len(sums), x.shape[1])
  return threads.run(
    what,
    _emit_multiply,
    [scales],
    [ring, x],
    [slot * (scales.shape[1] * ROW_BYTES), slot, column],
    arrays=sums,
    num_results=len(sums),
  )


def _convert(format: Format, word: str, into: Sequence[str]) -> list[str]:
  """Returns PTX that makes registers of two bfloat16 of a word of codes.

  Args:
    format: of the codes.
    word: a register of 32 bits.
    into: four registers for 4 bits, two for 8.
  """
  lines = []
  for i, a in enumerate(into):
    if format.bits == 4:
      # 128 + code has the code in its lowest bits. What stands for zero is taken
      # off, each row's own if it has one.
      if i:
        lines.append(f"shr.u32 m, {word}, {4 * i};")
      zero = f"z{i % 2}" if format.beside == "zero" else "z"
      lines += [
        f"lop3.b32 {a}, {'m' if i else word}, 0x000F000F, 0x43004300, 0xEA;",
        f"sub.rn.bf16x2 {a}, {a}, {zero};",
      ]
    elif format.is_float:
      # Sign, and exponent and mantissa as a bfloat16's, the exponent 120 too low.
      shifts = (
        f"mov.b32 m, {word}; shr.u32 n, {word}, 4;"
        if i
        else f"shl.b32 m, {word}, 8; shl.b32 n, {word}, 4;"
      )
      lines += [
        f"{shifts} and.b32 n, n, 0x07F007F0;",
        f"lop3.b32 {a}, m, 0x80008000, n, 0xEA;",
        f"mul.rn.bf16x2 {a}, {a}, z;",
      ]
    else:
      # Codes are counted from -128: 16 times the high bits and 2,048, less
      # 2,304; then the low bits and 128.
      lines += [
        f"shr.u32 m, {word}, {8 * i};",
        "lop3.b32 n, m, 0x000F000F, 0x43004300, 0xEA;",
        "shr.u32 m, m, 4;",
        f"lop3.b32 {a}, m, 0x000F000F, 0x45004500, 0xEA;",
        f"sub.rn.bf16x2 {a}, {a}, z; add.rn.bf16x2 {a}, {a}, n;",
      ]
  return lines


# What is taken off codes, or multiplied with them, as two bfloat16.
def _constant(format: Format) -> int:
  if format.is_float:
    return 0x7B807B80  # 2^120
  if format.bits == 8:
    return 0x45104510  # 2,304
  return 0x43004300 if format.beside == "minimum" else 0x43084308  # 128 + 8


# Which operands of the program, after the results, are addresses: of the thread's
# first 16 bytes of codes, of its first row's first scale, and of its activations
# in either half of a tile.
_RING, _SCALES, _X = 0, 1, (2, 3)
_NUM_ADDRESSES = 4


class _Steps:
  """PTX for a chunk, step by step of 16 columns."""

  def __init__(self, what: MultiplyCodes):
    self.what = what
    self.kinds = dict(c="s")
    if what.format.beside == "minimum":
      self.kinds["o"] = "b"

  def _address(self, operand: int, offset: int) -> str:
    first = _VALUES * self.what.batch
    return f"[${first + operand} + {offset}]"

  def _load(self, names: str, address: str) -> str:
    registers = ", ".join(f"{names}_{i}" for i in range(4))
    return (
      f".reg .b32 {registers}; ld.shared.v4.b32 {{{registers}}}, {address};"
    )

  def _entries(self, index: int) -> list[str]:
    """Loads what a span of each of two rows has: `s`, and `b` or `z`."""
    f = self.what.format
    num_spans = f.num_spans(self.what.tiles)
    lines = []
    for half in range(2):
      at = (8 * half * num_spans + index) * f.entry_bytes
      where = self._address(_SCALES, at)
      if f.scale == "float32":
        lines.append(f"ld.shared.f32 s{half}, {where};")
        continue
      if f.beside is None:
        lines.append(f"ld.shared.b16 h0, {where};")
      else:
        lines.append(f"ld.shared.b32 e, {where}; mov.b32 {{h0, h1}}, e;")
      if f.beside == "zero":
        lines.append(f"mov.b32 z{half}, {{h1, h1}};")
      lines.append(_widen(f.scale, f"s{half}", "h0"))
      if f.beside == "minimum":
        lines.append(_widen(f.scale, f"b{half}", "h1"))
    return lines

  def step(self, step: int) -> list[str]:
    """Converts and multiplies 16 columns of all segments."""
    what, f = self.what, self.what.format
    lines = []
    col = step * STEP_COLUMNS
    piece, block = col // f.piece_columns, col // _BLOCK
    if col % f.piece_columns == 0:
      offset = piece * THREADS * PIECE_BYTES
      lines.append(self._load(f"w{piece}", self._address(_RING, offset)))
    if col % _BLOCK == 0:
      tile, half = divmod(block, TILE // _BLOCK)
      for b in range(what.batch):
        offset = tile * TILE_BYTES + b * what.x_columns * SEGMENTS * 2
        address = self._address(_X[half], offset)
        lines.append(self._load(f"x{block}_{b}", address))
    span = f.span(what.tiles)
    index, within = divmod(col, span)
    if within == 0:
      lines += self._entries(index)
      for kind in self.kinds:
        for b in range(what.batch):
          names = [f"{kind}{index}_{b}_{i}" for i in range(_VALUES)]
          lines.append(f".reg .f32 {', '.join(names)};")
          lines += [f"mov.f32 {name}, 0f00000000;" for name in names]
    steps_per_piece = f.piece_columns // STEP_COLUMNS
    words_per_step = 4 // steps_per_piece
    each = 4 // words_per_step
    weights = [f"a{i}" for i in range(4)]
    for i in range(words_per_step):
      at = step % steps_per_piece * words_per_step + i
      lines += _convert(f, f"w{piece}_{at}", weights[each * i : each * (i + 1)])
    for b in range(what.batch):
      x = [f"x{block}_{b}_{2 * (step % 2) + i}" for i in range(2)]
      lines.append(_mma(f"c{index}_{b}", weights, x))
      if f.beside == "minimum":
        lines.append(_mma(f"o{index}_{b}", ["one"] * 4, x))
    if within + STEP_COLUMNS == span:
      for b in range(what.batch):
        for i in range(_VALUES):
          y = f"y{b * _VALUES + i}"
          for kind, factor in self.kinds.items():
            own = f"{kind}{index}_{b}_{i}"
            lines.append(f"fma.rn.f32 {y}, {own}, {factor}{i // 2}, {y};")
    return lines


def _mma(sums: str, weights: Sequence[str], x: Sequence[str]) -> str:
  names = ", ".join(f"{sums}_{i}" for i in range(_VALUES))
  return (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    f" {{{names}}}, {{{', '.join(weights)}}}, {{{', '.join(x)}}}, {{{names}}};"
  )


def _emit_multiply(
  what: MultiplyCodes, scales: Any, ring: Any, x: Any, *args: Any
) -> list[Any]:
  *sums, slot_byte, slot, column = args
  f = what.format
  t = mosaic.thread_index(THREADS, anew=False)
  lane = t % WARP
  segment, part = lane // 4, lane % 4
  row = t // WARP * 16 + segment
  # Of odd segments the second half of a tile comes first: a warp's loads of 16
  # bytes then meet in no bank.
  first_piece = segment % 2 * 4 + part
  at_x = segment * TILE_ROW_BYTES + swizzled_byte(
    segment, first_piece * PIECE_BYTES
  )
  entries = row * (f.num_spans(what.tiles) * f.entry_bytes)
  begin = column // TILE * TILE_BYTES
  # Results come first among the operands.
  num_values = _VALUES * what.batch
  first_sum = num_values + _NUM_ADDRESSES
  lines = [
    "{ .reg .b32 e, z, one, m, n, a0, a1, a2, a3, z0, z1; .reg .b16 h0, h1;"
    " .reg .f32 s0, s1, b0, b1;"
    f" mov.b32 z, {_constant(f)}; mov.b32 one, {_ONE};"
  ]
  lines += [
    f".reg .f32 y{i}; mov.f32 y{i}, ${first_sum + i};"
    for i in range(num_values)
  ]
  steps = _Steps(what)
  for step in range(what.columns // STEP_COLUMNS):
    lines += steps.step(step)
  lines += [f"mov.f32 ${i}, y{i};" for i in range(num_values)]
  lines.append("}")
  results = mosaic.asm(
    " ".join(lines),
    ring.plus(slot * (CHUNK_BYTES // PIECE_BYTES) + t, PIECE_BYTES),
    scales.plus(slot_byte + entries, 1),
    x.plus(begin + at_x, 1),
    x.plus(begin + (at_x ^ _BLOCK * 2), 1),
    *(value for array in sums for value in array),
    num_f32_results=num_values,
  )
  return [results[i : i + _VALUES] for i in range(0, num_values, _VALUES)]


def _widen(dtype: str, into: str, source: str) -> str:
  """Returns PTX that makes a float32 of a register of 16 bits."""
  if dtype == "float16":
    return f"cvt.f32.f16 {into}, {source};"
  return f"mov.b32 e, {{0, {source}}}; mov.b32 {into}, e;"
