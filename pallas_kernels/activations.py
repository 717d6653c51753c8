"""From what CTAs have sent to x, the operand of the products that is not weights.

x is `[8 B, columns]`: row `8 b + s` is segment s of sequence b's activations.
What is normed comes to x multiplied by the norm's weights only. The inverse of
its RMS is a factor of the results, and nobody waits for it before.
"""

from jax import lax

from pallas_kernels import embedding, finishing, words
from pallas_kernels.cta import CtaBase
from pallas_kernels.gains import Gain
from pallas_kernels.geometry import (
  CHUNK_COLS,
  CHUNK_ROWS,
  SEGMENTS,
  UNIT_ROWS,
)
from pallas_kernels.layouts import I32, Index, fori
from pallas_kernels.schedule import Matmul


class Activations(CtaBase):
  """Fills x."""

  @property
  def sequence_bytes(self) -> int:
    """From sequence to sequence in x."""
    return int(self.x.shape[1]) * SEGMENTS * 2

  def receive_x(
    self,
    name: str,
    matmul: Matmul,
    valid: int,
    block: Index,
    stamp: Index,
    norm: Index | None = None,
  ) -> None:
    """Waits for activations and writes a block of their columns to x.

    Commits them: products may follow. The products of what was in x have ended
    and the sums of squares are used since the threads met to send the results.

    Args:
      name: what is sent, see `Plan.exchanges`.
      matmul: what they are multiplied with.
      valid: how many values there are.
      block: which block of each segment.
      stamp: that they bear.
      norm: with which norm's weights they are multiplied, or None.
    """
    plan = self.plan
    first, row_words = plan.exchanges[name]
    segment = matmul.cols // SEGMENTS
    width = plan.block_chunks(matmul) * matmul.tiles * CHUNK_COLS
    at_once = words.sequences_at_once(
      plan.batch, SEGMENTS * width, self.team.num_threads
    )

    def sequences(n: Index) -> None:
      b = n * at_once
      wanted = words.Wanted(
        self.x,
        first + b * row_words,
        row_words=width // 4,
        num_rows=SEGMENTS,
        source_stride=segment // 4,
        column=block * (width // 4),
        offset_bytes=b * self.sequence_bytes,
        valid=None if self._whole(matmul, valid) else valid // 4,
        tiled=True,
        num_sequences=at_once,
        sequence_words=row_words,
        sequence_bytes=self.sequence_bytes,
        gain=None if norm is None else self.gain(norm, b),
      )
      words.receive(self.team, self.words, stamp, wanted)

    fori(0, plan.batch // at_once, sequences)
    self.team.commit()

  def gain(self, norm: Index, b: Index) -> Gain:
    """Returns how activations are normed on their way, from sequence b on."""
    return self.norms, norm, self.squares, b * self.plan.num_warps

  def _whole(self, matmul: Matmul, valid: int) -> bool:
    """Whether neither the columns nor the last block are padded."""
    per_block = self.plan.block_chunks(matmul)
    return valid == matmul.cols and matmul.chunks_per_unit % per_block == 0

  @property
  def norm(self) -> finishing.Norm:
    """What a norm has left to its results."""
    g = self.geometry
    return finishing.Norm(self.plan.num_warps, g.hidden_size, g.rms_norm_eps)

  def embed(self, norm: Index) -> None:
    """Writes the tokens' rows to x, and this CTA's part of the residual.

    Commits them: products may follow.
    """
    table = self.plan.embedding
    per_unit = table.chunks_per_unit
    first, _ = self.runs["o"]
    chunk = CHUNK_ROWS * (CHUNK_COLS // 2)
    at_once = words.sequences_at_once(
      self.plan.batch, table.cols, self.team.num_threads
    )

    def row_of(b: Index) -> Index:
      token = self.token_ids[b]
      unit, row = token // UNIT_ROWS, lax.rem(token, I32(UNIT_ROWS))
      owner, local = unit // table.run, lax.rem(unit, I32(table.run))
      at = (owner * table.run_chunks + local * per_unit) * chunk
      return at + row * (SEGMENTS * CHUNK_COLS // 2)

    def sequences(n: Index) -> None:
      b = n * at_once
      embedding.embed(
        self.team,
        self.embedding,
        [row_of(b + k) for k in range(at_once)],
        self.x,
        self.sequence_bytes,
        self.gain(norm, b),
        self.residual,
        b,
        first * UNIT_ROWS,
        unit_chunks=per_unit,
      )

    fori(0, self.plan.batch // at_once, sequences)
    self.team.commit()
