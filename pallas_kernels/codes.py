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
# Of how many sequences two chunks' sums fit in registers.
_MOST_OF_TWO = 2


@dataclasses.dataclass(frozen=True)
class MultiplyCodes:
  """Multiplies codes of one chunk, or of two, with activations.

  Attributes:
    format: of the codes.
    tiles: times 128 columns in a chunk.
    batch: B.
    x_columns: columns of x in shared memory.
    num_chunks: 1 or 2; two have twice as much that does not wait for each other.
    of_units: whether they are of two units, and meet the same columns; if not,
      of one, the columns of the second come after those of the first.
  """

  format: Format
  tiles: int
  batch: int
  x_columns: int
  num_chunks: int
  of_units: bool

  @property
  def columns(self) -> int:
    """Columns of each segment in a chunk."""
    return self.tiles * CHUNK_COLS

  @property
  def num_sums(self) -> int:
    """Sums of 64 rows that there are, of each sequence."""
    return self.num_chunks if self.of_units else 1


def at_once(batch: int) -> int:
  """Returns how many chunks are best multiplied at once."""
  return 2 if batch <= _MOST_OF_TWO else 1


def multiply(
  matmul: Matmul,
  ring: Ref,
  scales: Ref,
  x: Ref,
  slots: Sequence[Index],
  column: Index,
  sums: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
  """Adds the products of one chunk, or of two.

  Args:
    matmul: the matrix.
    ring: the slots.
    scales: `[slots, rows, 32]` int32, beside them.
    x: `[8 B, columns]` bfloat16, the operand.
    slots: where the chunks are; they have arrived.
    column: the first one of x that they meet.
    sums: `[64, 8]` float32 of each sequence, of both chunks; or of the first
      and then of the second, if they are of two units.

  Returns:
    The new sums. The chunks have been read by the thread that goes on.
  """
  batch = x.shape[0] // SEGMENTS
  what = MultiplyCodes(
    matmul.format,
    matmul.tiles,
    batch,
    x.shape[1],
    len(slots),
    len(sums) > batch,
  )
  slot_bytes = scales.shape[1] * ROW_BYTES
  return threads.run(
    what,
    _emit_multiply,
    [scales],
    [ring, x],
    [slot_bytes, column, *slots],
    arrays=sums,
    num_results=len(sums),
    meets_before=False,
    meets_after=False,
  )


def _convert(
  format: Format, n: int, word: str, into: Sequence[str]
) -> list[str]:
  """Returns PTX that makes registers of two bfloat16 of a word of codes.

  Args:
    format: of the codes.
    n: which chunk's scratch registers to use.
    word: a register of 32 bits.
    into: four registers for 4 bits, two for 8.
  """
  m, low = f"m_{n}", f"n_{n}"
  lines = []
  for i, a in enumerate(into):
    if format.bits == 4:
      # 128 + code has the code in its lowest bits. What stands for zero is taken
      # off, each row's own if it has one.
      if i:
        lines.append(f"shr.u32 {m}, {word}, {4 * i};")
      zero = f"z{i % 2}_{n}" if format.beside == "zero" else "z"
      lines += [
        f"lop3.b32 {a}, {m if i else word}, 0x000F000F, 0x43004300, 0xEA;",
        f"sub.rn.bf16x2 {a}, {a}, {zero};",
      ]
    elif format.is_float:
      # Sign, and exponent and mantissa as a bfloat16's, the exponent 120 too low.
      shifts = (
        f"mov.b32 {m}, {word}; shr.u32 {low}, {word}, 4;"
        if i
        else f"shl.b32 {m}, {word}, 8; shl.b32 {low}, {word}, 4;"
      )
      lines += [
        f"{shifts} and.b32 {low}, {low}, 0x07F007F0;",
        f"lop3.b32 {a}, {m}, 0x80008000, {low}, 0xEA;",
        f"mul.rn.bf16x2 {a}, {a}, z;",
      ]
    else:
      # Codes are counted from -128: 16 times the high bits and 2,048, less
      # 2,304; then the low bits and 128.
      lines += [
        f"shr.u32 {m}, {word}, {8 * i};",
        f"lop3.b32 {low}, {m}, 0x000F000F, 0x43004300, 0xEA;",
        f"shr.u32 {m}, {m}, 4;",
        f"lop3.b32 {a}, {m}, 0x000F000F, 0x45004500, 0xEA;",
        f"sub.rn.bf16x2 {a}, {a}, z; add.rn.bf16x2 {a}, {a}, {low};",
      ]
  return lines


# What is taken off codes, or multiplied with them, as two bfloat16.
def _constant(format: Format) -> int:
  if format.is_float:
    return 0x7B807B80  # 2^120
  if format.bits == 8:
    return 0x45104510  # 2,304
  return 0x43004300 if format.beside == "minimum" else 0x43084308  # 128 + 8


class _Chunk:
  """PTX for one chunk, step by step of 16 columns.

  Attributes:
    what: the program.
    n: which of its chunks.
    ring: operand with the address of the thread's first 16 bytes of codes.
    scales: operand with the address of its first row's first scale.
    x: operands with that of its activations in either half of a tile.
  """

  def __init__(self, what: MultiplyCodes, n: int, ring: int, x: int):
    self.what, self.n = what, n
    self.ring, self.scales, self.x = ring, ring + 1, (x, x + 1)
    # Two units meet the same activations.
    self.own_x = 0 if what.of_units else n
    self.sum = n * what.batch if what.of_units else 0

  def _load(self, names: str, address: str) -> str:
    registers = ", ".join(f"{names}_{i}" for i in range(4))
    return (
      f".reg .b32 {registers}; ld.shared.v4.b32 {{{registers}}}, [{address}];"
    )

  def _entries(self, index: int) -> list[str]:
    """Loads what a span of each of two rows has: `s`, and `b` or `z`."""
    f = self.what.format
    num_spans = f.num_spans(self.what.tiles)
    lines = []
    for half in range(2):
      at = (8 * half * num_spans + index) * f.entry_bytes
      where = f"[${self.scales} + {at}]"
      scale = f"s{half}_{self.n}"
      if f.scale == "float32":
        lines.append(f"ld.shared.f32 {scale}, {where};")
        continue
      if f.beside is None:
        lines.append(f"ld.shared.b16 h0, {where};")
      else:
        lines.append(f"ld.shared.b32 e, {where}; mov.b32 {{h0, h1}}, e;")
      if f.beside == "zero":
        lines.append(f"mov.b32 z{half}_{self.n}, {{h1, h1}};")
      lines.append(_widen(f.scale, scale, "h0"))
      if f.beside == "minimum":
        lines.append(_widen(f.scale, f"b{half}_{self.n}", "h1"))
    return lines

  def step(self, step: int) -> list[str]:
    """Converts and multiplies 16 columns of all segments."""
    what, f, n = self.what, self.what.format, self.n
    lines = []
    col = step * STEP_COLUMNS
    piece, block = col // f.piece_columns, col // _BLOCK
    if col % f.piece_columns == 0:
      offset = piece * THREADS * PIECE_BYTES
      lines.append(self._load(f"w{piece}_{n}", f"${self.ring} + {offset}"))
    if col % _BLOCK == 0 and self.own_x == n:
      tile, half = divmod(block, TILE // _BLOCK)
      for b in range(what.batch):
        offset = tile * TILE_BYTES + b * what.x_columns * SEGMENTS * 2
        names = f"x{block}_{b}_{n}"
        lines.append(self._load(names, f"${self.x[half]} + {offset}"))
    span = f.span(what.tiles)
    index, within = divmod(col, span)
    kinds = dict(c="s", o="b") if f.beside == "minimum" else dict(c="s")
    if within == 0:
      lines += self._entries(index)
      for kind in kinds:
        for b in range(what.batch):
          names = [f"{kind}{index}_{b}_{n}_{i}" for i in range(_VALUES)]
          lines.append(f".reg .f32 {', '.join(names)};")
          lines += [f"mov.f32 {name}, 0f00000000;" for name in names]
    steps_per_piece = f.piece_columns // STEP_COLUMNS
    words_per_step = 4 // steps_per_piece
    each = 4 // words_per_step
    weights = [f"a{i}_{n}" for i in range(4)]
    for i in range(words_per_step):
      at = step % steps_per_piece * words_per_step + i
      into = weights[each * i : each * (i + 1)]
      lines += _convert(f, n, f"w{piece}_{n}_{at}", into)
    for b in range(what.batch):
      x = [f"x{block}_{b}_{self.own_x}_{2 * (step % 2) + i}" for i in range(2)]
      lines.append(_mma(f"c{index}_{b}_{n}", weights, x))
      if f.beside == "minimum":
        lines.append(_mma(f"o{index}_{b}_{n}", ["one"] * 4, x))
    if within + STEP_COLUMNS == span:
      for b in range(what.batch):
        for i in range(_VALUES):
          y = f"y{(self.sum + b) * _VALUES + i}"
          for kind, factor in kinds.items():
            own = f"{kind}{index}_{b}_{n}_{i}"
            lines.append(f"fma.rn.f32 {y}, {own}, {factor}{i // 2}_{n}, {y};")
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
  sums = args[: what.num_sums * what.batch]
  slot_bytes, column, *slots = args[len(sums) :]
  f = what.format
  t = mosaic.thread_index()
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

  # Results come first among the operands.
  num_values = _VALUES * len(sums)
  operands, chunks = [], []
  for n, slot in enumerate(slots):
    at = num_values + len(operands)
    operands += [
      ring.plus(slot * (CHUNK_BYTES // PIECE_BYTES) + t, PIECE_BYTES),
      scales.plus(slot * slot_bytes + entries, 1),
    ]
    first_x = num_values + 2
    if n == 0 or not what.of_units:
      first_x = num_values + len(operands)
      tile = column // TILE + n * (what.columns // TILE)
      operands += [
        x.plus(tile * TILE_BYTES + (at_x ^ half * _BLOCK * 2), 1)
        for half in range(2)
      ]
    chunks.append(_Chunk(what, n, at, first_x))
  first_sum = num_values + len(operands)
  operands += [value for array in sums for value in array]

  lines = [
    "{ .reg .b32 e, z, one; .reg .b16 h0, h1;"
    f" mov.b32 z, {_constant(f)}; mov.b32 one, {_ONE};"
  ]
  for n in range(what.num_chunks):
    lines.append(
      f".reg .b32 m_{n}, n_{n}, a0_{n}, a1_{n}, a2_{n}, a3_{n}, z0_{n}, z1_{n};"
      f" .reg .f32 s0_{n}, s1_{n}, b0_{n}, b1_{n};"
    )
  lines += [
    f".reg .f32 y{i}; mov.f32 y{i}, ${first_sum + i};"
    for i in range(num_values)
  ]
  for step in range(what.columns // STEP_COLUMNS):
    for chunk in chunks:
      lines += chunk.step(step)
  lines += [f"mov.f32 ${i}, y{i};" for i in range(num_values)]
  lines.append("}")
  results = mosaic.asm(" ".join(lines), *operands, num_f32_results=num_values)
  return [results[i : i + _VALUES] for i in range(0, num_values, _VALUES)]


def _widen(dtype: str, into: str, source: str) -> str:
  """Returns PTX that makes a float32 of a register of 16 bits."""
  if dtype == "float16":
    return f"cvt.f32.f16 {into}, {source};"
  return f"mov.b32 e, {{0, {source}}}; mov.b32 {into}, e;"
