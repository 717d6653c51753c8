"""How the attention of one part of a head's keys goes to who merges the parts.

A thread holds of a result of `wgmma`, `[64, 8]`, rows r and r + 8 of columns c
and c + 1. What one thread sends, the thread of the same number takes: the words
are in the threads' order, and none goes through shared memory.
"""

import dataclasses
from typing import Any

from pallas_kernels.geometry import TILE

# Queries of two columns have their values in the same threads.
_PAIR = 2
# Threads of one pair of columns, and values that each has of them.
_THREADS = 32
_VALUES = 4
# Words that a thread has asked for at most, of two registers each.
_MOST_IN_FLIGHT = 40


@dataclasses.dataclass(frozen=True)
class Part:
  """The words of one part: largest scores, sums of weights, weighted values.

  Attributes:
    head_dim: H.
    group: G, queries of the head; in pairs, and the odd one's partner is sent
      along.
    splits: of a head; as many parts but for the first, which is not sent.
  """

  head_dim: int
  group: int
  splits: int

  @property
  def pairs(self) -> int:
    """Pairs of queries."""
    return -(-self.group // _PAIR)

  @property
  def blocks(self) -> int:
    """Results of `wgmma`, of 64 of H each."""
    return self.head_dim // TILE

  @property
  def block_words(self) -> int:
    """Words of a block's weighted values."""
    return self.pairs * _THREADS * _VALUES

  @property
  def num_words(self) -> int:
    """Words of a part."""
    return self.pairs * _VALUES + self.blocks * self.block_words

  @property
  def at_once(self) -> int:
    """Parts of which the words are loaded, and weighed, together."""
    most = _MOST_IN_FLIGHT // (_VALUES * (1 + self.blocks))
    return max(1, min(most, self.splits - 1))

  def most(self, col: Any) -> Any:
    """Returns the word of a query's largest score."""
    return col // _PAIR * _VALUES + col % _PAIR

  def total(self, col: Any) -> Any:
    """Returns the word of the sum of a query's weights."""
    return self.most(col) + _PAIR

  def value(self, block: int, row: Any, col: Any) -> Any:
    """Returns the word of a row of a block, for a query."""
    thread = row // 16 * 8 + row % 8
    within = row % 16 // 8 * _PAIR + col % _PAIR
    first = self.pairs * _VALUES + block * self.block_words
    return first + (col // _PAIR * _THREADS + thread) * _VALUES + within
