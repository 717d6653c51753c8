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
# Products wait for those before them in the same sum, some 33 cycles: a sequence
# alone has two sums at a time, by turns.
_CHAINS = 2
# Weights of one, whose products are the sums of the activations.
_ONES = "one, one, one, one"


@dataclasses.dataclass(frozen=True)
class MultiplyCodes:
  """Multiplies a chunk's codes with activations.

  Attributes:
    format: of the codes.
    tiles: times 128 columns in the chunk.
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
  format: Format,
  tiles: int,
  ring: Ref,
  scales: Ref,
  x: Ref,
  slot: Index,
  column: Index,
  sums: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
  """Adds the products of a chunk.

  Args:
    format: of the codes.
    tiles: times 128 columns in the chunk.
    ring: the slots.
    scales: `[slots, rows, 32]` int32, beside them.
    x: `[8 B, columns]` bfloat16, the operand.
    slot: where the chunk is; it has arrived.
    column: the first one of x that it meets.
    sums: `[64, 8]` float32 of each sequence.

  Returns:
    The new sums. The chunk has been read.
  """
  what = MultiplyCodes(format, tiles, len(sums), x.shape[1])
  return threads.run(
    what,
    _emit_multiply,
    [scales],
    [ring, x],
    [slot * (scales.shape[1] * ROW_BYTES), slot, column],
    arrays=sums,
    num_results=len(sums),
    meets_before=False,
    meets_after=False,
  )


def _convert(format: Format, word: str, into: Sequence[str]) -> str:
  """Returns PTX that makes registers of two bfloat16 of a word of codes.

  Args:
    format: of the codes.
    word: a register of 32 bits.
    into: four registers for 4 bits, two for 8.
  """
  if format.bits == 4:
    # 128 + code has the code in its lowest bits.
    lines = []
    for n, a in enumerate(into):
      source = word
      if n:
        source = "m"
        lines.append(f"shr.u32 m, {word}, {4 * n};")
      lines.append(f"lop3.b32 {a}, {source}, 0x000F000F, 0x43004300, 0xEA;")
      # What stands for zero is taken off, each row's own if it has one.
      zero = ("z0", "z1")[n % 2] if format.beside == "zero" else "z"
      lines.append(f"sub.rn.bf16x2 {a}, {a}, {zero};")
    return " ".join(lines)
  lines = []
  for n, a in enumerate(into):
    if format.is_float:
      # Sign, and exponent and mantissa as a bfloat16's, 120 too low.
      shifts = (
        f"shl.b32 m, {word}, 8; shl.b32 n, {word}, 4;"
        if n == 0
        else f"mov.b32 m, {word}; shr.u32 n, {word}, 4;"
      )
      lines.append(
        f"{shifts} and.b32 n, n, 0x07F007F0;"
        f" lop3.b32 {a}, m, 0x80008000, n, 0xEA; mul.rn.bf16x2 {a}, {a}, z;"
      )
      continue
    # Codes are counted from -128: 16 times the high bits and 2,048, less 2,304;
    # then the low bits and 128.
    low, high = (word, f"{word}") if n == 0 else ("m", "m")
    if n:
      lines.append(f"shr.u32 m, {word}, 8;")
    lines.append(
      f"lop3.b32 n, {low}, 0x000F000F, 0x43004300, 0xEA;"
      f" shr.u32 e, {high}, 4;"
      f" lop3.b32 {a}, e, 0x000F000F, 0x45004500, 0xEA;"
      f" sub.rn.bf16x2 {a}, {a}, z; add.rn.bf16x2 {a}, {a}, n;"
    )
  return " ".join(lines)


# What is taken off codes, or multiplied with them, as two bfloat16.
def _constant(format: Format) -> int:
  if format.is_float:
    return 0x7B807B80  # 2^120
  if format.bits == 8:
    return 0x45104510  # 2,304
  return 0x43004300 if format.beside == "minimum" else 0x43084308  # 128 + 8


def _emit_multiply(
  what: MultiplyCodes, scales: Any, ring: Any, x: Any, *args: Any
) -> list[Any]:
  *sums, byte, slot, column = args
  f = what.format
  num_spans = f.num_spans(what.tiles)
  span = f.span(what.tiles)
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
  num_values = _VALUES * what.batch
  k = num_values  # Operands come after results.
  lines = [
    "{ .reg .b32 m, n, e, z, z0, z1, a0, a1, a2, a3; .reg .b16 h0, h1;"
    " .reg .f32 s0, s1, b0, b1;"
    f" mov.b32 z, {_constant(f)}; .reg .b32 one; mov.b32 one, 0x3F803F80;"
  ]
  for i in range(num_values):
    lines.append(f".reg .f32 y{i}; mov.f32 y{i}, ${k + 4 + i};")

  def load(bank: str, name: str, address: str) -> str:
    names = ", ".join(f"{name}_{i}" for i in range(4))
    return (
      f".reg .b32 {names}; ld.shared.v4.b32 {{{names}}}, [{address}];"
      if bank
      else ""
    )

  def load_entries(index: int) -> str:
    """Loads the entries of a span: `s`, and `b` or `z`."""
    loaded = []
    for half in range(2):
      at = (8 * half * num_spans + index) * f.entry_bytes
      where = f"[${k + 1} + {at}]"
      if f.scale == "float32":
        loaded.append(f"ld.shared.f32 s{half}, {where};")
        continue
      if f.beside is None:
        loaded.append(f"ld.shared.b16 h0, {where};")
      else:
        loaded.append(f"ld.shared.b32 e, {where}; mov.b32 {{h0, h1}}, e;")
      if f.beside == "zero":
        loaded.append(f"mov.b32 z{half}, {{h1, h1}};")
      loaded.append(_widen(f.scale, f"s{half}", "h0"))
      if f.beside == "minimum":
        loaded.append(_widen(f.scale, f"b{half}", "h1"))
    return " ".join(loaded)

  def mma(acc: str, weights: str, activations: str) -> str:
    names = ", ".join(f"{acc}_{i}" for i in range(_VALUES))
    return (
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
      f" {{{names}}}, {{{weights}}}, {{{activations}}}, {{{names}}};"
    )

  steps_per_piece = f.piece_columns // STEP_COLUMNS
  words_per_step = 4 // steps_per_piece
  kinds = ("c", "o") if f.beside == "minimum" else ("c",)
  chains = min(_CHAINS if what.batch == 1 else 1, span // STEP_COLUMNS)
  for step in range(what.columns // STEP_COLUMNS):
    col = step * STEP_COLUMNS
    if col % f.piece_columns == 0:
      piece = col // f.piece_columns
      offset = piece * THREADS * PIECE_BYTES
      lines.append(load("ring", f"w{piece}", f"${k} + {offset}"))
    if col % _BLOCK == 0:
      # Two steps of columns of each sequence, in either half of a tile.
      tile, half = divmod(col // _BLOCK, TILE // _BLOCK)
      for b in range(what.batch):
        offset = tile * TILE_BYTES + b * what.x_columns * SEGMENTS * 2
        address = f"${k + 2 + half} + {offset}"
        lines.append(load("x", f"x{col // _BLOCK}_{b}", address))
    index, within = divmod(col, span)
    if within == 0:
      lines.append(load_entries(index))
      for kind in kinds:
        for b in range(what.batch):
          for chain in range(chains):
            names = [f"{kind}{index}_{b}_{chain}_{i}" for i in range(_VALUES)]
            lines.append(f".reg .f32 {', '.join(names)};")
            lines += [f"mov.f32 {name}, 0f00000000;" for name in names]
    at = step % steps_per_piece * words_per_step
    registers = [f"a{i}" for i in range(4)]
    each = 4 // words_per_step
    for i in range(words_per_step):
      word_name = f"w{col // f.piece_columns}_{at + i}"
      lines.append(_convert(f, word_name, registers[each * i : each * (i + 1)]))
    for b in range(what.batch):
      own = f"x{col // _BLOCK}_{b}"
      two = 2 * (step % 2)
      activations = f"{own}_{two}, {own}_{two + 1}"
      turn = f"{index}_{b}_{step % chains}"
      lines.append(mma(f"c{turn}", "a0, a1, a2, a3", activations))
      if f.beside == "minimum":
        lines.append(mma(f"o{turn}", _ONES, activations))
    if within + STEP_COLUMNS == span:
      for i in range(num_values):
        b, value = divmod(i, _VALUES)
        half = value // 2
        for kind, factor in zip(kinds, ("s", "b"), strict=False):
          own = f"{kind}{index}_{b}"
          for chain in range(1, chains):
            first, other = (f"{own}_{x}_{value}" for x in (0, chain))
            lines.append(f"add.f32 {first}, {first}, {other};")
          lines.append(f"fma.rn.f32 y{i}, {own}_0_{value}, {factor}{half}, y{i};")
  lines += [f"mov.f32 ${i}, y{i};" for i in range(num_values)]
  lines.append("}")
  begin = column // TILE * TILE_BYTES
  results = mosaic.asm(
    " ".join(lines),
    ring.plus(slot * (CHUNK_BYTES // PIECE_BYTES) + t, PIECE_BYTES),
    scales.plus(byte + row * (num_spans * f.entry_bytes), 1),
    x.plus(begin + at_x, 1),
    x.plus(begin + (at_x ^ _BLOCK * 2), 1),
    *(v for array in sums for v in array),
    num_f32_results=num_values,
  )
  return [results[_VALUES * b : _VALUES * (b + 1)] for b in range(what.batch)]


def _widen(dtype: str, into: str, source: str) -> str:
  """Returns PTX that makes a float32 of a register of 16 bits."""
  if dtype == "float16":
    return f"cvt.f32.f16 {into}, {source};"
  return f"mov.b32 e, {{0, {source}}}; mov.b32 {into}, e;"
