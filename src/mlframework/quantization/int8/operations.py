"""What stands between integer layers: into codes, out of codes, and operations on codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..parameters import QuantizationParameters
from .instruction import FLOATS, Instruction, Settings
from .integer_module import IntegerModule, PackedModule
from .integer_operation import Grid, IntegerOperation


class _OnGrid(IntegerModule):
    """Holds the parameters of one grid, per tensor or per channel."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, parameters: QuantizationParameters) -> None:
        super().__init__()
        self.scheme = parameters.scheme
        self.register_grid("", parameters)

    def to_codes(self, values: Tensor) -> Tensor:
        """Codes of float values.

        Raises:
            TypeError: the values are not floating point.
        """
        if not values.is_floating_point():
            raise TypeError(f"input must be a floating-point tensor, got {values.dtype}")
        return kernels.quantize(values, self.scale, self.zero_point, self.scheme)

    def to_values(self, codes: Tensor) -> Tensor:
        """The float values of codes: computed in float32, in the dtype of the model around."""
        return kernels.dequantize(codes, self.scale, self.zero_point, self.scheme.channel_axis, self.float_dtype)

    def _read_by_kernels(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point; None where they have come to have dtypes that the compiled kernels do not read."""
        is_read = self.scale.dtype is torch.float32 and self.zero_point.dtype is torch.int32
        return (self.scale, self.zero_point) if is_read else None

    def extra_repr(self) -> str:
        return str(self.scheme)


class Quantize(_OnGrid):
    """Float values to codes.

    Raises:
        TypeError: the values are not floating point.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.to_codes(input)

    @property
    def instruction_name(self) -> str | None:
        return "quantize" if self.scheme.channel_axis is None else None

    def instruction(self) -> Instruction | None:
        scheme, tensors = self.scheme, self._read_by_kernels()
        numbers = scheme.quant_min, scheme.quant_max, scheme.dtype.is_signed
        return None if tensors is None else Instruction("quantize", tensors, numbers)

    def inverse(self, codes: Tensor) -> Tensor:
        """What :class:`Dequantize` makes of codes on the same grid."""
        return self.to_values(codes)


class Dequantize(_OnGrid):
    """Codes to float values: computed in float32, in the dtype of the model around."""

    def forward(self, codes: Tensor) -> Tensor:
        return self.to_values(codes)

    @property
    def instruction_name(self) -> str | None:
        return "dequantize" if self.scheme.channel_axis is None else None

    def instruction(self) -> Instruction | None:
        tensors = self._read_by_kernels()
        return None if tensors is None else Instruction("dequantize", tensors, (FLOATS[self.float_dtype],))

    def inverse(self, values: Tensor) -> Tensor:
        """What :class:`Quantize` makes of values on the same grid."""
        return self.to_codes(values)


class Int8ReLU(_OnGrid):
    """ReLU on codes, on the grid that they are on: no code below that of zero."""

    def forward(self, codes: Tensor) -> Tensor:
        axis = self.scheme.resolve_channel_axis(codes.dim())
        return torch.maximum(codes, arithmetic.along_axis(self.zero_point.to(codes.dtype), codes.dim(), axis))


class Int8Selection(_OnGrid):
    """An operation that moves or selects values or pads with zeros, on codes: they stay on their grid.

    PyTorch has such operations (max pooling, padding by reflection, ...) for floats; codes are exact in float32, and
    with the zero point taken off, what the operation takes for zero is zero.

    Args:
        parameters: of the input, and so of the output.
        selection: the operation on floats.
    """

    def __init__(self, parameters: QuantizationParameters, selection: nn.Module) -> None:
        super().__init__(parameters)
        self.selection = selection

    def forward(self, codes: Tensor, *others: Any) -> Tensor:
        selection = self.selection
        if type(selection) is nn.MaxPool2d:
            shape = (selection.kernel_size, selection.stride, selection.padding, selection.dilation)
            return kernels.max_pool2d(codes, *shape, selection.ceil_mode)
        selected: Tensor = selection(codes.to(torch.float32) - self.zero_point, *others)
        return (selected + self.zero_point).to(codes.dtype)

    @property
    def instruction_name(self) -> str | None:
        return "max_pool2d" if type(self.selection) is nn.MaxPool2d else None

    def instruction(self) -> Instruction | None:
        pool: Any = self.selection
        pairs = (kernels.pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
        return Instruction("max_pool2d", numbers=(*itertools.chain(*pairs), pool.ceil_mode))

    def settings(self) -> tuple[Settings, ...]:
        return (Settings(self.selection, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),)


class _OperationPlan(NamedTuple):
    constants: tuple[Tensor, ...]
    output: Grid
    ends: tuple[int, int]


class Int8Operation(PackedModule[_OperationPlan]):
    """An operation other than a layer, on codes.

    Args:
        operation: what it computes.
        inputs: parameters of the operands, per tensor.
        output: parameters of the result, per tensor.
        clip: the range of the activation that follows, (0, inf) for a ReLU; only for an operation that ``clips``.
    """

    output_scale: Tensor
    output_zero_point: Tensor

    def __init__(
        self,
        operation: IntegerOperation,
        inputs: Sequence[QuantizationParameters],
        output: QuantizationParameters,
        clip: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        super().__init__()
        self.operation = operation
        self.clip = clip
        self.input_schemes = tuple(parameters.scheme for parameters in inputs)
        self.output_scheme = output.scheme
        for index, parameters in enumerate(inputs):
            self.register_grid(f"input_{index}_", parameters)
        self.register_grid("output_", output)

    @property
    def input_parameters(self) -> tuple[QuantizationParameters, ...]:
        """The grids of the operands."""
        return tuple(
            QuantizationParameters(
                getattr(self, f"input_{index}_scale"), getattr(self, f"input_{index}_zero_point"), scheme
            )
            for index, scheme in enumerate(self.input_schemes)
        )

    @property
    def output_parameters(self) -> QuantizationParameters:
        """The grid of the result."""
        return QuantizationParameters(self.output_scale, self.output_zero_point, self.output_scheme)

    def _make_plan(self) -> _OperationPlan:
        inputs = [Grid.of(grid.scale, grid.zero_point, grid.scheme) for grid in self.input_parameters]
        output = Grid.of(self.output_scale, self.output_zero_point, self.output_scheme)
        lowest, highest = (int(end) for end in arithmetic.codes_of_clip(self.clip, *output))
        return _OperationPlan(self.operation.constants(inputs, output), output, (lowest, highest))

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes of the operands' grids to codes of the result's."""
        plan = self.pack()
        return self.operation.on_codes(codes, plan.constants, plan.output, plan.ends)

    @property
    def instruction_name(self) -> str | None:
        return self.operation.instruction_name if self.operation.has_instruction() else None

    def instruction(self) -> Instruction | None:
        return self.operation.instruction(*self.pack())

    def settings(self) -> tuple[Settings, ...]:
        return Settings(self.operation, ()), *self.operation.settings()

    def extra_repr(self) -> str:
        clip = "" if self.clip == (-math.inf, math.inf) else f", clip={self.clip}"
        return f"{self.operation} -> {self.output_scheme}{clip}"


class _Dequantized(Tensor):
    """Values of codes."""


class Int8WithFloatEdges(nn.Module):
    """An integer layer between floats: quantizes what comes in and dequantizes what goes out.

    The code around it was written for a float layer: the attributes that it may ask for (``stride``) are that layer's.

    Args:
        quantize: puts the input on codes; None where the layer takes indices.
        layer: the integer layer.
        dequantize: takes the output off codes; None where the layer's output is float.
        weight_axis: the axis of the weight that the output's channels lie along.
        attributes: of the float layer.
    """

    def __init__(
        self,
        quantize: Quantize | None,
        layer: nn.Module,
        dequantize: Dequantize | None,
        weight_axis: int = 0,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (attributes or {}).items():
            setattr(self, name, value)
        self.quantize = quantize
        self.layer = layer
        self.dequantize = dequantize
        self.weight_axis = weight_axis

    @property
    def weight(self) -> Tensor:
        """The float values that the weight's codes stand for."""
        layer: Any = self.layer
        scale = arithmetic.along_axis(layer.weight_scale, layer.weight.dim(), self.weight_axis)
        return (layer.weight * scale).to(layer.float_dtype)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor:
        """The float values that the bias stands for, of a class of their own: PyTorch's encoder layers go past the
        calls of layers whose tensors are plain ones, and compute with them in floats."""
        layer: Any = self.layer
        if "bias" not in layer._buffers:
            raise AttributeError(f"{type(layer).__name__} has no bias")
        values: Tensor = (layer.bias * (layer.input_scale * layer.weight_scale)).to(layer.float_dtype)
        return values.as_subclass(_Dequantized)

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
