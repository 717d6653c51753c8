"""Tests of what may import what, and of what an import needs."""

import ast
import importlib
import os
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import ffjax
import pallas_kernels

_ROOT = pathlib.Path(ffjax.__file__).parents[1]
_OPTIONAL = (
  "compressed_tensors",
  "gguf",
  "jinja2",
  "optax",
  "tokenizers",
  "torch",
  "transformers",
)


def _imported(source):
  """Lists the modules that source code imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      # A relative import stays in its own package.
      if node.level == 0:
        found.add(node.module)
    elif isinstance(node, ast.Call):
      # importlib.import_module("x") and __import__("x").
      name = getattr(node.func, "attr", getattr(node.func, "id", None))
      if name in ("import_module", "__import__"):
        found.update(
          arg.value for arg in node.args if isinstance(arg, ast.Constant)
        )
  return found


def _imports_ffjax(source):
  return any(name.split(".")[0] == "ffjax" for name in _imported(source))


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("import ffjax", True),
    ("import ffjax.config as c", True),
    ("import numpy, ffjax.rope", True),
    ("from ffjax import rope", True),
    ("from ffjax.cache import KVCache", True),
    ("def f():\n  if True:\n    import ffjax", True),
    ("import importlib\nimportlib.import_module('ffjax.rope')", True),
    ("__import__('ffjax')", True),
    ("import numpy", False),
    ("from . import packing", False),
    ("from pallas_kernels import packing", False),
    ("# import ffjax\nx = 'import ffjax'", False),
    ("import ffjaxlike", False),
  ],
)
def test_the_check_can_fail(source, expected):
  assert _imports_ffjax(source) == expected


def test_kernels_do_not_import_ffjax():
  paths = sorted((_ROOT / "pallas_kernels").rglob("*.py"))
  assert paths
  for path in paths:
    assert not _imports_ffjax(path.read_text("utf-8")), path


def _run(code):
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    env={**os.environ, "PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_importing_kernels_leaves_ffjax_out():
  code = (
    "import pkgutil, sys, pallas_kernels as p\n"
    "for m in pkgutil.walk_packages(p.__path__, 'pallas_kernels.'):\n"
    "  __import__(m.name)\n"
    "print(*sys.modules)"
  )
  loaded = _run(code)
  assert "pallas_kernels" in loaded
  assert "ffjax" not in loaded


def test_ffjax_needs_no_optional_package():
  # None in sys.modules makes an import fail as if nothing were installed.
  code = (
    "import pkgutil, sys\n"
    f"sys.modules.update(dict.fromkeys({_OPTIONAL!r}))\n"
    "import ffjax\n"
    "for m in pkgutil.walk_packages(ffjax.__path__, 'ffjax.'):\n"
    "  if not m.name.endswith('__main__'):\n"
    "    __import__(m.name)\n"
    "print(*ffjax.__all__)"
  )
  assert _run(code) == ffjax.__all__


def test_importing_ffjax_starts_no_device():
  # A process that only reads a config must not take a GPU's memory. Once JAX
  # has devices, it no longer looks at this option.
  code = (
    "import ffjax, jax\n"
    "jax.config.update('jax_platforms', 'nowhere')\n"
    "try:\n"
    "  jax.devices()\n"
    "except RuntimeError as e:\n"
    "  assert 'nowhere' in str(e), e\n"
    "  print('none')"
  )
  assert _run(code) == ["none"]


@pytest.mark.parametrize("package", [ffjax, pallas_kernels])
def test_every_module_says_what_it_is_for(package):
  for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
      assert importlib.import_module(module.name).__doc__, module.name


def test_public_names_exist_and_are_documented():
  assert sorted(ffjax.__all__) == ffjax.__all__
  for name in ffjax.__all__:
    assert getattr(ffjax, name).__doc__, name
