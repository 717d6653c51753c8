"""JSON files whose top level is an object, as all files of a checkpoint are."""

import json
import pathlib
from typing import Any

from ffjax.errors import FfjaxError


def read_object(path: pathlib.Path, error: type[FfjaxError]) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Args:
    path: the file.
    error: what to raise, naming the file, if it cannot be read, is not JSON,
      or holds another value.
  """
  try:
    found = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise error(f"{path}: no such file") from None
  except OSError as e:
    raise error(f"{path}: cannot be read: {e.strerror}") from e
  # RecursionError: nested too deeply.
  except (ValueError, RecursionError) as e:
    raise error(f"{path}: not valid JSON: {e}") from e
  if not isinstance(found, dict):
    raise error(f"{path}: expected a JSON object, found another value")
  return found
