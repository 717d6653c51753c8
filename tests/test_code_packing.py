"""Tests of `pallas_kernels.code_packing`: no bit is lost, and where each goes.

The places are worked out here one by one, from the docstring of
`pallas_kernels.codes`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax import quantized
from pallas_kernels import code_packing
from pallas_kernels.formats import Format
from pallas_kernels.geometry import SEGMENTS, UNIT_ROWS, round_up
from pallas_kernels.schedule import Matmul

FORMATS = {
  "int4_g128": Format(4, group=128),
  "int4_g64": Format(4, group=64, scale="float16"),
  "int4_g32": Format(4, group=32),
  "int4_g128_zero": Format(4, group=128, beside="zero"),
  "int4_g128_minimum": Format(4, group=128, beside="minimum"),
  "int4_g64_zero": Format(4, group=64, beside="zero"),
  "int4_g64_minimum": Format(4, group=64, beside="minimum"),
  "int4_g32_zero": Format(4, group=32, scale="float16", beside="zero"),
  "int4_g32_minimum": Format(4, group=32, scale="float16", beside="minimum"),
  "int4_g64_float32": Format(4, group=64, scale="float32"),
  "int8": Format(8, scale="float32"),
  "int8_bf16": Format(8, scale="bfloat16"),
  "int8_g128": Format(8, group=128),
  "int8_g64": Format(8, group=64, scale="float16"),
  "int8_g32": Format(8, group=32, scale="float16"),
  "fp8": Format(8, is_float=True),
  "fp8_float32": Format(8, is_float=True, scale="float32"),
}
# Rows, columns and CTAs: padding of both, and CTAs of several units.
_PADDED = (37, 1152, 3)
# Of each kind, whole chunks, CTAs without a unit, several chunks in a row.
_KINDS = ("int4_g64", "int4_g32_minimum", "int8", "int8_g32", "fp8")
_CASES = [(name, _PADDED) for name in FORMATS] + [
  (name, shape)
  for name in _KINDS
  for shape in [(64, 2048, 3), (8, 128, 3), (9, 4224, 1)]
]


def _matmul(f, out, cols, num_ctas):
  return Matmul(
    "test",
    round_up(out, UNIT_ROWS),
    round_up(cols, SEGMENTS * 128),
    num_ctas,
    f,
  )


def _bits_of(rng, dtype, shape):
  """Returns numbers of any bits, NaNs too."""
  dtype = jnp.dtype(dtype)
  made = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
  return made.view(dtype)[..., 0]


def _random(f, out, cols, lead=(), any_bits=True):
  """Returns codes, scales, and what is beside them."""
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 256, (*lead, out, cols * f.bits // 8), np.uint8)
  grouped = (*lead, out, cols // (f.group or cols))

  def numbers():
    if any_bits:
      return _bits_of(rng, f.scale, grouped)
    return rng.standard_normal(grouped).astype(jnp.dtype(f.scale))

  scales, beside = numbers(), None
  if f.beside == "zero":
    beside = rng.integers(0, 17, grouped, np.uint8)
  elif f.beside == "minimum":
    beside = numbers()
  if f.is_float and not any_bits:
    codes[codes & 0x7F == 0x7F] = 1  # NaN
  return codes, scales, beside


def _assert_same_bits(ours, theirs):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.dtype == theirs.dtype
  assert ours.shape == theirs.shape
  assert ours.tobytes() == theirs.tobytes()


@functools.partial(jax.jit, static_argnums=0)
def _pack(m, codes, scales, beside):
  return (
    code_packing.pack_codes(m, codes),
    code_packing.pack_scales(m, scales, beside),
  )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _unpack(m, packed, entries, out, cols):
  return (
    code_packing.unpack_codes(m, packed, out, cols),
    *code_packing.unpack_scales(m, entries, out, cols),
  )


# ---- there and back --------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), _CASES, ids=str)
def test_unpacking_undoes_packing(name, shape):
  f = FORMATS[name]
  out, cols, num_ctas = shape
  m = _matmul(f, *shape)
  stored = _random(f, out, cols)
  packed, entries = _pack(m, *stored)
  chunks = (num_ctas, m.run_chunks)
  assert packed.shape == (*chunks, f.chunk_rows(m.tiles), 64)
  assert packed.dtype == jnp.bfloat16
  assert entries.shape == (*chunks, f.scale_rows(m.tiles), 32)
  assert entries.dtype == jnp.int32
  codes, scales, beside = _unpack(m, packed, entries, out, cols)
  _assert_same_bits(codes, stored[0])
  _assert_same_bits(scales, stored[1])
  assert (beside is None) == (stored[2] is None)
  if beside is not None:
    _assert_same_bits(beside, stored[2])


@pytest.mark.parametrize("name", ["int4_g32_zero", "int8"])
def test_axes_in_front_are_kept(name):
  f = FORMATS[name]
  m = _matmul(f, 24, 1152, 2)
  stored = _random(f, 24, 1152, lead=(2,))
  packed, entries = _pack(m, *stored)
  for layer in range(2):
    own = _pack(m, *(x if x is None else x[layer] for x in stored))
    _assert_same_bits(packed[layer], own[0])
    _assert_same_bits(entries[layer], own[1])
  codes, scales, beside = _unpack(m, packed, entries, 24, 1152)
  _assert_same_bits(codes, stored[0])
  _assert_same_bits(scales, stored[1])
  if beside is not None:
    _assert_same_bits(beside, stored[2])


# ---- what chunks mean ------------------------------------------------------


def _dequantized(f, codes, scales, beside):
  """Returns the weights `[out, in]` float32, by `ffjax`."""
  symmetric = f.beside is None
  format = quantized.Format("test", f.bits, f.is_float, f.group, symmetric)
  matrix = quantized.QuantizedMatrix(
    codes=codes,
    scales=scales,
    zeros=beside if f.beside == "zero" else None,
    minimums=beside if f.beside == "minimum" else None,
    columns=None,
    format=format,
  )
  return np.asarray(quantized.dequantize(matrix))


@pytest.mark.parametrize(("name", "shape"), _CASES, ids=str)
def test_values_of_all_chunks_are_the_matrix(name, shape):
  f = FORMATS[name]
  out, cols, num_ctas = shape
  m = _matmul(f, *shape)
  stored = _random(f, out, cols, any_bits=False)
  packed, entries = _pack(m, *stored)
  num_chunks = m.num_units * m.chunks_per_unit
  chunk_values = functools.partial(code_packing.chunk_values, f, m.tiles)
  values = jax.jit(jax.vmap(chunk_values))(
    packed.reshape(-1, *packed.shape[2:])[:num_chunks],
    entries.reshape(-1, *entries.shape[2:])[:num_chunks],
  )
  # Unit, chunk, row, segment, column of it.
  parts = np.asarray(values).reshape(
    m.num_units, m.chunks_per_unit, UNIT_ROWS, SEGMENTS, m.tiles * 128
  )
  matrix = parts.transpose(0, 2, 3, 1, 4).reshape(m.rows, m.cols)
  expected = _dequantized(f, *stored)
  # A compiler may round a product and a sum once or twice.
  slack = 2.0**-22 if f.beside == "minimum" else 0
  np.testing.assert_allclose(matrix[:out, :cols], expected, slack, slack)
  # What is padded weighs nothing, whatever the activations.
  assert not matrix[out:].any()
  assert not matrix[:, cols:].any()


# ---- where a thread finds its codes ----------------------------------------


def _stored_at(m, codes, row, column):
  """Returns a code of a matrix `[out, bytes]` as the kernel wants it."""
  if m.format.bits == 4:
    return int(codes[row, column // 2]) >> 4 * (column % 2) & 15
  # Integers are counted from -128.
  return int(codes[row, column]) ^ (0 if m.format.is_float else 0x80)


def _thread_columns(segment, part, block):
  """Returns the 8 columns of a segment that a thread has in a block of 32.

  A block is the i-th 32 columns in the order in which the segment takes them.
  """
  tile, half = divmod(block, 2)
  if segment % 2:
    half = 1 - half
  first = 64 * tile + 32 * half + 8 * part
  return range(first, first + 8)


def _thread_bytes(m, codes, unit, chunk, warp, lane, piece):
  """Returns the 16 bytes of a thread, worked out code by code.

  A step of 16 columns takes 4 of each thread's 8. `mma.sync` reads them as four
  registers, each of two neighbours: the upper row's and the lower row's first
  two, then both rows' others.
  """
  f = m.format
  segment, part = divmod(lane, 4)
  columns_of_segment = m.cols // SEGMENTS
  first = segment * columns_of_segment + chunk * m.tiles * 128
  row_of = [unit * UNIT_ROWS + 2 * warp + lower for lower in range(2)]

  def code(lower, column):
    return _stored_at(m, codes, row_of[lower], first + column)

  found = bytearray()
  blocks = 128 // f.bits // 2 // 8
  for i in range(blocks):
    columns = _thread_columns(segment, part, blocks * piece + i)
    for step in range(2):
      four = columns[4 * step : 4 * step + 4]
      registers = [
        [code(lower, four[2 * pair + n]) for n in range(2)]
        for pair in range(2)
        for lower in range(2)
      ]
      word = 0
      if f.bits == 4:
        # A register takes the i-th 4 bits of each half of a word.
        for j, (low, high) in enumerate(registers):
          word |= low << 4 * j | high << 16 + 4 * j
        found += word.to_bytes(4, "little")
      else:
        # Two registers of a word: its even bytes, and its odd ones.
        for pair in range(2):
          word = 0
          for j, (low, high) in enumerate(registers[2 * pair : 2 * pair + 2]):
            word |= low << 8 * j | high << 16 + 8 * j
          found += word.to_bytes(4, "little")
  return bytes(found)


@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_zero", "int8", "fp8"])
@pytest.mark.parametrize("shape", [(16, 2048, 1), (16, 5120, 1)], ids=str)
def test_a_threads_bytes_are_what_it_multiplies(name, shape):
  f = FORMATS[name]
  out, cols, num_ctas = shape
  m = _matmul(f, *shape)
  stored = _random(f, out, cols)
  packed, _ = _pack(m, *stored)
  chunks = np.asarray(packed).view(np.uint8)[0]
  num_pieces = m.tiles * 128 // f.piece_columns
  for unit, chunk in [(0, 0), (1, m.chunks_per_unit - 1)]:
    ring = chunks[unit * m.chunks_per_unit + chunk]  # Rows of 128 bytes.
    assert ring.size == num_pieces * 128 * 16
    for piece in range(num_pieces):
      for thread in (0, 1, 5, 30, 37, 68, 90, 127):
        # As memory has it before it is swizzled on its way to shared memory,
        # where a thread reads 16 bytes at its own index.
        row, column = divmod(piece * 128 + thread, 8)
        at = (column ^ row % 8) * 16
        expected = _thread_bytes(
          m, stored[0], unit, chunk, thread // 32, thread % 32, piece
        )
        assert ring[row, at : at + 16].tobytes() == expected, (piece, thread)


def test_swizzle_is_what_the_ring_has():
  # Of a matrix of zeros but for some codes, only one thread's bytes differ.
  f = FORMATS["int4_g128"]
  m = _matmul(f, 8, 1024, 1)
  codes = np.zeros((8, 512), np.uint8)
  # Warp 0, upper row, segment 3, columns 8 to 15 of it: of an odd segment, the
  # first 32 of a tile come second, and so in the thread's last 8 bytes.
  codes[0, (3 * 128 + 8) // 2 : (3 * 128 + 16) // 2] = 0xFF
  packed, _ = _pack(m, codes, *_random(f, 8, 1024)[1:])
  ring = np.asarray(packed).view(np.uint8)[0, 0]
  thread = 3 * 4 + 1
  row, column = divmod(thread, 8)
  found = np.argwhere(ring)
  assert set(found[:, 0]) == {row}
  begin = (column ^ row % 8) * 16
  assert set(found[:, 1]) <= set(range(begin + 8, begin + 16))


# ---- where it finds their scales -------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_beside_their_rows(name):
  f = FORMATS[name]
  out, cols = 16, 5120
  m = _matmul(f, out, cols, 1)
  codes, scales, beside = _random(f, out, cols)
  _, entries = _pack(m, codes, scales, beside)
  spans = f.num_spans(m.tiles)
  kind = np.uint16 if f.entry_bytes == 2 else np.uint32
  found = np.asarray(entries)[0].view(kind).reshape(-1, 64, spans)
  scale_bits = scales.view(f"u{scales.dtype.itemsize}")
  span = f.span(m.tiles)
  for unit, chunk in [(0, 0), (1, m.chunks_per_unit - 1)]:
    own = found[unit * m.chunks_per_unit + chunk]
    for row_of_operand in range(64):
      row, segment = divmod(row_of_operand, SEGMENTS)
      row += unit * UNIT_ROWS
      for index in range(spans):
        # Spans of 32 columns are in the order in which the segment takes them.
        i = index
        if span == 32 and segment % 2:
          i ^= 1
        column = segment * (cols // SEGMENTS) + chunk * m.tiles * 128 + i * span
        group = column // f.group if f.group else 0
        expected = int(scale_bits[row, group])
        if f.beside == "minimum":
          expected |= int(beside.view(np.uint16)[row, group]) << 16
        elif f.beside == "zero":
          # bfloat16 128 + zero, whose last bits are the zero's.
          zero = np.float32(128 + int(beside[row, group]))
          expected |= int(zero.astype(jnp.bfloat16).view(np.uint16)) << 16
        assert int(own[row_of_operand, index]) == expected


def test_every_format_of_quantised_models_is_here():
  known = {(f.bits, f.is_float, f.group, f.beside) for f in FORMATS.values()}
  for f in quantized.FORMATS.values():
    for beside in (None,) if f.symmetric else ("zero", "minimum"):
      assert (f.bits, f.is_float, f.group_size, beside) in known
