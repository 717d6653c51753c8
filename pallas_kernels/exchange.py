"""How CTAs hand results to each other, through device memory.

A result is written by a bulk store, the store is waited for, and a counter
moves; readers wait for the counter and read with ordinary loads. That this is
ordered, by the PTX memory model (PTX ISA, "Memory Consistency Model"): waiting
for the bulk group makes its writes visible to the thread that issued it; a
barrier of the warpgroup orders that thread before the one that adds to the
counter with `.release.gpu`, which is cumulative; the reader's load that sees
the sum, then `fence.acquire.gpu`, synchronises with it; another barrier orders
the other threads' loads after that.

Buffers are used again in every layer. Whoever writes one has waited, directly
or by way of others, for all who read it: a phase is published only by CTAs that
have read what they needed for it, and parts are handed on before.
"""

from collections.abc import Sequence

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.cta import CtaBase
from pallas_kernels.layouts import Index, Ref


class Exchange(CtaBase):
  """Counters and stores."""

  def wait_published(self, phase: Index, count: Index) -> None:
    """Waits until `count` publications of a phase have been made."""
    # All CTAs that publish this phase have stored their results.
    plgpu.semaphore_wait(
      self.published.at[phase], count, decrement=False, memory_scope="gpu"
    )

  def signal(self, semaphore: Ref) -> None:
    """Adds 1 for all to see, after everything that this CTA has stored.

    The wait makes the stores visible to the thread that issued them, and no
    more than that: without the release, a counter was seen to move before the
    data (bench/LOG.md).
    """
    plgpu.wait_smem_to_gmem(0)
    plgpu.semaphore_signal(semaphore, memory_scope="gpu")

  def publish(self, phase: int) -> None:
    """Says to all that this CTA's results of a phase are there."""
    self.signal(self.published.at[phase])

  def join(self, phase: int, owner: Index) -> None:
    """Says to a tile's owner that this CTA's part of it is there."""
    self.signal(self.joined.at[phase * self.plan.num_ctas + owner])

  def wait_joined(self, phase: int, count: Index) -> None:
    """Waits until `count` parts have been handed to this CTA."""
    plgpu.semaphore_wait(
      self.joined.at[phase * self.plan.num_ctas + self.cta],
      count,
      decrement=False,
      memory_scope="gpu",
    )

  def store_tile(self, value: jax.Array, target: Ref) -> None:
    """Stores a `[8, 64]` array to `[B, 64]` in device memory."""
    mosaic.store(self.staging.at[0], value)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      self.staging.at[0, pl.ds(0, self.plan.batch)], target
    )

  def store_halves(
    self, buffer: Ref, values: Sequence[jax.Array], targets: Sequence[Ref]
  ) -> None:
    """Stores `[8, 32]` arrays to `[B, 32]` in device memory."""
    for j, value in enumerate(values):
      mosaic.store(buffer.at[j], value)
    plgpu.commit_smem()
    for j, target in enumerate(targets):
      plgpu.copy_smem_to_gmem(buffer.at[j, pl.ds(0, self.plan.batch)], target)
