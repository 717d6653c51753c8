"""What users pass as prompts, checked and padded into arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ffjax.config import LlamaConfig
from ffjax.errors import RequestError
from ffjax.params import Model

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def encode(model: Model, prompts: Prompts) -> list[list[int]]:
  """Returns the token ids of one or several prompts.

  Args:
    model: with a tokenizer if there is text among the prompts.
    prompts: a text or a sequence of token ids, or a sequence of either.

  Raises:
    RequestError: naming the prompt that is empty or has ids that the model
      does not, or text without a tokenizer.
  """
  vocab_size = model.config.vocab_size
  encoded = []
  for i, prompt in enumerate(_several(prompts)):
    if isinstance(prompt, str):
      if model.tokenizer is None:
        raise RequestError(
          f"prompt {i} is text, but the checkpoint has no tokenizer: pass"
          " token ids"
        )
      ids = model.tokenizer.encode(prompt)
    else:
      ids = _listed(prompt, f"prompt {i}")
    if not ids:
      raise RequestError(f"prompt {i} is empty")
    for token_id in ids:
      if isinstance(token_id, bool) or not isinstance(
        token_id, int | np.integer
      ):
        raise RequestError(f"prompt {i} has {token_id!r}, not a token id")
      if not 0 <= token_id < vocab_size:
        raise RequestError(
          f"prompt {i} has token id {token_id}, outside the vocabulary of"
          f" {vocab_size}"
        )
    encoded.append([int(token_id) for token_id in ids])
  if not encoded:
    raise RequestError("there are no prompts")
  return encoded


def _several(prompts: Any) -> list[Any]:
  """Returns a list of prompts, even if there is one."""
  if isinstance(prompts, str):
    return [prompts]
  listed = _listed(prompts, "prompts")
  one = bool(listed) and isinstance(listed[0], int | np.integer)
  return [listed] if one else listed


def _listed(values: Any, what: str) -> list[Any]:
  """Returns a sequence or array as a list."""
  if isinstance(values, np.ndarray | jax.Array):
    return list(np.asarray(values)) if values.ndim else []
  if not isinstance(values, Sequence) or isinstance(values, bytes):
    raise RequestError(
      f"{what} must be text or a sequence, not {type(values).__name__}"
    )
  return list(values)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts at the end.

  The padded length is a power of two, or a multiple of 512 above, so that
  prompts of similar length share one compilation.

  Returns:
    Token ids `[B, T]` int32 and lengths `[B]` int32.
  """
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  longest = int(lengths.max())
  padded = -(-longest // 512) * 512
  if longest <= 512:
    padded = max(16, 1 << (longest - 1).bit_length())
  token_ids = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in zip(token_ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  return token_ids, lengths


def check_lengths(
  config: LlamaConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  capacity: int | None = None,
) -> None:
  """Raises if a prompt and its continuation are too long.

  Args:
    config: the model.
    prompts: token ids.
    max_new_tokens: how many more may come.
    capacity: token slots of the cache, if that is a limit of its own.

  Raises:
    RequestError: naming the prompt and the limit.
  """
  limits = {"max_position_embeddings": config.max_position_embeddings}
  if capacity is not None:
    limits["capacity"] = capacity
  for i, prompt in enumerate(prompts):
    for name, limit in limits.items():
      if len(prompt) + max_new_tokens > limit:
        raise RequestError(
          f"prompt {i} has {len(prompt)} tokens; with"
          f" max_new_tokens={max_new_tokens} that is more than"
          f" {name}={limit}"
        )


def check_count(name: str, value: object, at_least: int) -> None:
  """Raises a RequestError naming an argument that is not such an integer."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise RequestError(f"{name}={value!r} is not an integer")
  if value < at_least:
    raise RequestError(f"{name}={value} must be at least {at_least}")
