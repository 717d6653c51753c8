"""Times the kernel and its peers on one device: each in a process of its own.

  python -m bench.peers --preset=llama-3.2-1b \
    --folder=bench/results/h100/peers/llama-3.2-1b

The order is ours, XLA, PyTorch, ours again, so that drift shows as a difference
between the first and the last. Each process writes one file; the table at the
end has them all, and beside them what others published, marked as such. Exits
with 1 if one failed.
"""

import pathlib
import subprocess
import sys

from absl import flags as absl_flags

from bench import flags, harness, published

# By file name, in order.
RUNS = {
  "1-ours": "bench.decode",
  "2-xla": "bench.xla_peer",
  "3-torch": "bench.torch_peers",
  "4-ours-again": "bench.decode",
}

_RUN = absl_flags.DEFINE_multi_enum("run", list(RUNS), list(RUNS), "Processes.")
_OURS = absl_flags.DEFINE_list(
  "ours", ["fused", "reference"], "Implementations of ours."
)
_PEER = absl_flags.DEFINE_multi_string(
  "peer", [], "Of PyTorch's, see bench.torch_peers; none is all."
)
_FOLDER = absl_flags.DEFINE_string(
  "folder", None, "Folder for the files.", required=True
)


def command(name: str, output: pathlib.Path) -> list[str]:
  """Returns the command line of a process."""
  module = RUNS[name]
  passed = (
    flags.PRESET,
    flags.STEPS,
    flags.WARM_UPS,
    flags.REPEATS,
    flags.CEILING_BYTES,
  )
  made = [sys.executable, "-m", module, f"--output={output}"]
  made += [f"--{key}={value}" for key, value in flags.values(*passed).items()]
  made.append(f"--prompt={','.join(flags.PROMPT.value)}")
  if flags.COMMIT.value is not None:
    made.append(f"--commit={flags.COMMIT.value}")
  if module == "bench.decode":
    made.append(f"--implementation={','.join(_OURS.value)}")
  if module == "bench.torch_peers":
    made += [f"--peer={peer}" for peer in _PEER.value]
  return made


def main(argv: list[str]) -> None:
  """Runs the processes and prints the table."""
  flags.commit(argv, _FOLDER.value)
  folder = pathlib.Path(_FOLDER.value)
  results, failed = {}, []
  for name in _RUN.value:
    # The file of before stays until there is another.
    output = folder / f"{name}.json.unfinished"
    output.unlink(missing_ok=True)
    print(name, flush=True)
    done = subprocess.run(command(name, output), check=False)
    result = harness.load(output) if output.exists() else None
    if done.returncode or result is None:
      failed.append(name)
      output.unlink(missing_ok=True)
    else:
      results[name] = result
      output.replace(folder / f"{name}.json")
  print(published.table(results, flags.PRESET.value))
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
  flags.run(main)
