"""Pallas (Mosaic GPU) kernels for decoding on Hopper GPUs.

Empty so far: the persistent kernel that fuses all decoder layers comes next,
and `ffjax.decode` will offer it as `implementation="fused"`. `ffjax` imports
this package, never the other way round.
"""
