"""What each thread of a program writes, and that all of them write it once.

The interpreter runs programs whole. Here their PTX is emitted thread by thread,
with numbers for registers, and read: which stores, to where.
"""

import re
from unittest import mock

import numpy as np
import pytest

from pallas_kernels import mosaic

if mosaic.missing():
  pytest.skip(mosaic.missing(), allow_module_level=True)

from pallas_kernels import embedding, threads, words
from pallas_kernels.geometry import SEGMENTS


class _Begin:
  """Where an array begins, counted in bytes from there."""

  def plus(self, index, item_bytes):
    return int(index) * item_bytes


def _stores(emit, what, num_threads, *args):
  """Returns the bytes to which threads store 16 each, in any order."""
  found = []
  for t in range(num_threads):
    emitted = []

    def asm(code, *operands, emitted=emitted):
      emitted.append((code, operands))

    def index(n, t=t):
      assert n == num_threads
      return t

    with (
      mock.patch.object(mosaic, "asm", asm),
      mock.patch.object(mosaic, "thread_index", index),
    ):
      emit(what, *args)
    for code, operands in emitted:
      guards = dict(re.findall(r"setp\.ne\.b32 (in\d+), \$(\d+), 0", code))
      for guard, at in re.findall(
        r"(?:@(in\d+) )?st\.shared\.v4\.b32 \[\$(\d+)\]", code
      ):
        if not guard or operands[int(guards[guard])]:
          found.append(operands[int(at)])
  return found


# Rows of 128, 256 and 384 pieces of 16 bytes: fewer than threads, as many, more.
@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("unit_chunks", [1, 2, 3])
def test_a_token_is_looked_up_by_all_threads_once(unit_chunks, num_threads):
  what = embedding.Embed(unit_chunks, 0, num_threads)
  begin = _Begin()
  stored = _stores(
    embedding._emit_embed, what, num_threads, *[begin] * 5, *[0] * 5
  )
  _, expected = what.piece(np.arange(what.num_pieces))
  assert sorted(stored) == sorted(expected.tolist())


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("num_threads", [128, 256])
@pytest.mark.parametrize("columns", [128, 256, 384])
def test_words_are_received_by_all_threads_once(columns, num_threads, gained):
  sequence_bytes = SEGMENTS * columns * 2
  what = words.Receive(
    num_sequences=2,
    num_rows=SEGMENTS,
    row_words=columns // 4,
    source_stride=columns // 4,
    sequence_words=SEGMENTS * columns // 4,
    masked=False,
    target_stride=None,
    sequence_bytes=sequence_bytes,
    payload_bytes=8,
    gained=gained,
    num_threads=num_threads,
  )
  begins = [_Begin()] * (4 if gained else 2)
  stored = _stores(words._emit_receive, (what,), num_threads, *begins, *[0] * 7)
  expected = np.arange(0, 2 * sequence_bytes, threads.PIECE_BYTES)
  assert sorted(stored) == expected.tolist()


def test_threads_without_anything_to_do_must_be_seen_to():
  with pytest.raises(ValueError, match="384 is not a multiple of 256"):
    threads.turns(384, 256)
