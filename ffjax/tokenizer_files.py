"""The tokenizer files of a Hugging Face checkpoint: names, reading, writing.

Down the flow: `ffjax.text` and `ffjax.json_tokenizer`. Whatever is wrong with
a file is a `TokenizerError` that names it.
"""

import json
import os
import pathlib
from typing import Any

from ffjax.errors import TokenizerError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


def chat_template(
  directory: pathlib.Path, config: dict[str, Any]
) -> str | None:
  """Returns the chat template, from its own file or from the config."""
  path = directory / TEMPLATE
  if os.path.lexists(path):
    return read_text(path)
  found = config.get("chat_template")
  if isinstance(found, list):
    named = {
      item.get("name"): item.get("template")
      for item in found
      if isinstance(item, dict)
    }
    found = named.get("default")
  if found is not None and not isinstance(found, str):
    raise TokenizerError(f"{directory / CONFIG}: chat_template is no text")
  return found


def token_name(
  directory: pathlib.Path, config: dict[str, Any], key: str
) -> str | None:
  """Returns the name of a special token, None if the config has none."""
  found = config.get(key)
  if isinstance(found, dict):
    found = found.get("content")
  if found is not None and not isinstance(found, str):
    raise TokenizerError(f"{directory / CONFIG}: {key} is no text")
  return found


def read_text(path: pathlib.Path) -> str:
  """Returns the contents of a text file."""
  try:
    return path.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise TokenizerError(f"{path}: cannot be read: {error}") from error


def write(directory: pathlib.Path, files: dict[str, dict[str, Any]]) -> None:
  """Writes JSON files, given by name, into a directory."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      text = json.dumps(content, ensure_ascii=False, indent=2)
      (directory / name).write_text(text + "\n", "utf-8")
  except OSError as error:
    raise TokenizerError(f"{directory}: cannot be written: {error}") from error
