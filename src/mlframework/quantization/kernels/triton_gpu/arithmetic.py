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
def scale_with_room(scale, bias, input_scale, SMALLEST: tl.constexpr, LARGEST_BIAS: tl.constexpr):
    """The scale of a channel whose bias fits the accumulator, and what codes on the old scale are multiplied by to lie
    on it, in float64: ``arithmetic.with_room_for_bias``."""
    # An input of unknown scale says nothing of the room that a bias needs.
    known_scale = tl.where(is_finite(input_scale), input_scale, float("inf")).to(tl.float64)
    smallest = tl.abs(bias).to(tl.float64) / (known_scale * LARGEST_BIAS)
    raised = tl.maximum(tl.maximum(scale.to(tl.float64), SMALLEST), smallest).to(tl.float32)
    return raised, scale.to(tl.float64) / raised.to(tl.float64)


@triton.jit
def rescaled_code(code, ratio):
    """A code on another scale, as int32: ``arithmetic.rescale_codes``."""
    return rounded_in_double(code.to(tl.float64) * ratio).to(tl.int32)


@triton.jit
def bias_code(bias, accumulator_scale):
    """A bias in units of the accumulator, as int32: ``arithmetic.quantize_bias``."""
    return rounded_in_double(tl.math.div_rn(bias, accumulator_scale).to(tl.float64)).to(tl.int32)


@triton.jit
def packed_bits(flags):
    """Of int32 flags (N, 8), 0 or 1, the bytes (N,) that hold them, the first as the lowest bit."""
    return tl.sum(flags << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def interpolated(start, end, weight):
    """:func:`torch.lerp` in float32: from the nearer end, the product and the sum rounded once."""
    difference = (end - start).to(tl.float64)
    near = weight < 0.5
    base = tl.where(near, start, end).to(tl.float64)
    coefficient = tl.where(near, weight, weight - 1.0).to(tl.float64)
    return (coefficient * difference + base).to(tl.float32)


@triton.jit
def moved_average(running, batch, momentum):
    """One step of a moving average; the first batch is copied, and what is not finite leaves the average as it was."""
    averaged = interpolated(running, batch, momentum)
    return tl.where(is_finite(batch), tl.where(is_finite(running), averaged, batch), running)


@triton.jit
def scale_of_range(minimum, maximum, lowest, highest, SYMMETRIC: tl.constexpr, zero, SMALLEST, LARGEST):
    """The finest scale whose grid covers a range and zero, as ``arithmetic.range_to_parameters`` says."""
    minimum = tl.where(is_finite(minimum), tl.minimum(minimum, 0.0), 0.0)
    maximum = tl.where(is_finite(maximum), tl.maximum(maximum, 0.0), 0.0)
    if SYMMETRIC:
        scale = tl.math.div_rn(maximum, maximum * 0 + (highest - zero))
        below = tl.where(lowest < zero, lowest - zero, -1.0)
        scale = tl.where(lowest < zero, tl.maximum(scale, tl.math.div_rn(minimum, minimum * 0 + below)), scale)
    else:
        scale = tl.math.div_rn(maximum * 0.5 - minimum * 0.5, maximum * 0 + (highest - lowest) * 0.5)
    return tl.where(scale > 0, clamped(scale, SMALLEST, LARGEST), 1.0)


@triton.jit
def zero_point_of_range(minimum, scale, lowest, highest):
    """The zero point of an affine grid whose scale is that of a range."""
    minimum = tl.where(is_finite(minimum), tl.minimum(minimum, 0.0), 0.0)
    return clamped(rounded(lowest - tl.math.div_rn(minimum, scale)), lowest, highest)


@triton.jit
def rounded_in_double(value):
    """Half to even, of float64 of a magnitude below ``2**50``: the code of a bias has no room for it in float32."""
    return (value + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def unpacked_bits(mask, start, count, BLOCK: tl.constexpr):
    """Of a mask of ``count`` bits, those (BLOCK // 8, 8) from element ``start`` on, a multiple of eight."""
    byte = tl.arange(0, BLOCK // 8)
    bits = tl.load(mask + start // 8 + byte, start + byte * 8 < count, other=0).to(tl.int32)
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) > 0
