"""Where Triton's interpreter (TRITON_INTERPRET=1, CPU tensors) is not what a GPU does, made so.

Its bfloat16 is stored as bits: tl.dot multiplies the bits, and a cast from float32 truncates instead of rounding.
"""

import os

import triton
import triton.language as tl

# read where triton reads it: when the kernels are decorated
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32, without TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)  # NaN: rounding could make it infinite
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
