"""What all tests share: strict JAX, the `gpu` marker, and a few fixtures."""

import dataclasses
import pathlib

import hypothesis
import jax
import pytest

from ffjax.config import LlamaConfig

if not any(pathlib.Path("/dev").glob("nvidia*")):
  # Without a GPU there is nothing to look for but other backends' warnings.
  jax.config.update("jax_platforms", "cpu")

# An accidental promotion costs memory or bits in the fused kernel; here it is
# an error everywhere.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, and no time limits: the first example of a
# jitted function compiles.
hypothesis.settings.register_profile(
  "ffjax", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ffjax")

_SHARED = pathlib.Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips tests marked `gpu`, visibly, where there is none."""
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if not marked or any(device.platform == "gpu" for device in jax.devices()):
    return
  for item in marked:
    item.add_marker(pytest.mark.skip(reason="JAX finds no NVIDIA GPU"))


@pytest.fixture(scope="session")
def shared_models() -> pathlib.Path:
  """The folder of real weights that is handed out beside the repository."""
  path = _SHARED / "models"
  if not path.is_dir():
    pytest.skip("there is no shared/models beside the repository")
  return path


_TINY = LlamaConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=4,
  max_position_embeddings=128,
)


@pytest.fixture(scope="session")
def make_config():
  """A function from changed fields to a small `LlamaConfig`."""
  return lambda **fields: dataclasses.replace(_TINY, **fields)
