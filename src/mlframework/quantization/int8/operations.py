"""What stands between integer layers: into codes, out of codes, and sums of codes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import arithmetic
from ..parameters import QuantizationParameters
from .integer_module import IntegerModule, PackedModule


class _OnGrid(IntegerModule):
    """Holds the parameters of one grid, per tensor or per channel."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, parameters: QuantizationParameters) -> None:
        super().__init__()
        self.scheme = parameters.scheme
        self.register_grid("", parameters)

    def extra_repr(self) -> str:
        return str(self.scheme)


class Quantize(_OnGrid):
    """Float values to codes."""

    def forward(self, input: Tensor) -> Tensor:
        return arithmetic.quantize_values(input, self.scale, self.zero_point, self.scheme)


class Dequantize(_OnGrid):
    """Codes to float values: computed in float32, in the dtype of the model around."""

    def forward(self, codes: Tensor) -> Tensor:
        values = arithmetic.dequantize_codes(codes, self.scale, self.zero_point, self.scheme.channel_axis)
        return values.to(self.float_dtype)


class Int8ReLU(_OnGrid):
    """ReLU on codes, on the grid that they are on: no code below that of zero."""

    def forward(self, codes: Tensor) -> Tensor:
        axis = self.scheme.resolve_channel_axis(codes.dim())
        return torch.maximum(codes, arithmetic.along_axis(self.zero_point.to(codes.dtype), codes.dim(), axis))


class _SumPlan(NamedTuple):
    left_ratio: Tensor
    right_ratio: Tensor
    constant: Tensor
    lowest: int
    highest: int


class Int8Add(PackedModule[_SumPlan]):
    """The sum of two quantized tensors, as ONNX Runtime's ``QLinearAdd``; broadcasts.

    Args:
        left, right, output: parameters of the operands and of the sum, per tensor.
        clip: the range of the activation that follows, (0, inf) for a ReLU.
    """

    left_scale: Tensor
    left_zero_point: Tensor
    right_scale: Tensor
    right_zero_point: Tensor
    output_scale: Tensor
    output_zero_point: Tensor

    def __init__(
        self,
        left: QuantizationParameters,
        right: QuantizationParameters,
        output: QuantizationParameters,
        clip: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        super().__init__()
        self.output_scheme = output.scheme
        self.clip = clip
        self.register_grid("left_", left)
        self.register_grid("right_", right)
        self.register_grid("output_", output)

    def _make_plan(self) -> _SumPlan:
        constants = arithmetic.add_constants(
            self.left_scale,
            self.left_zero_point,
            self.right_scale,
            self.right_zero_point,
            self.output_scale,
            self.output_zero_point,
        )
        lowest, highest = (
            int(arithmetic.code_of_value(end, self.output_scale, self.output_zero_point, self.output_scheme))
            for end in self.clip
        )
        return _SumPlan(*constants, lowest, highest)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        plan = self.pack()
        return arithmetic.add_codes(
            left,
            plan.left_ratio,
            right,
            plan.right_ratio,
            plan.constant,
            plan.lowest,
            plan.highest,
            self.output_scheme.dtype,
        )

    def extra_repr(self) -> str:
        return str(self.output_scheme)


class Int8WithFloatEdges(nn.Module):
    """An integer layer between floats: quantizes what comes in and dequantizes what goes out.

    Args:
        quantize: puts the input on codes; None where the layer takes indices.
        layer: the integer layer.
        dequantize: takes the output off codes; None where the layer's output is float.
    """

    def __init__(self, quantize: Quantize | None, layer: nn.Module, dequantize: Dequantize | None) -> None:
        super().__init__()
        self.quantize = quantize
        self.layer = layer
        self.dequantize = dequantize

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.layer(input if self.quantize is None else self.quantize(input))
        return in_format_of(input, output if self.dequantize is None else self.dequantize(output))


def in_format_of(input: Tensor, output: Tensor) -> Tensor:
    """``output`` in the memory format that a float layer would give it: integer convolutions make channels-last."""
    return output.contiguous() if input.is_contiguous() else output


class OnGrid(nn.Module):
    """Float values rounded to a grid and returned as floats, as a quantized layer between floats returns them."""

    def __init__(self, parameters: QuantizationParameters) -> None:
        super().__init__()
        self.quantize = Quantize(parameters)
        self.dequantize = Dequantize(parameters)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.dequantize(self.quantize(input))
        return output
