"""Products of codes: converted in registers on their way to the tensor core.

A code becomes a whole number in bfloat16, without rounding, and the products of
the columns that share a scale are summed up by `wgmma` in float32; then the scale
is a factor of that sum. While the tensor core takes some columns, the next ones
are converted: there are two of all registers that `wgmma` reads and writes.

A chunk's codes are in the order in which threads want them. Row `m` of the operand
is row `8 r + s` of the unit: segment s of its row r. Thread `32 w + 4 g + c` has of
each 16 columns the columns `2 c`, `2 c + 1`, `2 c + 8` and `2 c + 9` of rows
`16 w + g` and 8 below, as `wgmma` has it (PTX ISA, "Register Fragments for
wgmma.mma_async.m64nNk16"). `ORDER` says where in 16 bytes they are, so that one
mask finds the two codes of a register.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import mosaic, threads
from pallas_kernels.formats import PIECE_BYTES, STEP_COLUMNS, Format
from pallas_kernels.geometry import CHUNK_BYTES, CHUNK_COLS, SEGMENTS, TILE
from pallas_kernels.layouts import Index, Ref
from pallas_kernels.threads import THREADS, TILE_BYTES, WARP

# Products of one sequence that a thread has: two columns of two rows.
_VALUES = 4
# Registers of weights that `wgmma` takes at a time.
_OPERANDS = 4


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
    scales: `[slots, words]` int32, beside them.
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
    [slot * scales.shape[1], slot, column],
    arrays=sums,
    num_results=len(sums),
    meets_before=False,
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
  *sums, word, slot, column = args
  f = what.format
  t = mosaic.thread_index()
  row = t // WARP * 16 + t % WARP // 4
  span, num_spans = f.span(what.tiles), f.num_spans(what.tiles)
  # What is given to the tensor core at a time.
  part = min(span, f.piece_columns)
  parts_per_span, steps = span // part, part // STEP_COLUMNS
  parts_per_piece = f.piece_columns // part
  num_parts = what.columns // part
  n = SEGMENTS * what.batch
  num_values = _VALUES * what.batch

  values = [v for array in sums for v in array]
  # Operands: results, then these.
  k = num_values
  lines = [
    "{ .reg .pred never, always; .reg .b32 m, n, e, z, z0, z1, lo, hi;"
    " .reg .b64 d; .reg .b16 h0, h1;"
    " setp.ne.b32 never, 0, 0; setp.eq.b32 always, 0, 0;"
    f" mov.b32 z, {_constant(f)};"
  ]
  for i in range(num_values):
    lines.append(f".reg .f32 y{i}; mov.f32 y{i}, ${k + 3 + i};")
  for side in range(2):
    names = [f"a{side}_{i}" for i in range(_OPERANDS * steps)]
    lines.append(f".reg .b32 {', '.join(names)};")
    names = [f"c{side}_{i}" for i in range(num_values)]
    lines.append(f".reg .f32 {', '.join(names)};")
    if f.beside == "minimum":
      names = [f"o{side}_{i}" for i in range(num_values)]
      lines.append(f".reg .f32 {', '.join(names)};")
    names = [f"w{side}_{i}" for i in range(4)]
    lines.append(f".reg .b32 {', '.join(names)};")
  lines.append(".reg .f32 s0, s1, b0, b1; .reg .b32 one;")
  lines.append("mov.b32 one, 0x3F803F80;")
  # The descriptor of x: 128-byte swizzle, sequences one after the other.
  lines.append(
    f"shr.u32 lo, ${k + 2}, 4; and.b32 lo, lo, 0x3FFF; or.b32 lo, lo, 0x10000;"
    f" mov.b32 hi, {what.x_columns | 1 << 30};"
  )

  def load(piece: int) -> str:
    side = piece % 2
    names = ", ".join(f"w{side}_{i}" for i in range(4))
    offset = piece * THREADS * PIECE_BYTES
    return f"ld.shared.v4.b32 {{{names}}}, [${k} + {offset}];"

  def load_scales(index: int) -> str:
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
      loaded.append(_widen(f.scale, f"s{half}", "h0"))
      if f.beside == "minimum":
        loaded.append(_widen(f.scale, f"b{half}", "h1"))
    return " ".join(loaded)

  def load_zeros(index: int) -> str:
    loaded = []
    for half in range(2):
      at = (8 * half * num_spans + index) * f.entry_bytes
      loaded.append(
        f"ld.shared.b16 h1, [${k + 1} + {at + 2}]; mov.b32 z{half}, {{h1, h1}};"
      )
    return " ".join(loaded)

  def fold(index: int) -> str:
    """Adds the sums of a span, times its scales."""
    side = index % 2
    lines = [load_scales(index)]
    for i in range(num_values):
      half = i % _VALUES // 2
      lines.append(f"fma.rn.f32 y{i}, c{side}_{i}, s{half}, y{i};")
      if f.beside == "minimum":
        lines.append(f"fma.rn.f32 y{i}, o{side}_{i}, b{half}, y{i};")
    return " ".join(lines)

  def wgmma(names: str, weights: str, first: bool) -> str:
    return (
      f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{names}}},"
      f" {weights}, d, {'never' if first else 'always'}, 1, 1, 0;"
    )

  lines.append(load(0))
  for p in range(num_parts):
    piece, within = divmod(p, parts_per_piece)
    index, part_of_span = divmod(p, parts_per_span)
    side, acc = p % 2, index % 2
    if within == 0 and piece + 1 < num_parts // parts_per_piece:
      lines.append(load(piece + 1))
    if f.beside == "zero" and part_of_span == 0:
      lines.append(load_zeros(index))
    # The products that read these registers have ended: at most one part has not.
    if p >= 2:
      lines.append("wgmma.wait_group.sync.aligned 1;")
    words_per_step = 4 * STEP_COLUMNS // f.piece_columns
    for step in range(steps):
      registers = [f"a{side}_{_OPERANDS * step + i}" for i in range(_OPERANDS)]
      each = _OPERANDS // words_per_step
      for i in range(words_per_step):
        at = (within * steps + step) * words_per_step + i
        lines.append(
          _convert(
            f, f"w{piece % 2}_{at}", registers[each * i : each * (i + 1)]
          )
        )
    # A span that began two spans ago has been folded, and so may be begun anew.
    lines.append("wgmma.fence.sync.aligned;")
    for step in range(steps):
      col = p * part + step * STEP_COLUMNS
      offset = col // TILE * TILE_BYTES + col % TILE * 2
      lines.append(f"add.u32 m, lo, {offset >> 4}; mov.b64 d, {{m, hi}};")
      registers = ", ".join(
        f"a{side}_{_OPERANDS * step + i}" for i in range(_OPERANDS)
      )
      first = part_of_span == 0 and step == 0
      names = ", ".join(f"c{acc}_{i}" for i in range(num_values))
      lines.append(wgmma(names, f"{{{registers}}}", first))
      if f.beside == "minimum":
        names = ", ".join(f"o{acc}_{i}" for i in range(num_values))
        lines.append(wgmma(names, "{one, one, one, one}", first))
    lines.append("wgmma.commit_group.sync.aligned;")
    if part_of_span == 0 and index > 0:
      # The span before has ended.
      lines.append("wgmma.wait_group.sync.aligned 1;")
      lines.append(fold(index - 1))
  lines.append("wgmma.wait_group.sync.aligned 0;")
  lines.append(fold(num_spans - 1))
  lines += [f"mov.f32 ${i}, y{i};" for i in range(num_values)]
  lines.append("}")
  tile = column // TILE
  results = mosaic.asm(
    " ".join(lines),
    ring.plus(slot * (CHUNK_BYTES // PIECE_BYTES) + t, PIECE_BYTES),
    scales.plus(word * 4 + row * (num_spans * f.entry_bytes), 1),
    x.plus(tile * TILE_BYTES, 1),
    *values,
    num_f32_results=num_values,
  )
  return [
    results[_VALUES * b : _VALUES * (b + 1)] for b in range(what.batch)
  ]


def _widen(dtype: str, into: str, source: str) -> str:
  """Returns PTX that makes a float32 of a register of 16 bits."""
  if dtype == "float16":
    return f"cvt.f32.f16 {into}, {source};"
  return f"mov.b32 e, {{0, {source}}}; mov.b32 {into}, e;"
