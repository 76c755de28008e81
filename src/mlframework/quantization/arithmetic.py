r"""The arithmetic of quantization, and the only place that rounds.

Every formula here works on plain tensors; what checks arguments stands above it (:mod:`.parameters`). Rounding is
half to even everywhere (:func:`torch.round`), and float arithmetic is float32 in the order written, which is what
ONNX Runtime computes (``QuantizeLinear``, ``QLinearConv``, ``QGemm``, ``QLinearAdd``, ``QLinearMul``,
``QLinearConcat``, ``QLinearGlobalAveragePool``).

=============  ====================================================================================
quantize       :math:`q = \mathrm{clamp}(\mathrm{rne}(x / s) + z,\ q_{min},\ q_{max})`
dequantize     :math:`x = (q - z)\, s`
requantize     :math:`q_y = \mathrm{rne}(\mathrm{clamp}((a + b) \cdot ((s_x s_w) / s_y),\
               q_{min} - z_y,\ q_{max} - z_y)) + z_y`
bias           :math:`b = \mathrm{rne}(\beta / (s_x s_w))` as int32
float result   :math:`y = (a + b) \cdot (s_x s_w)`
add            :math:`q_y = \mathrm{clamp}(\mathrm{rne}(\mathrm{fma}(q_a, s_a / s_y, t)))`,
               :math:`t = \mathrm{fma}(q_b, s_b / s_y, C)`,
               :math:`C = z_y - \mathrm{fma}(z_a, s_a / s_y, (s_b / s_y) z_b)`
multiply       :math:`q_y = \mathrm{clamp}(\mathrm{rne}((q_a - z_a)(q_b - z_b)\,((s_a s_b) / s_y) + z_y))`
average        requantize with :math:`a = \sum (q - z)` over n codes, and :math:`s_x / (s_y n)` for the factor
lookup         :math:`q_y = \mathrm{quantize}(f(\mathrm{dequantize}(q_x)))` for each of 256 codes
=============  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .scheme import QuantizationScheme

# With every scale within these bounds, the products and quotients of two or three scales that the formulas form
# stay normal float32 numbers: no underflow, no overflow, no zero divisor.
SMALLEST_SCALE = 2.0**-40
LARGEST_SCALE = 2.0**40

# The bias and the accumulator of an integer layer share an int32: each is kept below half of its range.
LARGEST_BIAS_CODE = 2**30


def along_axis(values: Tensor, dimensions: int, axis: int | None) -> Tensor:
    """``values`` of shape (1,) or (C,), viewed so that they broadcast along ``axis`` of a tensor."""
    if axis is None:
        return values.reshape((1,) * dimensions)
    return values.reshape([-1 if dimension == axis else 1 for dimension in range(dimensions)])


def compute_dtype(input: Tensor) -> torch.dtype:
    """Half precision has too few digits to divide by a scale: float32 at least, float64 for float64."""
    return torch.promote_types(input.dtype, torch.float32)


def grid_zero_point(zero_point: Tensor, scheme: QuantizationScheme) -> Tensor:
    """The code that a (possibly learned, hence fractional) zero point stands for."""
    if not zero_point.is_floating_point():
        zero_point = zero_point.to(torch.int32)  # the ends of a grid do not fit every integer dtype
    return torch.round(zero_point).clamp(scheme.quant_min, scheme.quant_max)


def unsaturated_codes(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``rne(x / s) + z`` in floating point, before saturation; the operands broadcast."""
    return (input / scale).round_().add_(zero_point)


def quantize_values(input: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Float values to integer codes; ``scale`` and ``zero_point`` of shape (1,) or (C,)."""
    axis = scheme.resolve_channel_axis(input.dim())
    return quantize_to(input, scale, zero_point, scheme.quant_min, scheme.quant_max, scheme.dtype, axis)


def quantize_to(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
    axis: int | None,
) -> Tensor:
    """:func:`quantize_values` for a grid that is given by its ends and its dtype."""
    computed = compute_dtype(input)
    codes = unsaturated_codes(
        input.to(computed), along_axis(scale.to(computed), input.dim(), axis), along_axis(zero_point, input.dim(), axis)
    )
    return codes.clamp_(lowest, highest).to(dtype)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor, channel_axis: int | None) -> Tensor:
    """Integer codes to float32 values on the grid."""
    axis = channel_axis if channel_axis is None else channel_axis % codes.dim()
    offset = along_axis(zero_point.to(torch.float32), codes.dim(), axis)
    return (codes.to(torch.float32) - offset) * along_axis(scale.to(torch.float32), codes.dim(), axis)


def quantize_bias(bias: Tensor, accumulator_scale: Tensor) -> Tensor:
    """The bias in units of the accumulator, as int32 codes (zero point 0)."""
    return torch.round(bias / accumulator_scale).to(torch.int32)


def bias_fits(bias: Tensor, accumulator_scale: Tensor) -> Tensor:
    """Where the code of a bias leaves the accumulator the room it needs; :func:`with_room_for_bias` makes it."""
    return bias.abs() <= accumulator_scale * LARGEST_BIAS_CODE


def bias_on_grid(bias: Tensor, accumulator_scale: Tensor) -> Tensor:
    """The values of a quantized bias; where it does not fit, as it is."""
    values = torch.round(bias / accumulator_scale) * accumulator_scale
    return torch.where(bias_fits(bias, accumulator_scale), values, bias)


def rescale_codes(codes: Tensor, ratio: Tensor) -> Tensor:
    """int8 codes with zero point 0 on a coarser grid: ``ratio`` is old scale / new scale, at most 1."""
    return torch.round(codes * ratio).to(torch.int8)


def with_room_for_bias(
    codes: Tensor, scale: Tensor, bias: Tensor, input_scale: Tensor, axis: int = 0
) -> tuple[Tensor, Tensor]:
    """Weight codes, and their scale in float32, of a layer whose bias fits the accumulator.

    A channel whose scale is next to nothing would have a bias beyond int32: its scale is raised to where the bias fits,
    and the few codes that are left of the channel are rounded to it.

    Args:
        codes: int8 values, zero point 0.
        scale: (O,).
        bias: (O,), in real numbers.
        input_scale: (1,).
        axis: of the codes, that the output's channels lie along.
    """
    scale = scale.double()
    smallest = bias.double().abs() / (input_scale.double() * LARGEST_BIAS_CODE)
    raised = scale.clamp(min=SMALLEST_SCALE).maximum(smallest).to(torch.float32)
    return rescale_codes(codes, along_axis(scale / raised, codes.dim(), axis)), raised


def requantize_accumulator(
    accumulator: Tensor,
    multiplier: Tensor,
    zero_point: int | Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """An accumulator (bias included) to the codes of the output grid, saturating at ``lowest`` and ``highest``.

    ``multiplier`` is ``(sx * sw) / sy`` and broadcasts. An activation that only clips (ReLU, ReLU6) is the choice
    of ``lowest`` and ``highest``.
    """
    scaled = accumulator.to(torch.float32) * multiplier
    # The two ends are both numbers or both tensors, which the signatures of clamp tell apart.
    scaled = scaled.clamp_(lowest - zero_point, highest - zero_point)  # type: ignore[arg-type]
    return scaled.round_().add_(zero_point).to(dtype)


def rescale_accumulator(accumulator: Tensor, accumulator_scale: Tensor) -> Tensor:
    """An accumulator (bias included) to float32 values, for a layer whose output stays float."""
    return accumulator.to(torch.float32) * accumulator_scale


def add_codes(
    left: Tensor,
    left_ratio: Tensor,
    right: Tensor,
    right_ratio: Tensor,
    constant: Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of two quantized tensors on the output's grid (see :func:`add_constants` for the operands)."""
    total = fused_multiply_add(left, left_ratio, fused_multiply_add(right, right_ratio, constant))
    return total.round_().clamp_(lowest, highest).to(dtype)  # type: ignore[arg-type]


def add_constants(
    left_scale: Tensor,
    left_zero_point: Tensor,
    right_scale: Tensor,
    right_zero_point: Tensor,
    output_scale: Tensor,
    output_zero_point: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sa / sy``, ``sb / sy`` and the constant ``C`` of :func:`add_codes`, each of shape (1,)."""
    left_ratio = left_scale / output_scale
    right_ratio = right_scale / output_scale
    offset = fused_multiply_add(left_zero_point, left_ratio, right_ratio * right_zero_point.to(torch.float32))
    return left_ratio, right_ratio, output_zero_point - offset


def fused_multiply_add(codes: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """``codes * factor + addend`` rounded once to float32: a product of a code and a float32 is exact in float64."""
    return (codes.to(torch.float64) * factor.to(torch.float64) + addend.to(torch.float64)).to(torch.float32)


def multiply_ratio(left_scale: Tensor, right_scale: Tensor, output_scale: Tensor) -> Tensor:
    """``(sa sb) / sy`` of :func:`multiply_codes`."""
    return (left_scale * right_scale) / output_scale


def multiply_codes(
    left: Tensor,
    left_zero_point: Tensor,
    right: Tensor,
    right_zero_point: Tensor,
    ratio: Tensor,
    zero_point: Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The product of two quantized tensors on the output's grid."""
    product = (left.to(torch.float32) - left_zero_point) * (right.to(torch.float32) - right_zero_point)
    return (product * ratio).add_(zero_point).round_().clamp_(lowest, highest).to(dtype)  # type: ignore[arg-type]


def average_multiplier(input_scale: Tensor, output_scale: Tensor, count: Tensor) -> Tensor:
    """What turns a sum of ``count`` codes into the code of their average: ``sx / (sy n)``."""
    return input_scale / (output_scale * count.to(torch.float32))


def lookup_table(
    function: Callable[[Tensor], Tensor] | None,
    input_scale: Tensor,
    input_zero_point: Tensor,
    input_scheme: QuantizationScheme,
    output_scale: Tensor,
    output_zero_point: Tensor,
    output_scheme: QuantizationScheme,
) -> Tensor:
    """The output's code for each of the 256 codes of the input's dtype, the lowest first; None for the identity.

    The function is evaluated in float64 and its value rounded to float32, which for a sum, a product or a quotient is
    the float32 result, and for anything else the same on every device.
    """
    values = grid_values(input_scale, input_zero_point, input_scheme)
    if function is not None:
        values = function_values(function, values)
    return quantize_values(values, output_scale, output_zero_point, output_scheme)


def grid_values(scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Tensor:
    """The values of all 256 codes of the scheme's dtype, the lowest first."""
    ends = torch.iinfo(scheme.dtype)
    codes = torch.arange(ends.min, ends.max + 1, device=scale.device)
    return dequantize_codes(codes, scale, zero_point, None)


def function_values(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """A function of each value, as a :func:`lookup_table` takes it: computed in float64."""
    with torch.autocast(values.device.type, enabled=False):
        return function(values.double()).to(torch.float32)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """The entries of a :func:`lookup_table` at uint8 or int8 codes."""
    return table[codes.to(torch.int64) - torch.iinfo(codes.dtype).min]


def codes_of_clip(
    clip: tuple[float, float], scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """The codes that a range of values saturates at; infinite ends are the ends of the grid."""
    lowest, highest = (code_of_value(end, scale, zero_point, scheme) for end in clip)
    return lowest, highest


def code_of_value(value: float, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Tensor:
    """The code nearest to one real value, saturated (infinity included); shape of ``scale``."""
    return unsaturated_codes(torch.full_like(scale, value), scale, zero_point).clamp_(
        scheme.quant_min, scheme.quant_max
    )


def range_to_scale_and_zero_point(
    minimum: Tensor, maximum: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    r"""The finest grid that covers ``[minimum, maximum]`` and holds zero exactly.

    Affine: :math:`s = (max - min) / (q_{max} - q_{min})`, :math:`z = \mathrm{rne}(q_{min} - min / s)`. Symmetric: the
    smallest scale whose grid covers both ends. A range of no width (all zeros) gets scale 1.
    """
    zero = scheme.symmetric_zero_point if scheme.symmetric else None
    return range_to_parameters(minimum, maximum, scheme.quant_min, scheme.quant_max, zero)


def range_to_parameters(
    minimum: Tensor, maximum: Tensor, lowest: int, highest: int, zero: int | None
) -> tuple[Tensor, Tensor]:
    """:func:`range_to_scale_and_zero_point` for codes from ``lowest`` to ``highest``; ``zero`` is the zero point of a
    symmetric grid, and None for an affine one."""
    minimum = minimum.to(torch.float32).clamp(max=0.0)
    maximum = maximum.to(torch.float32).clamp(min=0.0)
    if zero is not None:
        scale = maximum / (highest - zero)
        if lowest < zero:
            scale = torch.maximum(scale, minimum / (lowest - zero))
    else:
        # Halved before subtracting: max - min of two large finite values may be infinite.
        scale = (maximum * 0.5 - minimum * 0.5) / ((highest - lowest) * 0.5)
    scale = torch.where(scale > 0, scale.clamp(SMALLEST_SCALE, LARGEST_SCALE), 1.0)
    if zero is not None:
        return scale, torch.full_like(scale, zero)
    return scale, torch.round(lowest - minimum / scale).clamp(lowest, highest)


def finite_range(minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """A range whose ends that were never seen are 0."""
    return torch.where(torch.isfinite(minimum), minimum, 0.0), torch.where(torch.isfinite(maximum), maximum, 0.0)
