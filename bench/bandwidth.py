"""Measures the read and copy ceilings of the device, see `bench.ceilings`.

  python -m bench.bandwidth --output=bench/results/h100/bandwidth.json

`--ceiling_bytes` says how large the array is.
"""

from bench import ceilings, environment, flags, harness


def main(argv: list[str]) -> None:
  """Measures, prints and writes."""
  commit = flags.commit(argv)
  size_bytes, repeats = flags.CEILING_BYTES.value, flags.REPEATS.value
  measured = [
    *ceilings.measure_reads(size_bytes, repeats),
    *ceilings.measure_copies(size_bytes, repeats),
  ]
  harness.Result(
    bench="bench.bandwidth",
    flags=flags.values(flags.CEILING_BYTES, flags.REPEATS),
    device=environment.jax_device(),
    commit=commit,
    data=dict(arrays=ceilings.DATA),
    measurements=measured,
  ).report(flags.OUTPUT.value)


if __name__ == "__main__":
  flags.run(main)
