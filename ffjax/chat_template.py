"""Chat templates: a conversation as the text that a model was tuned on.

Down the flow: `ffjax.text`. Templates come with a checkpoint and are programs,
so they run in Jinja's sandbox. What they may use is what Hugging Face gives
them, since they are written for it.

Source: "Chat templates" in the documentation of transformers.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ffjax.errors import TokenizerError


def render(
  template: str | None,
  messages: Sequence[Mapping[str, str]],
  *,
  add_generation_prompt: bool,
  special_tokens: Mapping[str, str | None],
) -> str:
  """Fills in a chat template.

  Args:
    template: Jinja source, None if the tokenizer has none.
    messages: each with a `role` and its `content`.
    add_generation_prompt: end with what precedes the model's answer.
    special_tokens: `bos_token` and the like; None leaves one undefined.

  Raises:
    TokenizerError: there is no template, it is malformed or it rejects the
      messages, or Jinja is missing.
  """
  if template is None:
    raise TokenizerError("the tokenizer has no chat template")
  try:
    import jinja2.ext
    import jinja2.sandbox
  except ImportError as error:
    raise TokenizerError(
      "chat templates need another package: pip install 'ffjax[text]'"
    ) from error
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  # Jinja's own filter escapes for HTML.
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  environment.globals["strftime_now"] = _strftime_now
  try:
    return environment.from_string(template).render(
      messages=[dict(message) for message in messages],
      add_generation_prompt=add_generation_prompt,
      # Templates test these with `is not none`, which undefined ones pass.
      tools=None,
      documents=None,
      **{k: v for k, v in special_tokens.items() if v is not None},
    )
  except TokenizerError:
    raise
  # A template can raise whatever Python can: it indexes, adds and calls.
  except Exception as error:
    raise TokenizerError(f"the chat template failed: {error}") from error


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise_exception(message: str) -> NoReturn:
  raise TokenizerError(f"the chat template rejects the messages: {message}")


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
