"""Token ids and text.

Beside the flow: nothing between a checkpoint and its token ids needs this
module. `load_tokenizer` reads the files next to a Hugging Face checkpoint,
`ffjax.gguf_tokenizer` builds the same kind of tokenizer from a GGUF file,
`ffjax.chat_template` renders conversations, and `StreamDecoder` turns ids into
text as they are generated.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ffjax import chat_template as chat
from ffjax import json_file
from ffjax import tokenizer_files as files
from ffjax.errors import TokenizerError
from ffjax.json_tokenizer import JsonTokenizer, read_json_tokenizer

__all__ = [
  "ByteTokenizer",
  "JsonTokenizer",
  "StreamDecoder",
  "Tokenizer",
  "load_tokenizer",
]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
  """Text to token ids and back."""

  @property
  def bos_token_id(self) -> int | None:
    """The token that starts a document, None if there is none."""

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Returns the ids of `text`.

    Args:
      text: any text. Tokenizers from files recognise the names of special
        tokens in it.
      add_special_tokens: also add what the model expects around a document,
        such as the bos token. Pass False for text from `render_chat`, which
        has it already.
    """

  def decode(
    self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
  ) -> str:
    """Returns the text of `token_ids`; ids that mean nothing add nothing."""

  def joins_next(self, token_id: int) -> bool:
    """Says whether later tokens may change the text of this one."""

  def render_chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns a conversation as the text that the model was tuned on.

    Args:
      messages: each with a `role` and its `content`.
      add_generation_prompt: end with what precedes the model's answer.

    Raises:
      TokenizerError: there is no chat template, or it rejects the messages.
    """

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes files from which `load_tokenizer` makes the same tokenizer."""


class ByteTokenizer:
  """One token per UTF-8 byte, the ids of Hugging Face's `ByT5Tokenizer`.

  Ids 0 to 2 are padding, end and unknown, then come the 256 bytes; 259 to 383
  are unused. The end token also separates documents, so it is the bos token.
  Unlike ByT5 this adds no end token, which would stop a completion before it
  starts, and takes the names of special tokens for plain text.
  """

  bos_token_id: int = 1
  vocab_size: int = 384
  _FIRST_BYTE = 3
  _SPECIAL = ("<pad>", "</s>", "<unk>")

  def __init__(self, *, chat_template: str | None = None):
    """Makes a tokenizer.

    Args:
      chat_template: Jinja source for `render_chat`.
    """
    self._chat_template = chat_template

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """See `Tokenizer.encode`."""
    try:
      ids = [byte + self._FIRST_BYTE for byte in text.encode()]
    except UnicodeEncodeError as error:
      raise TokenizerError(f"text is not valid Unicode: {error}") from error
    return [self.bos_token_id, *ids] if add_special_tokens else ids

  def decode(
    self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
  ) -> str:
    """See `Tokenizer.decode`. Bytes that are not UTF-8 add nothing."""
    pieces = []
    for token_id in token_ids:
      if token_id < 0:
        raise TokenizerError(f"token id {token_id} does not exist")
      byte = token_id - self._FIRST_BYTE
      if 0 <= byte < 256:
        pieces.append(bytes([byte]))
      elif byte < 0 and not skip_special_tokens:
        pieces.append(self._SPECIAL[token_id].encode())
    return b"".join(pieces).decode("utf-8", errors="ignore")

  def joins_next(self, token_id: int) -> bool:
    """See `Tokenizer.joins_next`. An unfinished character decodes to ''."""
    del token_id
    return False

  def render_chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
  ) -> str:
    """See `Tokenizer.render_chat`."""
    name = self._SPECIAL[self.bos_token_id]
    return chat.render(
      self._chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      special_tokens={"bos_token": name, "eos_token": name},
    )

  def save(self, directory: str | pathlib.Path) -> None:
    """See `Tokenizer.save`."""
    config: dict[str, Any] = {
      "tokenizer_class": "ByT5Tokenizer",
      "eos_token": "</s>",
      "pad_token": "<pad>",
      "unk_token": "<unk>",
      "extra_ids": self.vocab_size - 259,
    }
    if self._chat_template is not None:
      config["chat_template"] = self._chat_template
    files.write(pathlib.Path(directory), {files.CONFIG: config})


class StreamDecoder:
  """Turns ids into text one by one, never into half a character.

  The pieces that `push` and `flush` return add up to what `decode` gives for
  all ids at once.
  """

  def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
    """Starts a text.

    Args:
      tokenizer: decodes the ids.
      skip_special_tokens: as for `Tokenizer.decode`.
    """
    self._tokenizer = tokenizer
    self._skip_special_tokens = skip_special_tokens
    # The tokens that last gave text, as context for what follows (some
    # tokenizers treat a space at the start of a text differently), then those
    # whose text is not yet certain.
    self._window: list[int] = []
    self._num_context = 0
    self._num_shown = 0
    self._is_joined = False

  def push(self, token_id: int) -> str:
    """Adds a token; returns the text that became certain, often ''."""
    self._window.append(token_id)
    # A token without text of its own, such as a skipped special one, does not
    # end a run of tokens that are only decoded together.
    if self._tokenizer.joins_next(token_id):
      self._is_joined = True
    elif self._is_joined and self._decode([token_id]):
      self._is_joined = False
    if self._is_joined:
      return ""
    text = self._decode(self._window)
    if len(text) <= self._num_shown or text.endswith(_REPLACEMENT):
      return ""
    piece = text[self._num_shown :]
    del self._window[: self._num_context]
    self._num_context = len(self._window)
    self._num_shown = len(self._decode(self._window))
    return piece

  def flush(self) -> str:
    """Ends the text; returns the rest of it and starts a new one."""
    rest = self._decode(self._window)[self._num_shown :]
    self._window.clear()
    self._num_context = self._num_shown = 0
    self._is_joined = False
    return rest

  def _decode(self, token_ids: Sequence[int]) -> str:
    return self._tokenizer.decode(
      token_ids, skip_special_tokens=self._skip_special_tokens
    )


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer | None:
  """Reads the tokenizer next to a Hugging Face checkpoint.

  Args:
    directory: holds `tokenizer.json` and `tokenizer_config.json`, or only the
      latter if that names `ByT5Tokenizer`.

  Returns:
    The tokenizer, or None if the directory has no tokenizer files.

  Raises:
    TokenizerError: there is a tokenizer that cannot be read.
  """
  directory = pathlib.Path(directory)
  config_path = directory / files.CONFIG
  path = directory / files.TOKENIZER
  config = (
    json_file.read_object(config_path, TokenizerError)
    if os.path.lexists(config_path)
    else {}
  )
  if config.get("tokenizer_class") == "ByT5Tokenizer":
    return ByteTokenizer(chat_template=files.chat_template(directory, config))
  if not os.path.lexists(path):
    for name in (files.CONFIG, "tokenizer.model"):
      if os.path.lexists(directory / name):
        raise TokenizerError(f"{directory / name}: there is no {path.name}")
    return None
  return read_json_tokenizer(directory, config)
