"""Products that are rounded before they are summed."""

import triton
import triton.language as tl


@triton.jit
def rounded_product(a, b):
    """a * b in float32, to be summed by `tl.sum`.

    A plain product there is fused into the first addition of the warp's butterfly: each of two lanes adds its own,
    unrounded, to the other's, rounded. They end with different bits, and both store them to one word of shared memory.
    """
    return tl.fma(a, b, 0.0)
