"""What users import: prompts in, token ids and text out.

`generate` and `stream` are made of the joints in `ffjax.stepping`, which are
exported here too; `compare` sets two implementations against each other.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ffjax import prompts as prompts_lib
from ffjax.cache import KVCache, check_fits, rounded_capacity
from ffjax.compare import Comparison, Divergence, compare
from ffjax.errors import RequestError
from ffjax.implementation import resolve
from ffjax.params import Model, check_model
from ffjax.prompts import Prompts
from ffjax.sampling import Sampling
from ffjax.stepping import (
  NO_TOKEN,
  DecodeState,
  decode_step,
  decode_steps,
  forward,
  prefill,
)

__all__ = [
  "NO_TOKEN",
  "Comparison",
  "DecodeState",
  "Divergence",
  "Generation",
  "KVCache",
  "Sampling",
  "compare",
  "decode_step",
  "decode_steps",
  "forward",
  "generate",
  "prefill",
  "stream",
  "warm_up",
]

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Generation:
  """What `generate` returns; lists have one item per prompt.

  Attributes:
    token_ids: new tokens, with the eos token that ended them if one did.
    texts: their text without special tokens; None without a tokenizer.
    ended: whether an eos token ended the sequence.
    prefill_s: seconds for the prompts and the first new token.
    decode_s: seconds for all further tokens. In the first call with given
      shapes both include compilation.
    num_steps: decode steps that were run, the same for all sequences.
  """

  token_ids: list[list[int]]
  texts: list[str] | None
  ended: list[bool]
  prefill_s: float
  decode_s: float
  num_steps: int


@dataclasses.dataclass(frozen=True)
class _Request:
  """Checked arguments of one call.

  Attributes:
    prompts: token ids `[B, T]` and lengths `[B]`, as `prefill` takes them.
    capacity: token slots of the cache.
    static: what every jitted call takes as static arguments.
  """

  prompts: tuple[np.ndarray, np.ndarray]
  capacity: int
  static: dict[str, Any]


def _checked(
  model: Model,
  prompts: Prompts,
  max_new_tokens: int,
  implementation: str,
  sampling: Sampling,
  stop_on_eos: bool,
  capacity: int | None,
) -> _Request:
  check_model(model)
  if not isinstance(sampling, Sampling):
    raise RequestError(f"sampling={sampling!r} is not a decode.Sampling")
  prompts_lib.check_count("max_new_tokens", max_new_tokens, at_least=1)
  if capacity is not None:
    prompts_lib.check_count("capacity", capacity, at_least=1)
  dtype = resolve(implementation, model).dtype(model)
  encoded = prompts_lib.encode(model, prompts)
  prompts_lib.check_lengths(model.config, encoded, max_new_tokens, capacity)
  if capacity is None:
    capacity = max(map(len, encoded)) + int(max_new_tokens)
  capacity = rounded_capacity(capacity)
  check_fits(model.config, len(encoded), capacity, dtype)
  shape = (model.config, len(encoded), capacity, dtype)
  cache = jax.eval_shape(lambda: KVCache.create(*shape))
  resolved = resolve(implementation, model, cache)
  return _Request(
    prompts=prompts_lib.pad(encoded),
    capacity=capacity,
    static=dict(implementation=resolved.name, stop_on_eos=stop_on_eos),
  )


def generate(
  model: Model,
  prompts: Prompts,
  max_new_tokens: int = 64,
  *,
  implementation: str = "auto",
  sampling: Sampling = GREEDY,
  stop_on_eos: bool = True,
  capacity: int | None = None,
) -> Generation:
  """Continues prompts, several at a time, each by its own length.

  One jitted call runs the prompts and one the whole loop over new tokens;
  calls of similar lengths share both compilations.

  Args:
    model: the model.
    prompts: a text or token ids, or a sequence of either.
    max_new_tokens: how many tokens at most for each.
    implementation: `"reference"`, `"fused"`, or `"auto"` for the fastest one
      that runs here.
    sampling: how tokens are chosen.
    stop_on_eos: whether an eos token ends a sequence.
    capacity: the longest that prompt and output may be together, in tokens;
      by default what they are.

  Returns:
    The new tokens.

  Raises:
    RequestError: naming the argument that is out of range, or that the cache
      does not fit on the device.
  """
  request = _checked(
    model,
    prompts,
    max_new_tokens,
    implementation,
    sampling,
    stop_on_eos,
    capacity,
  )
  begin = time.perf_counter()
  state = prefill(
    model,
    *request.prompts,
    sampling,
    capacity=request.capacity,
    **request.static,
  )
  first = np.asarray(state.token_ids)
  prefilled = time.perf_counter()
  state, rest = decode_steps(
    model,
    state,
    max_new_tokens - 1,
    sampling,
    max_steps=rounded_capacity(max_new_tokens),
    **request.static,
  )
  rest = np.asarray(rest)
  decoded = time.perf_counter()

  tokens = np.concatenate([first[:, None], rest], axis=1)
  token_ids = [row[row != NO_TOKEN].tolist() for row in tokens]
  eos = model.config.eos_token_ids if stop_on_eos else ()
  tokenizer = model.tokenizer
  return Generation(
    token_ids=token_ids,
    texts=None if tokenizer is None else list(map(tokenizer.decode, token_ids)),
    ended=[ids[-1] in eos for ids in token_ids],
    prefill_s=prefilled - begin,
    decode_s=decoded - prefilled,
    num_steps=max(map(len, token_ids)) - 1,
  )


def warm_up(
  model: Model,
  prompts: Prompts,
  max_new_tokens: int = 64,
  *,
  implementation: str = "auto",
  sampling: Sampling = GREEDY,
  stop_on_eos: bool = True,
  capacity: int | None = None,
) -> None:
  """Compiles what `stream` with the same arguments runs, and runs nothing.

  Args:
    model: as for `generate`, and likewise below.
    prompts: likewise.
    max_new_tokens: likewise.
    implementation: likewise.
    sampling: likewise.
    stop_on_eos: likewise.
    capacity: likewise.

  Raises:
    RequestError: as `generate`.
  """
  request = _checked(
    model,
    prompts,
    max_new_tokens,
    implementation,
    sampling,
    stop_on_eos,
    capacity,
  )
  lowered = prefill.lower(
    model,
    *request.prompts,
    sampling,
    capacity=request.capacity,
    **request.static,
  )
  lowered.compile()
  state = lowered.out_info
  _emitted.lower(state).compile()
  decode_step.lower(model, state, sampling, **request.static).compile()


@jax.jit
def _emitted(state: DecodeState) -> tuple[jax.Array, jax.Array]:
  """Copies what the host wants to see, for the next step donates the state."""
  return jnp.copy(state.token_ids), jnp.copy(state.finished)


def stream(
  model: Model,
  prompts: Prompts,
  max_new_tokens: int = 64,
  *,
  implementation: str = "auto",
  sampling: Sampling = GREEDY,
  stop_on_eos: bool = True,
  capacity: int | None = None,
) -> Iterator[np.ndarray]:
  """Continues prompts and yields every token as soon as it is there.

  The tokens are those of `generate`. Arguments are checked at the call, before
  the first token is asked for.

  Args:
    model: as for `generate`, and likewise below.
    prompts: likewise.
    max_new_tokens: likewise.
    implementation: likewise.
    sampling: likewise.
    stop_on_eos: likewise.
    capacity: likewise.

  Yields:
    New tokens `[B]` int32, -1 for sequences that have ended.

  Raises:
    RequestError: as `generate`.
  """
  request = _checked(
    model,
    prompts,
    max_new_tokens,
    implementation,
    sampling,
    stop_on_eos,
    capacity,
  )
  return _stream(model, request, max_new_tokens, sampling)


def _stream(
  model: Model,
  request: _Request,
  max_new_tokens: int,
  sampling: Sampling,
) -> Iterator[np.ndarray]:
  state = prefill(
    model,
    *request.prompts,
    sampling,
    capacity=request.capacity,
    **request.static,
  )
  was_finished = np.zeros(len(request.prompts[1]), bool)
  for remaining in range(max_new_tokens - 1, -1, -1):
    token_ids, finished = _emitted(state)
    if remaining:
      # In flight while the host handles the token before.
      state = decode_step(model, state, sampling, **request.static)
    yield np.where(was_finished, NO_TOKEN, np.asarray(token_ids))
    was_finished = np.asarray(finished)
    if was_finished.all():
      return
