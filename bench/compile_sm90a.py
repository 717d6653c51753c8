"""Compiles the fused step for H100 without one: registers, spills, memory.

Prints one line per model and batch, with a digest of the kernel's PTX: where that
is the same, two commits have the same kernel. Fails if registers spill: a spilled
byte is memory traffic of every thread. It needs JAX's CUDA plugin and ptxas, no GPU;
about 15 s a line.

  python -m bench.compile_sm90a --model=llama-3.2-1b --batch=1 --capacity=4096
"""

import sys

import jax
from absl import app, flags

from bench.chart import stored_as
from bench.models import MODELS, SHAPES
from ffjax import quantized
from ffjax.packed import chunk_format_of, geometry_of
from pallas_kernels import aot, formats
from pallas_kernels.plan import make_plan

_CONFIGS = {**MODELS, **SHAPES}
_MODEL = flags.DEFINE_multi_enum(
  "model", list(_CONFIGS), list(_CONFIGS), "Models."
)
_BATCH = flags.DEFINE_multi_integer("batch", [1, 8], "Sequences.")
_CAPACITY = flags.DEFINE_integer("capacity", 4096, "Slots of the cache.")
_DEVICE = flags.DEFINE_string(
  "device", None, "As JAX names it, for the choices made by measuring."
)
_FORMAT = flags.DEFINE_enum(
  "format", None, list(quantized.FORMATS), "What the layers are quantised to."
)
_HEAD_FORMAT = flags.DEFINE_enum(
  "head_format", None, list(quantized.FORMATS), "Likewise the LM head."
)


def _chunk_format(name: str | None) -> formats.Format:
  """Returns how the kernel has matrices of a format."""
  if name is None:
    return formats.BF16
  format = quantized.FORMATS[name]
  matrix = jax.eval_shape(
    lambda key: quantized.random_matrix(key, (8, 128), format, "bfloat16"),
    jax.random.key(0),
  )
  return chunk_format_of(matrix)


def main(argv: list[str]) -> None:
  """Runs the command line."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  # The compiler runs on the CPU; where there is a GPU, it is left alone.
  jax.config.update("jax_platforms", "cpu")
  reason = aot.missing()
  if reason is not None:
    sys.exit(f"cannot compile: {reason}")
  stored = stored_as(_FORMAT.value, _HEAD_FORMAT.value)
  spilled = False
  for model in _MODEL.value:
    for batch in _BATCH.value:
      geometry = geometry_of(_CONFIGS[model])
      plan = make_plan(
        geometry,
        batch,
        _CAPACITY.value,
        aot.NUM_SMS,
        _DEVICE.value,
        layer_format=_chunk_format(_FORMAT.value),
        head_format=_chunk_format(_HEAD_FORMAT.value),
      )
      report = aot.compile_step(plan)
      spilled |= report.spills
      print(
        f"{', '.join([model, *stored])}, batch {batch} capacity {_CAPACITY.value}: "
        f"{report.registers} registers, "
        f"{report.spill_store_bytes} + {report.spill_load_bytes} bytes spilled, "
        f"{report.stack_bytes} bytes of stack, "
        f"{report.smem_bytes} bytes of shared memory, "
        f"PTX {report.ptx_sha256[:16]}, "
        f"compiled in {report.compile_s:.1f} s",
        flush=True,
      )
  if spilled:
    sys.exit("registers spill")


if __name__ == "__main__":
  app.run(main)
