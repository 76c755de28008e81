"""Operations on codes as XNNPACK computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import arithmetic, xnnpack_arithmetic
from .average_pooling import AveragePooling
from .integer_operation import Addition, Concatenation, Ends, Grid, Multiplication


class FixedPointAddition(Addition):
    """The sum of two tensors, as XNNPACK's ``qs8-vadd``: integers throughout; broadcasts."""

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        left, right = inputs
        return xnnpack_arithmetic.fixed_point_sum_constants(
            left.scale, left.zero_point, right.scale, right.zero_point, output.scale
        )

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        left, right = codes
        zero_point = output.zero_point.to(torch.int32)
        return xnnpack_arithmetic.fixed_point_sum(left, right, constants, zero_point, *ends, output.scheme.dtype)


class RoundedMultiplication(Multiplication):
    """The product of two tensors, as XNNPACK's ``qs8-vmul``: the zero point is added after rounding; broadcasts."""

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        left_zero_point, right_zero_point, ratio = constants
        product = (codes[0].to(torch.float32) - left_zero_point) * (codes[1].to(torch.float32) - right_zero_point)
        return arithmetic.requantize_accumulator(product, ratio, output.zero_point, *ends, output.scheme.dtype)


class ReciprocalConcatenation(Concatenation):
    """Tensors side by side, each brought to the output's grid by XNNPACK's conversions to float and back."""

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        return tuple(xnnpack_arithmetic.reciprocal_table(*grid, *output) for grid in inputs)

    @property
    def instruction_name(self) -> str | None:  # restated: the compiled kernels take any tables
        return super().instruction_name


class FloatMultiplierAverage(AveragePooling):
    """Averages as a depthwise convolution with weights of ``1 / n`` computes them."""

    multiplier_of = staticmethod(xnnpack_arithmetic.average_multiplier)

    @property
    def instruction_name(self) -> str | None:
        return None  # the compiled kernels have the other multiplier
