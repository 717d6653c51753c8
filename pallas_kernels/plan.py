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

from pallas_kernels import tuning
from pallas_kernels.formats import BF16, ROW_BYTES, Format
from pallas_kernels.geometry import (
  CHUNK_BYTES,
  CHUNK_COLS,
  CHUNK_WIDTH,
  MAX_BATCH,
  SEGMENTS,
  TILE,
  UNIT_ROWS,
  Geometry,
  UnsupportedError,
  round_up,
)
from pallas_kernels.parts import Part
from pallas_kernels.schedule import (
  Matmul,
  Schedule,
  make_schedule,
  max_splits,
)
from pallas_kernels.tuning import TILES_AT_ONCE, X_BYTES

# Phases of a layer in their order; LM_HEAD comes once, after the layers.
NUM_PHASES = 6
QKV, ATTENTION, O_PROJ, GATE_UP, DOWN, LM_HEAD = range(NUM_PHASES)
PHASE_OF = dict(qkv=QKV, o=O_PROJ, gate_up=GATE_UP, down=DOWN, lm_head=LM_HEAD)

# Operands that are `jax.Ref`s.
CHANGED = ("emitted", "words", "k_cache", "v_cache")

# Units whose results are finished together.
GROUP_UNITS = 8
GROUP_ROWS = GROUP_UNITS * UNIT_ROWS

# Warps of a warpgroup.
WARPS = 4

# Shared memory that a CTA may use on Hopper, less the ring's barriers.
SMEM_BYTES = 232448 - 512
# Each array there begins on a multiple of this.
_SMEM_ALIGNMENT_BYTES = 1024
# Arrays in shared memory that take the place of x, when x is not in use.
INSTEAD_OF_X = ("p", "tops", "attended", "chosen")
# Keys and values of wide heads take two slots, and one more is under way.
MIN_SLOTS = 3
# Score of a key that is not to be seen: its weight is 0.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is fixed when the kernel is built.

  Attributes:
    geometry: the model.
    schedule: who multiplies what.
    batch: B.
    capacity: S.
    num_ctas: P.
    in_flight: chunks that a CTA has asked memory for at most, see `tuning`.
    head_in_flight: likewise of the LM head, once it is being multiplied.
    compute_wgs: warpgroups of a CTA that compute.
    most_slots: of the ring.
  """

  geometry: Geometry
  schedule: Schedule
  batch: int
  capacity: int
  num_ctas: int
  in_flight: int
  head_in_flight: int
  compute_wgs: int
  most_slots: int = tuning.MOST_SLOTS

  @property
  def num_warps(self) -> int:
    """Warps of a CTA that compute."""
    return WARPS * self.compute_wgs

  @property
  def splits(self) -> int:
    """Into how many parts the keys of a KV head may be cut."""
    most = -(-self.capacity // (TILE * TILES_AT_ONCE))
    return min(most, max_splits(self.geometry, self.batch, self.num_ctas))

  @property
  def num_items(self) -> int:
    """Parts of attention that may be given out."""
    g = self.geometry
    return self.batch * g.num_key_value_heads * self.splits

  @property
  def tiles_at_once(self) -> int:
    """Tiles of keys that are waited for together; one slot stays free."""
    slots_per_tile = self.geometry.head_dim // TILE
    return max(1, min(TILES_AT_ONCE, (self.num_slots - 1) // slots_per_tile))

  @property
  def part(self) -> Part:
    """How CTAs send what they make of a part of a head's keys."""
    return Part(self.geometry.head_dim, self.geometry.group, self.splits)

  @property
  def embedding(self) -> Matmul:
    """How the embedding is laid out: as an LM head in bfloat16.

    It is looked up and never multiplied, so that few bits would save nothing.
    """
    return dataclasses.replace(
      self.schedule.lm_head, name="embedding", format=BF16
    )

  @property
  def x_tiles(self) -> int:
    """Of how many times 1,024 columns shared memory holds the activations.

    What goes through a norm is there whole, and all of what meets one chunk.
    """
    matmuls = self.schedule.matmuls
    normed = self.schedule.qkv.cols // CHUNK_WIDTH
    longest = max(m.cols for m in matmuls) // CHUNK_WIDTH
    widest = max(m.tiles for m in matmuls)
    tile_bytes = self.batch * CHUNK_WIDTH * 2
    return max(normed, widest, min(longest, X_BYTES // tile_bytes))

  def num_blocks(self, matmul: Matmul) -> int:
    """Into how many blocks a unit's chunks are cut, evenly."""
    return -(-matmul.chunks_per_unit // (self.x_tiles // matmul.tiles))

  def block_chunks(self, matmul: Matmul) -> int:
    """Chunks of a block; the last one may be shorter."""
    return -(-matmul.chunks_per_unit // self.num_blocks(matmul))

  @property
  def scale_rows(self) -> int:
    """Rows of 32 int32 beside a slot, for scales."""
    matmuls = self.schedule.matmuls
    packed = [m for m in matmuls if m.format.is_packed]
    return max((m.format.scale_rows(m.tiles) for m in packed), default=0)

  @property
  def exchanges(self) -> dict[str, tuple[int, int]]:
    """First word and words per row of what CTAs send each other.

    Rows are sequences; of `parts`, items of attention; of `candidates`, logits
    and then indices of each sequence. A word holds four bfloat16 or one float32,
    see `words`; words come in pairs.
    """
    g = self.geometry
    words = dict(
      qkv=(self.batch, g.num_qkv_heads * g.head_dim // 4),
      attended=(self.batch, g.attention_size // 4),
      middle=(self.batch, g.hidden_rows // 4),
      hidden=(self.batch, round_up(g.gate_up_rows // 8, 2)),
      output=(self.batch, g.hidden_rows // 4),
      final=(self.batch, g.hidden_rows // 4),
      parts=(
        self.num_items if self.splits > 1 else 0,
        self.part.num_words,
      ),
      candidates=(2 * self.batch, self.candidate_cols),
    )
    first, found = 0, {}
    for name, (rows, row_words) in words.items():
      found[name] = (first, row_words)
      first += rows * row_words
    return {**found, "end": (first, 0)}

  @property
  def num_words(self) -> int:
    """Words in device memory."""
    return self.exchanges["end"][0]

  @property
  def candidate_cols(self) -> int:
    """One for each CTA, rounded up."""
    return round_up(self.num_ctas, 128)

  @property
  def fixed_smem_bytes(self) -> int:
    """Shared memory beside the ring, as Mosaic lays it out."""
    aligned_bytes = {
      name: round_up(
        math.prod(shape) * jnp.dtype(dtype).itemsize, _SMEM_ALIGNMENT_BYTES
      )
      for name, (shape, dtype) in scratch_shapes(self).items()
    }
    instead_bytes = sum(aligned_bytes.pop(name) for name in INSTEAD_OF_X)
    aligned_bytes["x"] = max(aligned_bytes["x"], instead_bytes)
    return sum(aligned_bytes.values())

  @property
  def num_slots(self) -> int:
    """Slots of the ring: what shared memory leaves, at most `most_slots`."""
    free_bytes = SMEM_BYTES - self.fixed_smem_bytes
    if self.scale_rows:
      free_bytes -= _SMEM_ALIGNMENT_BYTES
    slot_bytes = CHUNK_BYTES + ROW_BYTES * self.scale_rows
    return min(self.most_slots, free_bytes // slot_bytes)


def make_plan(
  geometry: Geometry,
  batch: int,
  capacity: int,
  num_ctas: int,
  device_kind: str | None = None,
  layer_format: Format = BF16,
  head_format: Format = BF16,
  compute_wgs: int | None = None,
) -> Plan:
  """Plans the step of a model for a batch, a capacity and a number of CTAs.

  Args:
    geometry: the model.
    batch: B.
    capacity: S.
    num_ctas: P.
    device_kind: what it will run on, for `tuning`; None if unknown.
    layer_format: how the layers' matrices are stored.
    head_format: how the LM head is; the embedding's rows are bfloat16.
    compute_wgs: warpgroups of a CTA that compute, 1 or 2; None for what `tuning`
      has.

  Raises:
    UnsupportedError: if shared memory leaves too little for the stream.
  """
  schedule = make_schedule(geometry, num_ctas, layer_format, head_format)
  in_flight = tuning.in_flight(device_kind, geometry.hidden_size)
  if compute_wgs is None:
    compute_wgs = tuning.compute_wgs(
      device_kind, layer_format.bits, geometry.padded_hidden_size, batch
    )
  plan = Plan(
    *(geometry, schedule, batch, capacity, num_ctas),
    *(in_flight, tuning.head_in_flight(device_kind), compute_wgs),
  )
  if plan.num_slots < MIN_SLOTS:
    raise UnsupportedError(
      f"hidden_size={geometry.hidden_size} with batch {batch} on {num_ctas} CTAs"
      f" (their shared memory leaves {max(0, plan.num_slots)} slots for weights"
      f" and it takes at least {MIN_SLOTS})"
    )
  return plan


def operand_shapes(
  plan: Plan, max_steps: int = 1
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Returns shape and dtype of each operand, in the order of the arguments.

  `progress` says where the sequences stand, see `steps`. `angles` has for each
  step the cosines and the sines of the positions that active sequences then
  have; of 8 sequences, those beyond B without a meaning. `norms` holds each
  layer's `input_layernorm` and `post_attention_layernorm`, then the final norm,
  padded with zeros.

  The kernel changes those of `CHANGED` in place: to the caches, it adds a row;
  to the tokens `emitted`, a row per step; `words` are zero before the first
  step, and for the next one what the last one has left.

  Args:
    plan: sizes and schedule.
    max_steps: T, how many steps may follow each other.
  """
  g, s = plan.geometry, plan.schedule
  n = g.num_hidden_layers

  def packed(m: Matmul, *lead: int) -> tuple[tuple[int, ...], Any]:
    rows = m.format.chunk_rows(m.tiles)
    shape = (*lead, plan.num_ctas, m.run_chunks, rows, ROW_BYTES // 2)
    return shape, jnp.bfloat16

  scales = {
    f"s_{m.name}": (
      (
        *(() if m is s.lm_head else (n,)),
        *(plan.num_ctas, m.run_chunks),
        *(m.format.scale_rows(m.tiles), ROW_BYTES // 4),
      ),
      jnp.int32,
    )
    for m in s.matmuls
    if m.format.is_packed
  }

  cache = (
    (n, plan.batch, g.num_key_value_heads, plan.capacity, g.head_dim),
    jnp.bfloat16,
  )
  return dict(
    table=((plan.num_ctas, 5, 2), jnp.int32),
    num_layers=((1,), jnp.int32),
    progress=((4, MAX_BATCH), jnp.int32),
    angles=((max_steps, 2, MAX_BATCH, g.head_dim // 2), jnp.float32),
    norms=(
      (2 * n + 1, SEGMENTS, g.padded_hidden_size // SEGMENTS),
      jnp.float32,
    ),
    w_qkv=packed(s.qkv, n),
    w_o=packed(s.o, n),
    w_gate_up=packed(s.gate_up, n),
    w_down=packed(s.down, n),
    **scales,
    w_lm_head=packed(s.lm_head),
    embedding=packed(plan.embedding),
    emitted=((max_steps, MAX_BATCH), jnp.int32),
    words=((plan.num_words, 2), jnp.int32),
    k_cache=cache,
    v_cache=cache,
  )


def scratch_shapes(plan: Plan) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Returns shape and dtype of each array in shared memory but the ring."""
  g, b = plan.geometry, plan.batch
  f32, bf16 = jnp.float32, jnp.bfloat16
  own_rows = round_up(plan.schedule.o.run * UNIT_ROWS, GROUP_ROWS)
  # Pairs of a group may begin anywhere in a head and end in the next.
  angles = g.head_dim // 2 + GROUP_ROWS // 2
  return dict(
    x=((b * SEGMENTS, plan.x_tiles * CHUNK_COLS), bf16),
    q=((8, g.head_dim), bf16),
    p=((8, TILES_AT_ONCE * TILE), bf16),
    sums=((b, GROUP_ROWS), f32),
    results=((b, GROUP_ROWS), bf16),
    results_f32=((b, GROUP_ROWS), f32),
    residual=((b, own_rows), f32),
    squares=((b * plan.num_warps,), f32),
    cos_sin=((2, b, angles), f32),
    tops=((WARPS * 8,), f32),
    attended=((8, g.head_dim), bf16),
    new=((2, g.head_dim), bf16),
    best=((2 * b, GROUP_ROWS), f32),
    chosen=((b,), jnp.int32),
  )
