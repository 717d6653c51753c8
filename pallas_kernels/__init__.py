"""The decode step of a Llama as one persistent kernel for Hopper GPUs.

`geometry` has the sizes and the limits, `schedule` says which CTA streams what,
`packing` lays weights out accordingly, and `kernel.step` runs a step. `emulator`
follows the same schedule in plain JAX. Nothing here imports `ffjax`.
"""
