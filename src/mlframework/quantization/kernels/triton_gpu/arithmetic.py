"""The formulas of :mod:`mlframework.quantization.arithmetic` on the device: the only place in the kernels that rounds.

Kernels are to be launched with :data:`.launch.EXACT`, or the compiler contracts a product and a sum into one operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

# From this magnitude on a value is not rounded: it lies far beyond every grid. Below, adding 1.5 * 2**23 leaves no room
# for a fraction in float32, and the addition rounds half to even.
_LARGEST_ROUNDED: tl.constexpr = tl.constexpr(4194304.0)
_ROUNDING: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def rounded(value):
    """Half to even, in float32; NaN stays."""
    return tl.where(tl.abs(value) < _LARGEST_ROUNDED, (value + _ROUNDING) - _ROUNDING, value)


@triton.jit
def clamped(value, lowest, highest):
    """NaN stays."""
    return tl.where(value < lowest, lowest, tl.where(value > highest, highest, value))


@triton.jit
def grid_zero_point(zero_point, lowest, highest):
    """The code that a (possibly fractional) zero point stands for, as float32."""
    return clamped(rounded(zero_point.to(tl.float32)), lowest, highest)


@triton.jit
def unsaturated_codes(value, scale, zero_point):
    """``rne(x / s) + z`` in float32, the division rounded correctly."""
    return rounded(tl.math.div_rn(value, scale)) + zero_point


@triton.jit
def to_codes(value, dtype: tl.constexpr):
    """Whole numbers in the range of an integer dtype; NaN is to be dealt with before."""
    return value.to(tl.int32).to(dtype)


@triton.jit
def requantized(accumulator, multiplier, zero_point, lowest, highest):
    """An int32 accumulator (bias included) to codes, as float32: ``rne(clamp(a * m, lowest - z, highest - z)) + z``."""
    scaled = accumulator.to(tl.float32) * multiplier
    return rounded(clamped(scaled, lowest - zero_point, highest - zero_point)) + zero_point


@triton.jit
def fused_multiply_add(code, factor, addend):
    """``code * factor + addend`` in float64, where the product is exact, rounded to float32."""
    return (code.to(tl.float64) * factor.to(tl.float64) + addend.to(tl.float64)).to(tl.float32)


@triton.jit
def packed_bits(flags):
    """Of int32 flags (N, 8), 0 or 1, the bytes (N,) that hold them, the first as the lowest bit."""
    return tl.sum(flags << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)
