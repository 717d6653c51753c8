"""Tests of `ffjax.text` and the modules it is made of."""

import datetime
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
  decoders,
  models,
  pre_tokenizers,
  processors,
)

from ffjax.errors import TokenizerError
from ffjax.gguf_file import open_gguf
from ffjax.gguf_tokenizer import tokenizer_from_gguf
from ffjax.text import (
  ByteTokenizer,
  JsonTokenizer,
  StreamDecoder,
  load_tokenizer,
)

_SMOLLM2 = (
  pathlib.Path(__file__).parent.parent
  / "checkpoints/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)
_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}\n"
  "  {%- if m.role == 'bad' %}{{ raise_exception('no ' + m.role) }}{% endif %}\n"
  "  {{- m.role }}: {{ m.content }}{{ eos_token }}\n"
  "{% endfor %}\n"
  "{% if add_generation_prompt %}me:{% endif %}"
)
_MESSAGES = [
  {"role": "you", "content": "<hi>"},
  {"role": "me", "content": "ho"},
]
_TEXTS = [
  "",
  " ",
  "Hello, world!",
  "  two  spaces  ",
  "naïve café, 東京, 🙂🏳️‍🌈\n\ttabs",
  "it's 12345 o'clock; I'LL go",
  "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}",
  "trailing newline\n\n",
]


def _byte_level(**options):
  """A byte-level BPE with a few merges over all 256 bytes."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [("h", "e"), ("Ġ", "w"), ("he", "l"), ("Ã", "©"), ("ð", "Ł")]
  tokens = ["<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<s>", "</s>"])
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  return JsonTokenizer(tokenizer, bos_token="<s>", eos_token="</s>", **options)


def _sentence_piece_metadata(**changes):
  """A SentencePiece vocabulary as GGUF metadata: scores, bytes, no merges."""
  pieces = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "▁ab", "▁▁", "é"]
  tokens = ["<unk>", "<s>", "</s>"]
  tokens += [f"<0x{byte:02X}>" for byte in range(256)] + pieces
  special = len(tokens) - len(pieces)
  # "bc" is the best piece, so "abc" is not "ab" + "c".
  order = {"bc": -1.0, "ab": -2.0, "abc": -3.0, "▁a": -4.0, "▁ab": -5.0}
  values = {
    "model": "llama",
    "tokens": tokens,
    "scores": [0.0] * special + [order.get(p, -9.0) for p in pieces],
    "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
  } | changes
  return {
    f"tokenizer.ggml.{key}": value
    for key, value in values.items()
    if value is not None
  }


def _gpt2_metadata(pre, /, **changes):
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = ["Ġ 1", "1 2", "12 3", "h i", "Ġ hi", ". .", "Ġ .", "Ċ Ċ"]
  tokens = alphabet + [merge.replace(" ", "", 1) for merge in merges]
  tokens += ["hixyz", "<|bos|>", "<|eos|>", "<tool>"]
  values = {
    "model": "gpt2",
    "pre": pre,
    "tokens": tokens,
    "merges": merges,
    "token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
    "bos_token_id": len(tokens) - 3,
    "eos_token_id": len(tokens) - 2,
  } | changes
  return {
    f"tokenizer.ggml.{key}": value
    for key, value in values.items()
    if value is not None
  }


def _pieces(metadata, text):
  """Returns the tokens of `text` by name."""
  tokens = metadata["tokenizer.ggml.tokens"]
  return [tokens[i] for i in tokenizer_from_gguf(metadata).encode(text)]


def _all_tokenizers():
  return {
    "bytes": ByteTokenizer(),
    "byte level": _byte_level(),
    "sentence piece": tokenizer_from_gguf(_sentence_piece_metadata()),
    "no prefix": tokenizer_from_gguf(
      _sentence_piece_metadata(add_space_prefix=False)
    ),
    "smollm": tokenizer_from_gguf(_gpt2_metadata("smollm")),
    "llama-bpe": tokenizer_from_gguf(_gpt2_metadata("llama-bpe")),
    "metaspace": _metaspace(),
  }


def _metaspace():
  """What transformers makes of a Llama 2 tokenizer: another leading space."""
  tokens = ["<s>", "▁", "▁▁", "a", "b", "▁a"]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={t: i for i, t in enumerate(tokens)},
      merges=[("▁", "a"), ("▁", "▁")],
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
  tokenizer.decoder = decoders.Metaspace()
  tokenizer.add_special_tokens(["<s>"])
  return JsonTokenizer(tokenizer)


_TOKENIZERS = _all_tokenizers()
_each_tokenizer = pytest.mark.parametrize("name", list(_TOKENIZERS))


@given(st.text())
def test_bytes_round_trip(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert ids == [byte + 3 for byte in text.encode()]
  assert tokenizer.encode(text) == [1, *ids]
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([1, *ids, 1, 0, 2, 259, 383]) == text


def test_byte_tokenizer_special_cases():
  tokenizer = ByteTokenizer()
  assert tokenizer.bos_token_id == 1
  assert tokenizer.vocab_size == 384
  assert tokenizer.decode([100], skip_special_tokens=False) == "a"
  shown = tokenizer.decode([1, 100, 0, 2, 300], skip_special_tokens=False)
  assert shown == "</s>a<pad><unk>"
  # The first byte of two, then "a": what is not UTF-8 adds nothing.
  assert tokenizer.decode([0xC3 + 3, 100]) == "a"
  assert tokenizer.decode(np.array([100, 101], np.int32)) == "ab"
  with pytest.raises(TokenizerError, match="-1"):
    tokenizer.decode([100, -1])
  with pytest.raises(TokenizerError, match="Unicode"):
    tokenizer.encode("\ud800")


def test_byte_tokenizer_matches_transformers():
  transformers = pytest.importorskip("transformers")
  theirs = transformers.ByT5Tokenizer()
  ours = ByteTokenizer()
  rng = np.random.default_rng(0)
  for text in _TEXTS:
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=False) == ids
  for _ in range(200):
    # Any bytes, most of them not UTF-8, with special and unused ids.
    ids = rng.integers(0, 384, 12).tolist()
    expected = theirs.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert ours.decode(ids) == expected


@_each_tokenizer
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_equals_decode(name, data):
  tokenizer = _TOKENIZERS[name]
  # Ids at random: mostly broken characters, and specials in odd places.
  ids = data.draw(
    st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
  )
  skip = data.draw(st.booleans())
  _check_stream(tokenizer, ids, skip)


def _check_stream(tokenizer, ids, skip):
  stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
  text = "".join(map(stream.push, ids)) + stream.flush()
  assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["sentence piece", "no prefix"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_equals_decode_in_runs_of_bytes(name, data):
  tokenizer = _TOKENIZERS[name]
  # Byte tokens follow <unk>, <s>, </s>; mix in pieces and specials.
  raw = data.draw(st.text(max_size=6)).encode()
  ids = [byte + 3 for byte in raw[: data.draw(st.integers(0, 12))]]
  for _ in range(data.draw(st.integers(0, 3))):
    at = data.draw(st.integers(0, len(ids)))
    ids.insert(at, data.draw(st.sampled_from([0, 1, 3 + 0x41, 259, 260, 266])))
  _check_stream(tokenizer, ids, data.draw(st.booleans()))


@_each_tokenizer
@pytest.mark.parametrize("text", _TEXTS)
def test_stream_of_text(name, text):
  tokenizer = _TOKENIZERS[name]
  ids = tokenizer.encode(text)
  if name != "metaspace":
    assert tokenizer.decode(ids) == text
  stream = StreamDecoder(tokenizer)
  # Twice: `flush` starts a new text.
  for _ in range(2):
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_shows_whole_characters_at_once():
  for name in ("bytes", "byte level"):
    tokenizer = _TOKENIZERS[name]
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    pieces = [stream.push(i) for i in ids]
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]
    assert pieces[-1] == "b"
    assert stream.flush() == ""


def test_stream_window_stays_short():
  tokenizer = _TOKENIZERS["byte level"]
  lengths = []

  class Counting:
    def __getattr__(self, attribute):
      return getattr(tokenizer, attribute)

    def decode(self, ids, **options):
      lengths.append(len(ids))
      return tokenizer.decode(ids, **options)

  stream = StreamDecoder(Counting())
  for token_id in tokenizer.encode("hello world, 東京! " * 50):
    stream.push(token_id)
  assert max(lengths) < 10


def test_json_tokenizer():
  tokenizer = _byte_level()
  assert tokenizer.bos_token_id == 0
  assert tokenizer.vocab_size == 2 + 256 + 5
  ids = tokenizer.encode("hel é")
  assert ids[0] == 0
  assert len(ids) == 4  # <s>, hel, Ġ, é
  assert tokenizer.encode("hel é", add_special_tokens=False) == ids[1:]
  # Text from a chat template has its special tokens already.
  assert tokenizer.encode("<s>hel é", add_special_tokens=False) == ids
  assert tokenizer.decode(ids) == "hel é"
  assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hel é"
  assert tokenizer.decode(np.array(ids, np.int32)) == "hel é"
  assert tokenizer.decode([*ids, 100_000]) == "hel é"
  for wrong in ([-1], [2**40], ["a"]):
    with pytest.raises(TokenizerError):
      tokenizer.decode(wrong)
  with pytest.raises(TokenizerError):
    tokenizer.encode("\ud800")
  with pytest.raises(TokenizerError, match="'<none>'"):
    JsonTokenizer(tokenizers.Tokenizer(models.BPE()), bos_token="<none>")


@pytest.mark.parametrize("template", [None, _TEMPLATE])
def test_save_and_load(tmp_path, template):
  saved = _byte_level(chat_template=template)
  saved.save(tmp_path / "new")
  loaded = load_tokenizer(tmp_path / "new")
  assert isinstance(loaded, JsonTokenizer)
  assert loaded.bos_token_id == saved.bos_token_id
  assert loaded.vocab_size == saved.vocab_size
  for text in _TEXTS:
    assert loaded.encode(text) == saved.encode(text)
    assert loaded.decode(saved.encode(text)) == text
  if template:
    assert loaded.render_chat(_MESSAGES) == saved.render_chat(_MESSAGES)


def test_save_and_load_bytes(tmp_path):
  ByteTokenizer(chat_template=_TEMPLATE).save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert isinstance(loaded, ByteTokenizer)
  assert loaded.render_chat(_MESSAGES).startswith("</s>you: <hi></s>")
  # The class name decides, as in a ByT5 checkpoint of Hugging Face.
  (tmp_path / "tokenizer_config.json").write_text(
    '{"tokenizer_class": "ByT5Tokenizer"}'
  )
  loaded = load_tokenizer(str(tmp_path))
  assert isinstance(loaded, ByteTokenizer)
  assert loaded.encode("a") == [1, 100]


@pytest.mark.parametrize("name", ["sentence piece", "smollm", "llama-bpe"])
def test_save_and_load_gguf_tokenizer(tmp_path, name):
  saved = _TOKENIZERS[name]
  saved.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert loaded is not None
  assert loaded.bos_token_id == saved.bos_token_id
  for text in _TEXTS:
    assert loaded.encode(text) == saved.encode(text)
    assert loaded.decode(saved.encode(text)) == text


def test_saved_files_load_in_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  for name in ("byte level", "sentence piece", "llama-bpe"):
    ours = _TOKENIZERS[name]
    ours.save(tmp_path / name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    for text in _TEXTS:
      assert theirs(text)["input_ids"] == ours.encode(text)


def _write_files(directory, config, **contents):
  _byte_level().save(directory)
  (directory / "tokenizer_config.json").write_text(json.dumps(config))
  for name, text in contents.items():
    (directory / name.replace("__", ".")).write_text(text)


def test_tokenizer_json_decides_what_is_added(tmp_path):
  config = {
    "bos_token": {"__type": "AddedToken", "content": "<s>"},
    "eos_token": "</s>",
    "add_bos_token": False,
    "add_eos_token": True,
  }
  _write_files(tmp_path, config)
  ours = load_tokenizer(tmp_path)
  assert ours is not None
  ids = ours.encode("a")
  assert ours.bos_token_id == ids[0] == 0
  assert ours.decode(ids, skip_special_tokens=False) == "<s>a"
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs("a")["input_ids"] == ids


def test_file_may_not_truncate_or_pad(tmp_path):
  tokenizer = _byte_level()
  tokenizer.save(tmp_path)
  path = tmp_path / "tokenizer.json"
  raw = tokenizers.Tokenizer.from_file(str(path))
  raw.enable_truncation(4)
  raw.enable_padding(length=64)
  raw.save(str(path))
  loaded = load_tokenizer(tmp_path)
  assert loaded is not None
  assert loaded.encode("hello world") == tokenizer.encode("hello world")


def test_no_tokenizer(tmp_path):
  assert load_tokenizer(tmp_path) is None
  assert load_tokenizer(tmp_path / "missing") is None


@pytest.mark.parametrize(
  ("files", "problem"),
  [
    ({"tokenizer_config__json": "{"}, "tokenizer_config.json: not valid JSON"),
    ({"tokenizer_config__json": "[" * 10**5}, "tokenizer_config.json"),
    (
      {"tokenizer_config__json": "[]"},
      "tokenizer_config.json: expected a JSON object",
    ),
    ({"tokenizer_config__json": '{"bos_token": 1}'}, "json: bos_token is no"),
    (
      {"tokenizer_config__json": '{"bos_token": "!!"}'},
      "config.json: bos token",
    ),
    ({"tokenizer_config__json": '{"chat_template": 1}'}, "json: chat_template"),
    ({"tokenizer__json": "{}"}, "tokenizer.json: cannot be read"),
    ({"tokenizer__json": ""}, "tokenizer.json: cannot be read"),
  ],
)
def test_files_that_cannot_be_read(tmp_path, files, problem):
  _write_files(tmp_path, {}, **files)
  with pytest.raises(TokenizerError, match=problem):
    load_tokenizer(tmp_path)


def test_files_without_tokenizer_json(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"")
  with pytest.raises(TokenizerError, match="tokenizer.model"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
  with pytest.raises(TokenizerError, match="tokenizer_config.json"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{}")
  with pytest.raises(TokenizerError, match="tokenizer_config.json"):
    load_tokenizer(tmp_path)


def test_save_into_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(TokenizerError, match="file"):
    ByteTokenizer().save(tmp_path / "file")


def test_packages_missing(tmp_path, monkeypatch):
  tokenizer = _byte_level(chat_template=_TEMPLATE)
  tokenizer.save(tmp_path)
  monkeypatch.setitem(sys.modules, "jinja2", None)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(TokenizerError, match=r"pip install 'ffjax\[text\]'"):
    load_tokenizer(tmp_path)
  with pytest.raises(TokenizerError, match=r"pip install 'ffjax\[text\]'"):
    tokenizer.render_chat(_MESSAGES)
  with pytest.raises(TokenizerError, match=r"pip install 'ffjax\[gguf\]'"):
    tokenizer_from_gguf(_gpt2_metadata("gpt-2"))
  # Needs neither.
  assert ByteTokenizer().decode(ByteTokenizer().encode("é")) == "é"


def test_render_chat():
  tokenizer = _byte_level(chat_template=_TEMPLATE)
  expected = "<s>you: <hi></s>\nme: ho</s>\n"
  assert tokenizer.render_chat(_MESSAGES) == expected + "me:"
  rendered = tokenizer.render_chat(_MESSAGES, add_generation_prompt=False)
  assert rendered == expected
  with pytest.raises(TokenizerError, match="rejects the messages: no bad"):
    tokenizer.render_chat([{"role": "bad", "content": ""}])
  with pytest.raises(TokenizerError, match="no chat template"):
    _byte_level().render_chat(_MESSAGES)


def test_render_chat_without_special_tokens():
  bare = tokenizers.Tokenizer(models.BPE())
  tokenizer = JsonTokenizer(bare, chat_template=_TEMPLATE)
  assert tokenizer.render_chat(_MESSAGES[:1]) == "you: <hi>\nme:"


def test_render_chat_matches_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  template = (
    "{{ bos_token }}{%- for m in messages %}\n"
    "    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
    "    {% if tools is not none %}never{% endif %}\n"
    "{{ m | tojson }}{{ m.role.title() }}{{ m['content'].strip() }}\n"
    "    {# comment #}\n"
    "{% endfor %}\n"
    "{{ add_generation_prompt }}{{ pad_token }}{{ eos_token }}\n"
  )
  ours = _byte_level(chat_template=template)
  ours.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for messages in (_MESSAGES, _MESSAGES * 2, [{"role": "é", "content": " "}]):
    expected = theirs.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=True
    )
    assert ours.render_chat(messages) == expected
    assert "never" not in expected


@pytest.mark.parametrize(
  "template",
  [
    "{% for",
    "{{ messages[7].content }}",
    "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
  ],
)
def test_templates_that_fail(template):
  with pytest.raises(TokenizerError, match="chat template failed"):
    _byte_level(chat_template=template).render_chat(_MESSAGES)


def test_template_functions():
  tokenizer = _byte_level(chat_template="{{ strftime_now('%Y') }}")
  year = datetime.datetime.now().year
  assert int(tokenizer.render_chat([])) in (year, year + 1)


@pytest.mark.parametrize(
  ("template", "file", "expected"),
  [
    ("one", None, "one"),
    ([{"name": "default", "template": "two"}], None, "two"),
    ([{"name": "tool_use", "template": "three"}], None, None),
    ("one", "four", "four"),
    (None, "five", "five"),
    (None, None, None),
  ],
)
def test_where_templates_come_from(tmp_path, template, file, expected):
  config = {} if template is None else {"chat_template": template}
  _write_files(tmp_path, config)
  if file is not None:
    (tmp_path / "chat_template.jinja").write_text(file)
  loaded = load_tokenizer(tmp_path)
  assert loaded is not None
  if expected is None:
    with pytest.raises(TokenizerError, match="no chat template"):
      loaded.render_chat([])
  else:
    assert loaded.render_chat([]) == expected


@pytest.mark.parametrize(
  ("pre", "text", "expected"),
  [
    # Digits: together, one by one, in threes from the left.
    ("gpt-2", "hi 1234", ["hi", "Ġ1", "2", "3", "4"]),
    ("smollm", "hi 1234", ["hi", "Ġ", "1", "2", "3", "4"]),
    ("llama-bpe", "hi 1234", ["hi", "Ġ", "123", "4"]),
    ("default", "123412", ["123", "4", "12"]),
    ("gpt-2", "3123", ["3", "123"]),
    ("smollm", "3123", ["3", "1", "2", "3"]),
    ("llama-bpe", "3123", ["3", "12", "3"]),
    ("default", "3123", ["3", "12", "3"]),
    ("default", "hi 12", ["hi", "Ġ", "12"]),
    # A whole word in the vocabulary, out of reach of the merges.
    ("gpt-2", "hixyz", ["hi", "x", "y", "z"]),
    ("llama-bpe", "hixyz", ["hixyz"]),
    # Punctuation by itself, newlines with what follows or on their own.
    ("gpt-2", "hi.. hi", ["hi", "..", "Ġhi"]),
    ("gpt-2", "hi .", ["hi", "Ġ."]),
    ("default", "hi .", ["hi", "Ġ", "."]),
    ("gpt-2", "hi\n\nhi", ["hi", "Ċ", "Ċ", "hi"]),
    ("llama-bpe", "hi\n\nhi", ["hi", "ĊĊ", "hi"]),
    # Names of special tokens are found before anything is split.
    ("gpt-2", "hi<|eos|>hi<tool>", ["hi", "<|eos|>", "hi", "<tool>"]),
  ],
)
def test_gguf_pre_tokenizers(pre, text, expected):
  metadata = _gpt2_metadata(pre, add_bos_token=False)
  assert _pieces(metadata, text) == expected


@pytest.mark.parametrize(
  ("pre", "flags", "expected"),
  [
    ("gpt-2", {}, ["hi"]),
    ("smollm", {"add_bos_token": True}, ["<|bos|>", "hi"]),
    ("llama-bpe", {}, ["<|bos|>", "hi"]),
    ("llama-bpe", {"add_bos_token": False}, ["hi"]),
    ("gpt-2", {"add_eos_token": True}, ["hi", "<|eos|>"]),
  ],
)
def test_gguf_bos_and_eos(pre, flags, expected):
  metadata = _gpt2_metadata(pre, **flags)
  assert _pieces(metadata, "hi") == expected
  tokenizer = tokenizer_from_gguf(metadata)
  ids = tokenizer.encode("hi", add_special_tokens=False)
  assert tokenizer.decode(ids, skip_special_tokens=False) == "hi"
  # Special tokens are skipped, user-defined ones are text.
  last = tokenizer.vocab_size - 1
  assert tokenizer.decode([*ids, last - 1, last]) == "hi<tool>"


@pytest.mark.parametrize(
  ("changes", "text", "expected"),
  [
    # Scores decide: "bc" first, then "abc", though "▁ab" is longer and first.
    ({}, "abc", ["<s>", "▁", "abc"]),
    ({}, "ab", ["<s>", "▁ab"]),
    ({}, " ab", ["<s>", "▁", "▁ab"]),
    ({}, "é€", ["<s>", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>"]),
    ({"add_space_prefix": False}, "ab ab", ["<s>", "ab", "▁ab"]),
    ({"add_bos_token": False}, "", []),
    ({"add_eos_token": True}, "ab", ["<s>", "▁ab", "</s>"]),
    # Each stretch of text between special tokens gets the prefix.
    ({}, "ab</s>ab", ["<s>", "▁ab", "</s>", "▁ab"]),
  ],
)
def test_gguf_sentence_piece(changes, text, expected):
  assert _pieces(_sentence_piece_metadata(**changes), text) == expected


def test_gguf_bytes_are_not_read_from_their_names():
  metadata = _sentence_piece_metadata()
  pieces = [*"<0x41>", "<0", "<0x", "<0x4", "<0x41"]
  metadata["tokenizer.ggml.tokens"] += pieces
  metadata["tokenizer.ggml.scores"] += [-1.0] * len(pieces)
  metadata["tokenizer.ggml.token_type"] += [1] * len(pieces)
  assert _pieces(metadata, "<0x41>") == ["<s>", "▁", "<0x41", ">"]


def test_gguf_sentence_piece_joins_like_sentencepiece():
  metadata = _sentence_piece_metadata()
  tokens = metadata["tokenizer.ggml.tokens"]
  scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))

  def join_best(text):
    # The definition: join the best neighbours until none make a token.
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
      found = [
        (-scores[left + right], at)
        for at, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
        if left + right in scores
      ]
      if not found:
        return parts
      at = min(found)[1]
      parts[at : at + 2] = [parts[at] + parts[at + 1]]

  rng = np.random.default_rng(0)
  for _ in range(300):
    text = "".join(rng.choice(list("abc "), rng.integers(1, 12)))
    assert _pieces(metadata, text)[1:] == join_best(text), text


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"model": "bert"}, "tokenizer.ggml.model 'bert'"),
    ({"model": None}, "tokenizer.ggml.model"),
    ({"pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2'"),
    ({"pre": None}, "tokenizer.ggml.pre"),
    ({"tokens": ["a", "a"]}, "token twice"),
    ({"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
    ({"tokens": None}, "tokenizer.ggml.tokens"),
    ({"token_type": [1]}, "tokenizer.ggml.token_type"),
    ({"merges": ["ab"]}, "tokenizer.ggml.merges holds 'ab'"),
    ({"merges": ["q q"]}, "cannot be built"),
    ({"merges": "a b"}, "tokenizer.ggml.merges"),
    ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id"),
    ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
  ],
)
def test_gguf_tokenizers_that_are_refused(changes, problem):
  with pytest.raises(TokenizerError, match=problem):
    tokenizer_from_gguf(_gpt2_metadata("gpt-2", **changes))


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"scores": None}, "tokenizer.ggml.scores"),
    ({"scores": [0.0]}, "tokenizer.ggml.scores"),
    ({"scores": [float("nan")] * 270}, "tokenizer.ggml.scores"),
    ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ({"unknown_token_id": -1}, "unknown_token_id"),
    ({"add_space_prefix": 0}, "add_space_prefix"),
  ],
)
def test_gguf_sentence_piece_that_is_refused(changes, problem):
  with pytest.raises(TokenizerError, match=problem):
    tokenizer_from_gguf(_sentence_piece_metadata(**changes))


def test_gguf_chat_template():
  metadata = _gpt2_metadata("gpt-2") | {"tokenizer.chat_template": _TEMPLATE}
  rendered = tokenizer_from_gguf(metadata).render_chat(_MESSAGES)
  assert rendered.startswith("<|bos|>you: <hi><|eos|>\n")
  metadata["tokenizer.chat_template"] = ["a"]
  with pytest.raises(TokenizerError, match="tokenizer.chat_template"):
    tokenizer_from_gguf(metadata)


@pytest.fixture(scope="module")
def smollm2():
  if not _SMOLLM2.exists():
    pytest.skip("no SmolLM2; python checkpoints/get_smollm2.py fetches it")
  return tokenizer_from_gguf(open_gguf(_SMOLLM2).tokenizer_metadata)


def test_smollm2_text(smollm2):
  ids = smollm2.encode("The capital of France is")
  assert ids == [504, 3575, 282, 4649, 314]
  assert smollm2.vocab_size == 49152
  assert smollm2.bos_token_id == 1
  for text in _TEXTS:
    assert smollm2.decode(smollm2.encode(text)) == text
    _check_stream(smollm2, smollm2.encode(text), skip=True)


def test_smollm2_chat(smollm2):
  question = "What is the capital of France?"
  text = smollm2.render_chat([{"role": "user", "content": question}])
  assert text == (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by"
    " Hugging Face<|im_end|>\n<|im_start|>user\nWhat is the capital of France?"
    "<|im_end|>\n<|im_start|>assistant\n"
  )
  ids = smollm2.encode(text, add_special_tokens=False)
  assert len(ids) == 37
  assert ids[0] == 1
  assert ids.count(1) == 3
  assert ids.count(2) == 2
  assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_splits_as_its_words(smollm2):
  # Byte-level tokens never cross what the pre-tokenizer splits.
  ids = smollm2.encode("In 2024, it's 3.14!\n\n  ok")
  pieces = [smollm2.decode([i]) for i in ids]
  assert pieces[:6] == ["In", " ", "2", "0", "2", "4"]
  assert not [piece for piece in pieces if re.search(r"\d\S", piece)]
