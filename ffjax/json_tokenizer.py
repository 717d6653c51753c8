"""Tokenizers of the `tokenizers` library, such as `tokenizer.json` holds.

Up the flow: files next to a Hugging Face checkpoint, or `ffjax.gguf_tokenizer`;
down the flow: `ffjax.text`, whose `Tokenizer` protocol this implements.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ffjax import chat_template as chat
from ffjax import tokenizer_files as files
from ffjax.errors import TokenizerError


class JsonTokenizer:
  """A tokenizer of the `tokenizers` library, as `tokenizer.json` holds it."""

  def __init__(
    self,
    tokenizer: Any,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    chat_template: str | None = None,
  ):
    """Wraps a tokenizer.

    Args:
      tokenizer: a `tokenizers.Tokenizer`; it alone decides what is added
        around a text.
      bos_token: name of the token that starts a document.
      eos_token: name of the token that ends one, for the chat template.
      chat_template: Jinja source for `render_chat`.

    Raises:
      TokenizerError: `bos_token` is not in the vocabulary.
    """
    # A prompt cut short or filled up without a word would be wrong here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer = tokenizer
    self._bos_token = bos_token
    self._eos_token = eos_token
    self._chat_template = chat_template
    self.bos_token_id: int | None = None
    if bos_token is not None:
      self.bos_token_id = tokenizer.token_to_id(bos_token)
      if self.bos_token_id is None:
        raise TokenizerError(
          f"bos token {bos_token!r} is not in the vocabulary"
        )
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size: int = max(vocab.values(), default=-1) + 1
    # Byte fallback decodes a run of byte tokens only as a whole: if all of it
    # is not UTF-8, none of it is text.
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    self._byte_ids: frozenset[int] = frozenset()
    if any(step.get("type") == "ByteFallback" for step in steps):
      names = {f"<0x{byte:02X}>" for byte in range(256)}
      self._byte_ids = frozenset(vocab[name] for name in names & vocab.keys())

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """See `Tokenizer.encode`."""
    try:
      encoding = self._tokenizer.encode(
        text, add_special_tokens=add_special_tokens
      )
    except Exception as error:  # The library raises nothing narrower.
      raise TokenizerError(f"cannot encode the text: {error}") from error
    return encoding.ids

  def decode(
    self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
  ) -> str:
    """See `Tokenizer.decode`."""
    try:
      return self._tokenizer.decode(
        list(token_ids), skip_special_tokens=skip_special_tokens
      )
    except (OverflowError, TypeError) as error:
      raise TokenizerError(f"not token ids: {error}") from error

  def joins_next(self, token_id: int) -> bool:
    """See `Tokenizer.joins_next`."""
    return token_id in self._byte_ids

  def render_chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
  ) -> str:
    """See `Tokenizer.render_chat`."""
    return chat.render(
      self._chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      special_tokens={
        "bos_token": self._bos_token,
        "eos_token": self._eos_token,
      },
    )

  def save(self, directory: str | pathlib.Path) -> None:
    """See `Tokenizer.save`."""
    config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": self._bos_token,
      "eos_token": self._eos_token,
      "chat_template": self._chat_template,
    }
    contents = {
      files.TOKENIZER: json.loads(self._tokenizer.to_str()),
      files.CONFIG: {k: v for k, v in config.items() if v is not None},
    }
    files.write(pathlib.Path(directory), contents)


def read_json_tokenizer(
  directory: pathlib.Path, config: dict[str, Any]
) -> JsonTokenizer:
  """Reads `tokenizer.json`.

  As in transformers 5, that file alone decides what is added around a text:
  `add_bos_token` and `add_eos_token` of the config have no effect.

  Args:
    directory: holds the file.
    config: contents of `tokenizer_config.json`.

  Raises:
    TokenizerError: a file cannot be read, or `tokenizers` is missing.
  """
  path = directory / files.TOKENIZER
  try:
    import tokenizers
  except ImportError as error:
    raise TokenizerError(
      f"{path}: reading it needs another package: pip install 'ffjax[text]'"
    ) from error
  text = files.read_text(path)
  try:
    tokenizer = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # The library raises nothing narrower.
    raise TokenizerError(f"{path}: cannot be read: {error}") from error
  bos_token = files.token_name(directory, config, "bos_token")
  eos_token = files.token_name(directory, config, "eos_token")
  template = files.chat_template(directory, config)
  try:
    return JsonTokenizer(
      tokenizer,
      bos_token=bos_token,
      eos_token=eos_token,
      chat_template=template,
    )
  except TokenizerError as error:
    raise TokenizerError(f"{directory / files.CONFIG}: {error}") from error
