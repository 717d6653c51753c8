"""Flags that name a model, of several scripts; absl takes each name only once."""

from absl import flags

from ffjax.params import DTYPE_NAMES

CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Hugging Face directory or .gguf file."
)
DTYPE = flags.DEFINE_enum(
  "dtype", None, DTYPE_NAMES, "Dtype of the weights; default: the file's own."
)
