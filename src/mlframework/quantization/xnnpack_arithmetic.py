"""The formulas of XNNPACK that differ from those of :mod:`.arithmetic`, which otherwise are its own.

XNNPACK's layers requantize as :func:`.arithmetic.requantize_accumulator` does (its "fp32" requantization). Sums are in
fixed point; what converts floats to codes multiplies by the reciprocal of the scale where ``arithmetic`` divides.
Source: XNNPACK at 92a7ad5 (of ExecuTorch 1.5), ``src/microparams-init.c`` and the scalar kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import arithmetic
from .scheme import QuantizationScheme

_MULTIPLIER_BITS = 20  # of the larger ratio's multiplier, which lies in [2**20, 2**21)
_LARGEST_SHIFT = 30
# Ratios of scales that XNNPACK takes, from the first to below the second; it refuses others when a program is loaded.
SUM_RATIOS = 2.0**-10, 2.0**8  # of an operand's to the output's
PRODUCT_RATIOS = 2.0**-16, 2.0**8  # of the product of the operands' to the output's


def fixed_point_sum_constants(
    left_scale: Tensor, left_zero_point: Tensor, right_scale: Tensor, right_zero_point: Tensor, output_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The multipliers, the bias and the shift of :func:`fixed_point_sum`, int32.

    With :math:`r_a = s_a / s_y`, :math:`r_b = s_b / s_y` and the shift :math:`k = 20 - \lfloor \log_2 \max(r_a, r_b)
    \rfloor`: multipliers :math:`m = \mathrm{rne}(2^k r)` and the bias :math:`2^{k-1} - m_a z_a - m_b z_b`.
    """
    ratios = left_scale / output_scale, right_scale / output_scale
    exponent = torch.frexp(torch.maximum(*ratios)).exponent - 1  # frexp's mantissas begin at one half
    shift = (_MULTIPLIER_BITS - exponent).clamp(1, _LARGEST_SHIFT).to(torch.int32)
    left, right = (
        torch.ldexp(ratio, shift).round().clamp(max=2.0 ** (_MULTIPLIER_BITS + 1)).to(torch.int32) for ratio in ratios
    )
    rounding = torch.ones_like(shift) << (shift - 1)
    bias = rounding - left * left_zero_point.to(torch.int32) - right * right_zero_point.to(torch.int32)
    return left, right, bias, shift


def fixed_point_sum(
    left: Tensor,
    right: Tensor,
    constants: tuple[Tensor, ...],
    zero_point: int | Tensor,
    lowest: int | Tensor,
    highest: int | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    r"""The sum of two quantized tensors: :math:`\lfloor (m_a q_a + m_b q_b + \mathrm{bias}) / 2^k \rfloor + z_y`.

    Half a step is in the bias, so that ties are rounded up. The two ends are both numbers or both tensors.
    """
    left_multiplier, right_multiplier, bias, shift = constants
    total = left.to(torch.int32) * left_multiplier + (right.to(torch.int32) * right_multiplier + bias)
    return (total >> shift).add_(zero_point).clamp(lowest, highest).to(dtype)  # type: ignore[arg-type]


def reciprocal_table(
    input_scale: Tensor,
    input_zero_point: Tensor,
    input_scheme: QuantizationScheme,
    output_scale: Tensor,
    output_zero_point: Tensor,
    output_scheme: QuantizationScheme,
) -> Tensor:
    """The output's code for each code of an input on another grid: dequantized, multiplied by ``1 / sy``, rounded."""
    values = arithmetic.grid_values(input_scale, input_zero_point, input_scheme) * (1 / output_scale)
    return arithmetic.quantize_values(values, torch.ones_like(output_scale), output_zero_point, output_scheme)


def average_multiplier(input_scale: Tensor, output_scale: Tensor, count: Tensor) -> Tensor:
    """Of a depthwise convolution with weights of ``1 / n``: ``(sx (1 / n)) / sy``."""
    return (input_scale * (1 / count.to(torch.float32))) / output_scale
