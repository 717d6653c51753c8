"""What is timed: random prompts, and loops of steps after them."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ffjax
from bench import harness
from ffjax import stepping
from ffjax.sampling import Sampling

SEED = 0
# Of what `ffjax.random_model` and `prompt` make, and the peers after them.
DATA: dict[str, Any] = dict(
  weights="normal, standard deviation 0.02; norms normal around 1, 0.1",
  prompt="uniform token ids",
  seed=SEED,
)


@dataclasses.dataclass(frozen=True)
class LoopRun:
  """What a loop took and gave.

  Attributes:
    prefill_s: seconds; None if the loop began from a copy.
    loop_s: seconds.
    token_ids: the new tokens, `[B, T]`, or `[T]` of a peer.
  """

  prefill_s: float | None
  loop_s: float
  token_ids: np.ndarray


def differing_runs(runs: Sequence[LoopRun]) -> int:
  """Counts runs that gave other tokens than the first one."""
  return sum(
    not np.array_equal(run.token_ids, runs[0].token_ids) for run in runs
  )


def prompt(vocab_size: int, batch: int, length: int) -> np.ndarray:
  """Makes `[B, T]` random tokens; a longer prompt continues a shorter one."""
  rng = np.random.default_rng(SEED)
  return rng.integers(0, vocab_size, (length, batch), np.int32).T.copy()


def check_tokens(
  emitted: np.ndarray, shape: tuple[int, ...], vocab_size: int
) -> None:
  """Raises unless all steps of a loop gave token ids.

  Raises:
    CheckFailedError: if the loop ended early or a token does not exist.
  """
  valid = (emitted >= 0) & (emitted < vocab_size)
  if emitted.shape != shape or not valid.all():
    raise harness.CheckFailedError(
      f"a timed loop gave {valid.sum()} tokens, shape {emitted.shape}, where"
      f" {shape} were to come"
    )


@dataclasses.dataclass(frozen=True)
class Start:
  """Where loops of steps begin: after a prompt that has been run once.

  Attributes:
    state: as `stepping.prefill` returns it; to be donated, only as a `copy`.
    compile_s: seconds to compile the prefill.
    prefill_s: seconds to run it.
  """

  state: stepping.DecodeState
  compile_s: float
  prefill_s: float

  def copy(self) -> stepping.DecodeState:
    """Returns a state that may be donated."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, self.state))

  @classmethod
  def after(
    cls,
    model: ffjax.Model,
    implementation: str,
    token_ids: np.ndarray,
    capacity: int,
    sampling: Sampling,
  ) -> "Start":
    """Runs and times the prefill of `[B, T]` tokens."""
    batch, length = token_ids.shape
    arguments = (
      model,
      token_ids,
      np.full(batch, length, np.int32),
      sampling,
    )
    begin = time.perf_counter()
    # Ahead of time, so that one run is enough to time it.
    prefill = stepping.prefill.lower(
      *arguments,
      capacity=capacity,
      implementation=implementation,
      stop_on_eos=False,
    ).compile()
    compiled = time.perf_counter()
    state = jax.block_until_ready(prefill(*arguments))
    return cls(state, compiled - begin, time.perf_counter() - compiled)


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop of `num_steps` steps; a call runs and times it.

  Loops of all implementations may begin from the same start: prompts go through
  the reference.
  """

  model: ffjax.Model
  implementation: str
  start: Start
  num_steps: int
  sampling: Sampling

  def steps(
    self, state: stepping.DecodeState
  ) -> tuple[stepping.DecodeState, jax.Array]:
    """Runs from a state, which is donated, as `stepping.decode_steps` does."""
    return stepping.decode_steps(
      self.model,
      state,
      self.num_steps,
      self.sampling,
      max_steps=self.num_steps,
      implementation=self.implementation,
      stop_on_eos=False,
    )

  def __call__(self) -> LoopRun:
    """Runs.

    Raises:
      CheckFailedError: if what was emitted are not that many token ids.
    """
    state = self.start.copy()
    begin = time.perf_counter()
    _, new_tokens = self.steps(state)
    emitted = np.asarray(new_tokens)
    end = time.perf_counter()
    shape = (len(self.start.state.token_ids), self.num_steps)
    check_tokens(emitted, shape, self.model.config.vocab_size)
    return LoopRun(None, end - begin, emitted)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a loop runs.

  Attributes:
    batch: sequences.
    length: tokens of the prompt of each.
    num_steps: after it.
    bytes_per_step: weights and cache that a step must read, the mean.
  """

  batch: int
  length: int
  num_steps: int
  bytes_per_step: int


def measurements(
  shape: Shape,
  samples: harness.Samples[LoopRun],
  checks: Mapping[str, harness.Check],
  ceiling_gbps: float,
  details: Mapping[str, Mapping[str, Any]],
  repeatable: Collection[str] = (),
) -> list[harness.Measurement]:
  """Turns the seconds of loops into milliseconds per step.

  How many timed runs gave other tokens than the first call becomes part of the
  check.

  Args:
    shape: of all of them.
    samples: by name.
    checks: by name.
    ceiling_gbps: the read rate in this process.
    details: by name, what else there is to say of each, or instead; may lack
      names.
    repeatable: names of which no run may differ.
  """
  return [
    harness.Measurement(
      name=name,
      unit="ms",
      samples=[1e3 * t.loop_s / shape.num_steps for t in timed],
      warm_ups=samples.warm_ups,
      check=checks[name].counting(
        "differing_runs",
        differing_runs([samples.first[name], *timed]),
        limited=name in repeatable,
      ),
      clocks=samples.clocks,
      bytes_per_step=shape.bytes_per_step,
      ceiling_gbps=ceiling_gbps,
      details={
        "batch": shape.batch,
        "prompt": shape.length,
        "context": f"{shape.length} to {shape.length + shape.num_steps}",
        "steps": shape.num_steps,
        "prefill_ms": [
          1e3 * t.prefill_s for t in timed if t.prefill_s is not None
        ],
        "first_call_s": dict(
          prefill_s=samples.first[name].prefill_s,
          loop_s=samples.first[name].loop_s,
        ),
        **details.get(name, {}),
      },
    )
    for name, timed in samples.timed.items()
  ]
