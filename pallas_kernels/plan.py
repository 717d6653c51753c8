"""What is fixed before a step: sizes, schedule, and the arrays it takes.

The kernel and the emulator are both built from a `Plan` and take the operands
that `operand_shapes` lists. There is no Pallas in here, so that the emulator
runs wherever JAX does.

Axis letters: L layers, B batch, D width, N query heads, K KV heads, H head
size, F MLP width, V vocabulary, S cache slots, P CTAs.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.geometry import (
  CHUNK_BYTES,
  CHUNK_COLS,
  CHUNK_ROWS,
  HALF,
  TILE,
  Geometry,
  round_up,
)
from pallas_kernels.schedule import (
  Matmul,
  Schedule,
  make_schedule,
  max_splits,
)

# Phases of a step, in their order: each has a counter of those who published
# their results. EMBED comes once, before the layers, and LM_HEAD once, after.
NUM_PHASES = 7
EMBED, QKV, ATTENTION, O_PROJ, GATE_UP, DOWN, LM_HEAD = range(NUM_PHASES)

# Shared memory that a CTA may use on Hopper, less the ring's barriers.
SMEM_BYTES = 232448 - 256
# Each array there begins on a multiple of this.
_SMEM_ALIGNMENT_BYTES = 1024
# What sums and maxima over warps go through.
_REDUCTION_BYTES = 2048
_MIN_X_COLS = 512
# Score of a key that is not to be seen: its weight is 0.
MASKED = -1e30
# Copies of each CTA's best logit: the smallest bulk store is 16 bytes.
CANDIDATE = 4


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is fixed when the kernel is built.

  Attributes:
    geometry: the model.
    schedule: who multiplies what.
    batch: B.
    capacity: S.
    num_ctas: P.
  """

  geometry: Geometry
  schedule: Schedule
  batch: int
  capacity: int
  num_ctas: int

  @property
  def splits(self) -> int:
    """Into how many parts the keys of a KV head may be cut."""
    return max_splits(self.geometry, self.batch, self.num_ctas)

  @property
  def num_items(self) -> int:
    """Parts of attention that may be given out."""
    g = self.geometry
    return self.batch * g.num_key_value_heads * self.splits

  @property
  def x_cols(self) -> int:
    """Columns of activations that shared memory holds."""
    return max(_MIN_X_COLS, self.geometry.padded_hidden_size)

  def block_chunks(self, matmul: Matmul) -> int:
    """Chunks for which activations that are not normed are filled in at once.

    A run is cut evenly into as few blocks as shared memory allows.
    """
    most = self.x_cols // CHUNK_COLS
    longest = min(matmul.run, matmul.chunks_per_tile)
    num_blocks = -(-longest // most)
    return -(-longest // num_blocks)

  @property
  def candidate_cols(self) -> int:
    """Columns of the array in which the CTAs' best logits meet."""
    return round_up(self.num_ctas * CANDIDATE, 128)

  @property
  def fixed_smem_bytes(self) -> int:
    """Shared memory beside the ring, as Mosaic lays it out."""
    sizes_bytes = {
      name: math.prod(shape) * jnp.dtype(dtype).itemsize
      for name, (shape, dtype) in scratch_shapes(self).items()
    }
    # These two share their place.
    row_bytes, state_bytes = sizes_bytes.pop("row"), sizes_bytes.pop("state")
    sizes_bytes["row_or_state"] = max(row_bytes, state_bytes)
    aligned_bytes = [
      round_up(n, _SMEM_ALIGNMENT_BYTES) for n in sizes_bytes.values()
    ]
    return sum(aligned_bytes) + _REDUCTION_BYTES

  @property
  def num_slots(self) -> int:
    """Slots of the ring: what shared memory leaves."""
    return (SMEM_BYTES - self.fixed_smem_bytes) // CHUNK_BYTES


def make_plan(
  geometry: Geometry, batch: int, capacity: int, num_ctas: int
) -> Plan:
  """Plans the step of a model for a batch, a capacity and a number of CTAs."""
  return Plan(
    geometry, make_schedule(geometry, num_ctas), batch, capacity, num_ctas
  )


def operand_shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Returns shape and dtype of each operand, in the order of the arguments.

  Arrays per sequence have 8 rows; those beyond B have no meaning. `norms` holds
  each layer's `input_layernorm` and `post_attention_layernorm`, then the final
  norm, padded with zeros. `positions` of inactive sequences are 0.
  """
  g, s = plan.geometry, plan.schedule

  def packed(m: Matmul, *lead: int) -> tuple[tuple[int, ...], Any]:
    shape = (*lead, plan.num_ctas, m.run, CHUNK_ROWS, CHUNK_COLS // 2)
    return shape, jnp.bfloat16

  n = g.num_hidden_layers
  cache = (
    (n, plan.batch, g.num_key_value_heads, plan.capacity, g.head_dim),
    jnp.bfloat16,
  )
  per_head = ((8, g.head_dim // 2), jnp.float32)
  return dict(
    table=((plan.num_ctas, 5, 3), jnp.int32),
    num_layers=((1,), jnp.int32),
    token_ids=((8,), jnp.int32),
    positions=((8,), jnp.int32),
    active=((8,), jnp.int32),
    cos=per_head,
    sin=per_head,
    norms=((2 * n + 1, g.padded_hidden_size), jnp.float32),
    w_qkv=packed(s.qkv, n),
    w_o=packed(s.o, n),
    w_gate_up=packed(s.gate_up, n),
    w_down=packed(s.down, n),
    w_lm_head=packed(s.lm_head),
    embedding=packed(s.lm_head),
    k_cache=cache,
    v_cache=cache,
  )


def scratch_shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Returns shape and dtype of each array in shared memory but the ring."""
  g = plan.geometry
  parts = g.head_dim // TILE
  f32, bf16 = jnp.float32, jnp.bfloat16
  return dict(
    x=((8, plan.x_cols), bf16),
    q=((8, g.head_dim), bf16),
    p=((8, TILE), bf16),
    sums=((8, TILE), f32),
    staging=((2, 8, TILE), f32),
    halves=((2, 8, HALF), f32),
    narrow_half=((1, 8, HALF), bf16),
    narrow=((parts, 8, TILE), bf16),
    row=((plan.x_cols,), bf16),
    state=((parts + 2, 8, TILE), f32),
    new=((2, 8, g.head_dim), bf16),
    best=((8, TILE), f32),
    best_index=((8, TILE), jnp.int32),
    embedded=((CHUNK_COLS,), bf16),
    embedded_f32=((CHUNK_COLS,), f32),
  )
