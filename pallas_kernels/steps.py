"""From step to step: what changes, and how launches follow each other.

Where the sequences stand is an array that every launch reads, `progress`, and
writes anew, `next_progress`. So a step that chooses greedily is one launch of
the kernel, and between two of them there is nothing. A launch with nothing left
to do returns at once: launches come in blocks, and only after a block the host
looks whether any sequence goes on.

`progress` is `[4, 8]` int32, a column per sequence, those beyond B without a
meaning. Its rows are token ids, positions (0 of inactive sequences), whether a
sequence is active, and in the last row the clock: how many steps there were
since `words` were zero, and how many there may be.

There is no Pallas in here: a launch is given as a function.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.geometry import MAX_BATCH
from pallas_kernels.plan import CHANGED, Plan, operand_shapes

# Rows of `progress`.
TOKEN_IDS, POSITIONS, ACTIVE, CLOCK = range(4)

# Launches between two looks, each of which is a wait for the host.
LAUNCHES_PER_LOOK = 32

# Emitted for a sequence that has ended.
NO_TOKEN = -1

Operands = dict[str, jax.Array]
# From all operands to the logits, if any, and the operands that have changed.
Launch = Callable[[Operands], tuple[jax.Array | None, Operands]]


def advance(
  token_id: Any,
  position: Any,
  active: Any,
  chosen: Any,
  capacity: int,
  eos_token_ids: tuple[int, ...],
) -> tuple[Any, Any, Any]:
  """Takes a sequence to its next token; an inactive one stays.

  Args:
    token_id: int32, a scalar as those that follow, or an array of several
      sequences; the newest token, which is now in the cache.
    position: its position.
    active: whether the sequence is active, 1 or 0.
    chosen: the next token, if it is.
    capacity: S, after which a sequence ends: its newest token has no slot.
    eos_token_ids: tokens that end it.

  Returns:
    Token id, position and whether it is active, for the next step.
  """
  goes_on = (active > 0) & (position + 1 < capacity)
  for eos in eos_token_ids:
    goes_on = goes_on & (chosen != eos)
  return (
    jnp.where(active > 0, chosen, token_id),
    jnp.where(goes_on, position + 1, 0),
    goes_on.astype(jnp.int32),
  )


def operands(
  plan: Plan,
  packed: Mapping[str, jax.Array],
  token_ids: jax.Array,
  positions: jax.Array,
  active: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  num_steps: int | jax.Array,
  k_cache: jax.Array,
  v_cache: jax.Array,
) -> Operands:
  """Returns the operands of the first launch.

  Args:
    plan: sizes and schedule.
    packed: `qkv`, `o`, `gate_up`, `down`, `lm_head`, `embedding` (in bfloat16;
      the LM head if it is that and tied) and `norms`, see `packing`; and of
      codes `s_qkv` and so on.
    token_ids: `[B]` int32.
    positions: `[B]` int32, tokens in the cache so far, below S where active.
    active: `[B]` bool; the caches of other sequences are left alone.
    cos: `[T, B, H / 2]` float32, of the positions and of the T - 1 after them.
    sin: likewise.
    num_steps: how many steps there may be, at most T.
    k_cache: `[L, B, K, S, H]` bfloat16.
    v_cache: likewise.
  """
  g = plan.geometry
  num_steps = jnp.asarray(num_steps).astype(jnp.int32)
  # Few arrays: each costs a launch of its own.
  progress = (
    jnp.clip(token_ids, 0, g.vocab_size - 1),
    jnp.where(active, positions, 0),
    active.astype(jnp.int32),
    jnp.stack([jnp.zeros_like(num_steps), num_steps]),
  )
  shapes = operand_shapes(plan, len(cos))
  found = dict(
    table=jnp.asarray(plan.schedule.table()),
    num_layers=jnp.full((1,), g.num_hidden_layers, jnp.int32),
    progress=jnp.stack(
      [jnp.pad(row, (0, MAX_BATCH - len(row))) for row in progress]
    ),
    angles=jnp.pad(
      jnp.stack([cos, sin], axis=1),
      ((0, 0), (0, 0), (0, MAX_BATCH - plan.batch), (0, 0)),
    ),
    norms=packed["norms"].reshape(shapes["norms"][0]),
    w_qkv=packed["qkv"],
    w_o=packed["o"],
    w_gate_up=packed["gate_up"],
    w_down=packed["down"],
    **{name: array for name, array in packed.items() if name[:2] == "s_"},
    w_lm_head=packed["lm_head"],
    embedding=packed["embedding"],
    emitted=jnp.full(shapes["emitted"][0], NO_TOKEN, jnp.int32),
    words=jnp.zeros(*shapes["words"]),
    k_cache=k_cache,
    v_cache=v_cache,
  )
  return {name: found[name] for name in shapes}


def run(launch: Launch, batch: int, operands: Operands) -> Operands:
  """Runs greedy steps until all sequences have ended, or there were enough.

  Args:
    launch: one step.
    batch: B.
    operands: of the first one.

  Returns:
    What has changed, after the last one.
  """
  # Traced, and lowered, once for all of a block.
  launch = jax.jit(launch)
  num_launches = min(LAUNCHES_PER_LOOK, len(operands["emitted"]))

  def goes_on(changed: Operands) -> jax.Array:
    progress = changed["progress"]
    step, most = progress[CLOCK, 0], progress[CLOCK, 1]
    return jnp.any(progress[ACTIVE, :batch] > 0) & (step < most)

  def block(changed: Operands) -> Operands:
    for _ in range(num_launches):
      _, changed = launch({**operands, **changed})
    return changed

  first = {name: operands[name] for name in ("progress", *CHANGED)}
  return jax.lax.while_loop(goes_on, block, first)
