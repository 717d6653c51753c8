"""What is chosen by measuring, device by device.

`python -m bench.tune` measures the entries; `bench/LOG.md` has what came out.
"""

# Chunks of 16 KB that a CTA asks memory for at a time. Too few, and memory
# idles; too many, and all that comes later waits behind them.
IN_FLIGHT = 2
_IN_FLIGHT_ON = {
  "NVIDIA H100 80GB HBM3": 2,
  "NVIDIA H200": 3,
}


def in_flight_on(device_kind: str) -> int:
  """Returns the chunks in flight per CTA for a device, as JAX names it."""
  return _IN_FLIGHT_ON.get(device_kind, IN_FLIGHT)
