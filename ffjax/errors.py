"""The errors that ffjax raises for bad input, each one clear message.

The command line prints the message without a traceback; everything else that
escapes is a bug.
"""


class FfjaxError(ValueError):
  """Bad input; the message names the file, tensor or argument at fault."""


class ConfigError(FfjaxError):
  """A model configuration that is malformed or not supported."""


class CheckpointError(FfjaxError):
  """A checkpoint that is missing, damaged or not what its config says."""


class TokenizerError(FfjaxError):
  """A tokenizer that is missing, damaged or not supported."""


class RequestError(FfjaxError):
  """A prompt, sampling option or size that the model cannot take."""
