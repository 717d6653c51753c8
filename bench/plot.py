"""Draws a device's results, see `bench.chart`.

python -m bench.plot --results=bench/results/h100
"""

import pathlib

from absl import app
from absl import flags as absl_flags

from bench import chart

_RESULTS = absl_flags.DEFINE_string(
  "results", None, "The device's folder.", required=True
)
_PICTURE = absl_flags.DEFINE_string(
  "picture", None, "The picture; decode.svg in the folder if not given."
)


def main(argv: list[str]) -> None:
  """Draws."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  folder = pathlib.Path(_RESULTS.value)
  groups = chart.bars(chart.read(folder), folder.name)
  if not groups:
    raise app.UsageError(f"no results of whole steps below {folder}")
  path = pathlib.Path(_PICTURE.value or folder / "decode.svg")
  chart.draw(groups, folder.name).write(path)
  print(path)


if __name__ == "__main__":
  app.run(main)
