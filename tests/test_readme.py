"""The README: its example runs, its figures are those of their files."""

import json
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(monkeypatch):
  monkeypatch.chdir(_ROOT)
  (example,) = re.findall(r"^```python\n(.*?)^```$", _README, re.M | re.S)
  names: dict = {}
  exec(example, names)
  assert len(names["out"].texts) == 2
  assert all(names["out"].texts)


def _figures(result):
  """Lists ms, GB/s, share of the ceiling and KL of whole steps in a file."""
  return [
    (m["median"], m["gbps"], m["share_of_ceiling"], metrics["mean_kl"])
    for m in result["measurements"]
    for metrics in [m["check"]["metrics"]]
  ]


def test_figures_are_those_of_their_files():
  rows = re.findall(r"^\|(.*)\| `(bench/results/.*\.json)` \|$", _README, re.M)
  assert len(rows) >= 2
  for row, path in rows:
    cells = [cell.strip() for cell in row.split("|")]
    device, model, _, step_ms, gbps, share = cells
    result = json.loads((_ROOT / path).read_text())
    assert result["device"]["kind"].endswith(device)
    assert result["flags"]["preset"] == model.lower()
    matching = [
      mean_kl
      for found_ms, found_gbps, found_share, mean_kl in _figures(result)
      if float(step_ms) == pytest.approx(found_ms, abs=6e-4)
      and float(gbps) == pytest.approx(found_gbps, abs=0.6)
      and share == f"{found_share:.0%}"
    ]
    assert matching, row
    assert min(matching) < 1e-2


def test_bits_per_byte_are_those_of_their_files():
  (header,) = re.findall(r"^\| \| (bfloat16 .*) \|$", _README, re.M)
  formats = [name.strip("` ") for name in header.split("|")]
  for title in ("tiny_llama", "SmolLM2-135M"):
    (row,) = re.findall(rf"^\| {title} \| (.*) \|$", _README, re.M)
    name = title.lower().replace("_", "-")
    path = _ROOT / "bench/results/cpu/quality" / f"{name}.json"
    result = json.loads(path.read_text())
    found = {m["name"]: m["median"] for m in result["measurements"]}
    for format, cell in zip(formats, row.split("|"), strict=True):
      stated = [float(x) for x in cell.split("/") if x.strip()]
      names = (format, f"{format}, GPTQ")
      expected = [found[x] for x in names if x in found]
      assert stated == pytest.approx(expected, abs=6e-4), (title, format)


def test_named_files_exist():
  # The table of modules names files relative to the first one's folder.
  for path in re.findall(r"`([a-z_]+/[a-z_./0-9-]*)`", _README):
    if "smollm2" not in path:
      assert (_ROOT / path).exists(), path


def test_is_short():
  assert len(_README.splitlines()) <= 175
