"""The sizes of a model as the kernel sees them, and what it can take.

Axis letters: L layers, D width, N query heads, K KV heads, G = N / K, H head
size, F MLP width, V vocabulary, B batch, S cache slots.
"""

import dataclasses

# A unit is 8 rows of a matrix, whole: what one CTA multiplies and sums up alone.
# Its columns are cut into 8 segments, and each segment of each row is a row of
# the operand that `wgmma` takes with 64 rows. A segment meets its own part of
# the activations: the other operand has a column for each segment, and of the
# products only those of equal segments count.
UNIT_ROWS = 8
SEGMENTS = 8
# A chunk is what the weight stream is made of: 128 columns of each segment of a
# unit, as two halves of 64, one below the other, so that each half is a whole
# 128-byte swizzle atom wide.
CHUNK_COLS = 128
CHUNK_ROWS = 2 * UNIT_ROWS * SEGMENTS
CHUNK_BYTES = CHUNK_ROWS * CHUNK_COLS
# Columns of the matrix in a chunk, over all segments.
CHUNK_WIDTH = SEGMENTS * CHUNK_COLS
# Keys of the cache are taken 64 at a time; it is also `wgmma`'s M, and half a
# chunk's columns.
TILE = 64
MAX_BATCH = 8
MAX_GROUP = 8
# Shared memory holds the activations before a norm, of every sequence.
MAX_HIDDEN_SIZE = 8192
# Token ids are compared as float32.
MAX_VOCAB_SIZE = 2**24


class UnsupportedError(ValueError):
  """A model or request that the fused kernel does not take, and why."""


def round_up(n: int, multiple: int) -> int:
  """Returns the smallest multiple of `multiple` that is at least `n`."""
  return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Sizes and constants of a Llama; padded sizes are derived.

  Attributes:
    hidden_size: D.
    intermediate_size: F.
    num_hidden_layers: L.
    num_attention_heads: N.
    num_key_value_heads: K.
    head_dim: H.
    vocab_size: V.
    rms_norm_eps: added to the mean square.
    tie_word_embeddings: whether the LM head is the embedding.
  """

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  vocab_size: int
  rms_norm_eps: float
  tie_word_embeddings: bool

  @property
  def group(self) -> int:
    """G, query heads per KV head."""
    return self.num_attention_heads // self.num_key_value_heads

  @property
  def num_qkv_heads(self) -> int:
    """Heads in a row of the joint projection: N + 2 K."""
    return self.num_attention_heads + 2 * self.num_key_value_heads

  @property
  def attention_size(self) -> int:
    """N H, what the heads put out together."""
    return self.num_attention_heads * self.head_dim

  @property
  def hidden_rows(self) -> int:
    """D, rounded up to whole units."""
    return round_up(self.hidden_size, UNIT_ROWS)

  @property
  def gate_up_rows(self) -> int:
    """Rows of gate and up together, rounded up to whole units."""
    return round_up(2 * self.intermediate_size, UNIT_ROWS)

  @property
  def vocab_rows(self) -> int:
    """V, rounded up to whole units."""
    return round_up(self.vocab_size, UNIT_ROWS)

  @property
  def padded_hidden_size(self) -> int:
    """D, rounded up to whole chunks."""
    return round_up(self.hidden_size, CHUNK_WIDTH)


def check(geometry: Geometry, batch: int) -> None:
  """Raises for sizes that the kernel does not take; all others it does.

  Raises:
    UnsupportedError: naming the size and the limit.
  """
  g = geometry
  if g.head_dim not in (64, 128):
    raise UnsupportedError(f"head_dim={g.head_dim} (it takes 64 and 128)")
  if g.num_attention_heads % g.num_key_value_heads:
    raise UnsupportedError(
      f"{g.num_attention_heads} query heads for {g.num_key_value_heads} KV heads"
    )
  if g.group > MAX_GROUP:
    raise UnsupportedError(
      f"{g.group} query heads per KV head (it takes at most {MAX_GROUP})"
    )
  if g.hidden_size > MAX_HIDDEN_SIZE:
    raise UnsupportedError(
      f"hidden_size={g.hidden_size} (it takes at most {MAX_HIDDEN_SIZE})"
    )
  if g.vocab_size > MAX_VOCAB_SIZE:
    raise UnsupportedError(
      f"vocab_size={g.vocab_size} (it takes at most {MAX_VOCAB_SIZE})"
    )
  if not 1 <= batch <= MAX_BATCH:
    raise UnsupportedError(f"batch {batch} (it takes 1 to {MAX_BATCH})")
