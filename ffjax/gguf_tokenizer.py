"""The tokenizer inside a GGUF file.

Up the flow: `ffjax.gguf_file` reads the metadata; down the flow: the result is
a `ffjax.json_tokenizer.JsonTokenizer`, so it can also be saved next to a checkpoint.

Source: the GGUF specification, `docs/gguf.md` of the ggml project. How a text
is split before merging, and the defaults of absent keys, are llama.cpp's.
"""

import math
from typing import Any

from ffjax.errors import TokenizerError
from ffjax.json_tokenizer import JsonTokenizer

_PREFIX = "tokenizer.ggml."

# `tokenizer.ggml.token_type`
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_GPT2_SPLIT = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre`: patterns that cut a text into words, each applied to
# what the one before left.
_SPLITS = {
  "gpt-2": [_GPT2_SPLIT],
  "smollm": [r"\p{N}", _GPT2_SPLIT],
  "llama-bpe": [_LLAMA3_SPLIT],
  # Not GPT-2's: files converted before `pre` existed were read this way.
  "default": [r"[\p{P}$+<=>^~|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"],
}

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def tokenizer_from_gguf(metadata: dict[str, Any]) -> JsonTokenizer:
  """Builds the tokenizer that a GGUF file describes.

  Args:
    metadata: the `tokenizer.*` keys, see `GgufFile.tokenizer_metadata`.

  Raises:
    TokenizerError: the metadata is malformed or describes a tokenizer that is
      not supported, or the `tokenizers` package is missing.
  """
  try:
    import tokenizers  # noqa: F401
  except ImportError as error:
    raise TokenizerError(
      "the tokenizer needs another package: pip install 'ffjax[gguf]'"
    ) from error
  reader = _Reader(metadata)
  model = reader.get("model", str)
  builders = {"gpt2": _byte_level, "llama": _sentence_piece}
  if model not in builders:
    raise TokenizerError(f"{_PREFIX}model {model!r} is not supported")
  tokens = reader.strings("tokens")
  if len(set(tokens)) != len(tokens):
    raise TokenizerError(f"{_PREFIX}tokens holds a token twice")
  types = reader.integers("token_type", len(tokens))
  try:
    tokenizer, adds_bos = builders[model](reader, tokens, types)
    _add_special(tokenizer, tokens, types)
  except TokenizerError:
    raise
  except Exception as error:  # The library raises nothing narrower.
    raise TokenizerError(f"{_PREFIX}*: cannot be built: {error}") from error
  bos, eos = (
    reader.token(f"{name}_token_id", tokens) for name in ("bos", "eos")
  )
  _surround(
    tokenizer,
    bos if reader.get("add_bos_token", bool, adds_bos) else None,
    eos if reader.get("add_eos_token", bool, False) else None,
  )
  template = metadata.get("tokenizer.chat_template")
  if template is not None and not isinstance(template, str):
    raise TokenizerError("tokenizer.chat_template is no text")
  return JsonTokenizer(
    tokenizer, bos_token=bos, eos_token=eos, chat_template=template
  )


class _Reader:
  """Reads `tokenizer.ggml.*` keys and checks their types."""

  def __init__(self, metadata: dict[str, Any]):
    self._metadata = metadata

  def get(self, key: str, kind: type, default: Any = None) -> Any:
    value = self._metadata.get(_PREFIX + key, default)
    if value is None:
      raise TokenizerError(f"no key {_PREFIX + key!r} in the metadata")
    if type(value) is not kind:
      raise TokenizerError(f"{_PREFIX}{key} is no {kind.__name__}")
    return value

  def strings(self, key: str) -> list[str]:
    value = self.get(key, list)
    if not all(type(item) is str for item in value):
      raise TokenizerError(f"{_PREFIX}{key} holds more than strings")
    return value

  def integers(self, key: str, length: int) -> list[int]:
    value = self.get(key, list)
    if len(value) != length or not all(type(item) is int for item in value):
      raise TokenizerError(f"{_PREFIX}{key} is not one integer per token")
    return value

  def scores(self, length: int) -> list[float]:
    value = self.get("scores", list)
    if len(value) != length or not all(
      type(item) is float and math.isfinite(item) for item in value
    ):
      raise TokenizerError(f"{_PREFIX}scores is not one number per token")
    return value

  def token(self, key: str, tokens: list[str]) -> str | None:
    if _PREFIX + key not in self._metadata:
      return None
    token_id = self.get(key, int)
    if not 0 <= token_id < len(tokens):
      raise TokenizerError(f"{_PREFIX}{key} {token_id} is not a token id")
    return tokens[token_id]


def _byte_level(
  reader: _Reader, tokens: list[str], types: list[int]
) -> tuple[Any, bool]:
  """Returns a byte-level BPE tokenizer and whether it adds bos by default."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  del types
  pre = reader.get("pre", str)
  if pre not in _SPLITS:
    raise TokenizerError(f"{_PREFIX}pre {pre!r} is not supported")
  merges = []
  for merge in reader.strings("merges"):
    # A token may itself start with a space.
    space = merge.find(" ", 1)
    if space < 0:
      raise TokenizerError(f"{_PREFIX}merges holds {merge!r}, which is no pair")
    merges.append((merge[:space], merge[space + 1 :]))
  is_llama3 = pre == "llama-bpe"
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: token_id for token_id, token in enumerate(tokens)},
      merges=merges,
      ignore_merges=is_llama3,
    )
  )
  splits = [
    pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for pattern in _SPLITS[pre]
  ]
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer, is_llama3


def _sentence_piece(
  reader: _Reader, tokens: list[str], types: list[int]
) -> tuple[Any, bool]:
  """Returns a SentencePiece BPE tokenizer and that it adds bos by default."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  if reader.get("remove_extra_whitespaces", bool, False):
    raise TokenizerError(
      f"{_PREFIX}remove_extra_whitespaces true is not supported"
    )
  has_prefix = reader.get("add_space_prefix", bool, True)
  unknown = reader.token("unknown_token_id", tokens)
  if unknown is None and _UNKNOWN in types:
    unknown = tokens[types.index(_UNKNOWN)]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: token_id for token_id, token in enumerate(tokens)},
      merges=_merges_from_scores(tokens, types, reader.scores(len(tokens))),
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  replace = normalizers.Replace(" ", _SPACE)
  strip = []
  if has_prefix:
    strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(
      [normalizers.Prepend(_SPACE), replace]
    )
  else:
    tokenizer.normalizer = replace
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  return tokenizer, True


def _merges_from_scores(
  tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
  """Returns the pairs that make a token, best token first.

  SentencePiece joins whichever two neighbours make the token with the best
  score; `tokenizers` joins the pair that comes first in its list.
  """
  # The names of bytes and of special tokens are no text.
  ranks = {
    token: (-scores[token_id], token_id)
    for token_id, token in enumerate(tokens)
    if types[token_id] not in (_UNKNOWN, _CONTROL, _BYTE)
  }
  found = []
  for token, rank in ranks.items():
    for at in range(1, len(token)):
      left, right = token[:at], token[at:]
      if left in ranks and right in ranks:
        found.append((rank, ranks[left], ranks[right], left, right))
  return [(left, right) for *_, left, right in sorted(found)]


def _add_special(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
  """Makes special tokens be found in a text before it is split."""
  import tokenizers

  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=True)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_UNKNOWN, _CONTROL)
    ]
  )
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind == _USER_DEFINED
    ]
  )


def _surround(
  tokenizer: Any, bos_token: str | None, eos_token: str | None
) -> None:
  """Makes a tokenizer add these tokens of its vocabulary around texts."""
  import tokenizers

  # Named by what they are: the library would read a colon in a token's name
  # as syntax.
  template, special = ["$A"], []
  for name, token, at in (("bos", bos_token, 0), ("eos", eos_token, 2)):
    if token is None:
      continue
    template.insert(at, name)
    token_id = tokenizer.token_to_id(token)
    special.append({"id": name, "ids": [token_id], "tokens": [token]})
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=template, special_tokens=special
  )
