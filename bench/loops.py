"""What is timed: random prompts, and loops of steps after them."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
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
class LoopTimes:
  """One prefill and one loop of steps, in seconds."""

  prefill_s: float
  loop_s: float


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
class Loop:
  """A prefill and a loop of `num_steps` steps; a call runs and times both."""

  model: ffjax.Model
  implementation: str
  token_ids: np.ndarray
  num_steps: int
  capacity: int
  sampling: Sampling

  def __call__(self) -> LoopTimes:
    """Runs.

    Raises:
      CheckFailedError: if what was emitted are not that many token ids.
    """
    static: dict[str, Any] = dict(
      implementation=self.implementation, stop_on_eos=False
    )
    batch, length = self.token_ids.shape
    begin = time.perf_counter()
    state = stepping.prefill(
      self.model,
      self.token_ids,
      np.full(batch, length, np.int32),
      self.sampling,
      capacity=self.capacity,
      **static,
    )
    jax.block_until_ready(state)
    prefilled = time.perf_counter()
    _, new_tokens = stepping.decode_steps(
      self.model,
      state,
      self.num_steps,
      self.sampling,
      max_steps=self.num_steps,
      **static,
    )
    emitted = np.asarray(new_tokens)
    end = time.perf_counter()
    check_tokens(emitted, (batch, self.num_steps), self.model.config.vocab_size)
    return LoopTimes(prefilled - begin, end - prefilled)


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
  samples: harness.Samples[LoopTimes],
  checks: Mapping[str, harness.Check],
  ceiling_gbps: float,
  details: Mapping[str, Mapping[str, Any]],
) -> list[harness.Measurement]:
  """Turns the seconds of loops into milliseconds per step.

  Args:
    shape: of all of them.
    samples: by name.
    checks: by name.
    ceiling_gbps: the read rate in this process.
    details: by name, what else there is to say of each; may lack names.
  """
  return [
    harness.Measurement(
      name=name,
      unit="ms",
      samples=[1e3 * t.loop_s / shape.num_steps for t in timed],
      warm_ups=samples.warm_ups,
      check=checks[name],
      clocks=samples.clocks,
      bytes_per_step=shape.bytes_per_step,
      ceiling_gbps=ceiling_gbps,
      details=dict(
        batch=shape.batch,
        prompt=shape.length,
        context=f"{shape.length} to {shape.length + shape.num_steps}",
        steps=shape.num_steps,
        prefill_ms=[1e3 * t.prefill_s for t in timed],
        first_call_s=dataclasses.asdict(samples.first[name]),
        **details.get(name, {}),
      ),
    )
    for name, timed in samples.timed.items()
  ]
