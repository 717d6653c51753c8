"""The decode step of a Llama as one persistent kernel for Hopper GPUs.

`geometry` has the sizes and the limits, `schedule` says which CTA streams what,
`packing` lays weights out accordingly, `kernel.step` runs a step, and `steps.run`
many launches of `kernel.launch`. `emulator` follows the same schedule in plain
JAX. Nothing here imports `ffjax`.
"""
