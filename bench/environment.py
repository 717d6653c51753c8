"""What a figure depends on beside the code: device, clocks, versions, commit."""

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax
from absl import app

import ffjax

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGES = (
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "numpy",
  "torch",
  "transformers",
  "triton",
)
# By nvidia-smi's names. Drivers before 535 call the last one otherwise.
_CLOCKS = {
  "sm_mhz": "clocks.sm",
  "memory_mhz": "clocks.mem",
  "temperature_c": "temperature.gpu",
  "power_w": "power.draw",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def _output(*command: str) -> str | None:
  """Returns what a command prints, or None if it cannot run or fails."""
  try:
    done = subprocess.run(
      command,
      capture_output=True,
      text=True,
      check=True,
      timeout=30,
      cwd=_ROOT,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout


def _query(*fields: str) -> list[str] | None:
  """Asks the driver about the first GPU."""
  said = _output(
    "nvidia-smi",
    f"--query-gpu={','.join(fields)}",
    "--format=csv,noheader,nounits",
  )
  if not said:
    return None
  values = [value.strip() for value in said.splitlines()[0].split(",")]
  return values if len(values) == len(fields) else None


def _number(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:  # [N/A]
    return None


def clocks() -> dict[str, Any] | None:
  """Returns the GPU's clocks, heat, power and why it is slowed, or None."""
  for reasons in _REASONS:
    values = _query(*_CLOCKS.values(), reasons)
    if values is not None:
      numbers = map(_number, values[:-1])
      named: dict[str, Any] = dict(zip(_CLOCKS, numbers, strict=True))
      return named | {"throttle_reasons": values[-1]}
  return None


def driver() -> str | None:
  """Returns the version of the NVIDIA driver, or None without one."""
  found = _query("driver_version")
  return found[0] if found else None


def jax_device() -> dict[str, Any]:
  """Describes JAX's default device; this initialises it."""
  device = jax.devices()[0]
  return dict(
    kind=device.device_kind,
    platform=device.platform,
    num_sms=getattr(device, "core_count", None),
  )


def versions() -> dict[str, str | None]:
  """Returns the versions of Python and of the packages that are there."""
  found: dict[str, str | None] = dict(
    python=platform.python_version(), ffjax=ffjax.__version__, driver=driver()
  )
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found


def sources_sha256() -> str:
  """Returns the SHA-256 of the Python files that figures depend on."""
  digest = hashlib.sha256()
  for package in ("bench", "ffjax", "pallas_kernels"):
    for path in sorted((_ROOT / package).rglob("*.py")):
      name = path.relative_to(_ROOT).as_posix()
      content = path.read_bytes()
      digest.update(f"{name} {len(content)}\n".encode())
      digest.update(content)
  return digest.hexdigest()


def commit(given: str | None = None) -> dict[str, Any]:
  """Returns the state of the repository.

  Args:
    given: its commit, where there is only a copy of the tree.

  Returns:
    `hash`, None if it is not known; `dirty`, whether tracked files differ from
    it, None if that is not known; `sources_sha256`, which tells whether what ran
    is what that commit has.
  """
  return {**_commit(given), "sources_sha256": sources_sha256()}


def _commit(given: str | None) -> dict[str, Any]:
  if given is not None:
    return dict(hash=given, dirty=None)
  top = _output("git", "rev-parse", "--show-toplevel")
  if top is None or pathlib.Path(top.strip()) != _ROOT:
    return dict(hash=None, dirty=None)
  head = _output("git", "rev-parse", "HEAD")
  changed = _output("git", "status", "--porcelain", "--untracked-files=no")
  return dict(
    hash=head and head.strip(),
    dirty=None if changed is None else bool(changed.strip()),
  )


def commit_for(output: str | None, given: str | None = None) -> dict[str, Any]:
  """Returns the state of the repository, for a file of results.

  Args:
    output: the file, if one is asked for.
    given: as `commit` takes it.

  Raises:
    UsageError: if a file is asked for and nobody knows the commit.
  """
  found = commit(given)
  if output is not None and found["hash"] is None:
    raise app.UsageError("there is no .git here: say which --commit this is")
  return found
