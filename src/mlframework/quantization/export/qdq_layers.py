"""Integer layers as a file states them: the float operation between dequantize and quantize nodes, int8 weights.

Each maps codes to codes, as the integer layer that it stands for, so that it can take that layer's place in the
converted model; where the layer's output is float, so is its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..int8.layers import Int8Convolution, Int8Embedding, Int8Layer, Int8Linear
from . import qdq_operators as operators
from .grid_nodes import GridNodes, OutputNodes, in_dtype

_ONNX_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Weights(nn.Module):
    """int8 weights and int32 bias with their scales.

    Args:
        codes: int8, outputs along ``axis``.
        scale: float32, (O,).
        bias: int32, (O,).
        input_scale: float32; the bias is in units of ``input_scale * scale``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias_codes: Tensor
    bias_scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor, input_scale: Tensor, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("codes", codes.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int8))
        self.register_buffer("bias_codes", bias.clone())
        self.register_buffer("bias_scale", input_scale * scale)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as float values."""
        weight = operators.dequantize(self.codes, self.scale, self.zero_point, self.axis)
        return weight, operators.dequantize_bias(self.bias_codes, self.bias_scale)


class QDQLayer(nn.Module):
    """What the layers share: grids, weights, and the way to codes (or floats) at the end.

    Args:
        layer: whose place it takes.
        on_codes: see :class:`OutputNodes`.
    """

    def __init__(self, layer: Int8Layer, on_codes: bool) -> None:
        super().__init__()
        self.on_codes = on_codes
        self.clip = layer.clip
        self.float_dtype = layer.float_dtype
        self.input = GridNodes(layer.input_scale, layer.input_zero_point, layer.input_scheme)
        self.output: OutputNodes | None = None
        if layer.output_scheme is not None:
            assert layer.output_scale is not None and layer.output_zero_point is not None
            grid = GridNodes(layer.output_scale, layer.output_zero_point, layer.output_scheme)
            self.output = OutputNodes(grid, layer.clip, on_codes=on_codes)

    def to_output(self, values: Tensor) -> Tensor:
        """The operation's values to codes, or clipped as floats."""
        if self.output is not None:
            codes: Tensor = self.output(values)
            return codes
        low, high = self.clip
        if (low, high) == (0, math.inf):
            values = torch.relu(values)
        elif self.clip != (-math.inf, math.inf):
            values = values.clamp(low, high)
        return in_dtype(values, self.float_dtype)

    def move_output(self, output: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Codes or floats in another shape."""
        if self.output is None:
            return output.reshape(shape)
        return self.output.grid.move(output, lambda values: values.reshape(shape))


class QDQLinear(QDQLayer):
    """A linear layer as ``Gemm``, which has an integer form with a bias; more than two dimensions are folded into the
    first."""

    def __init__(self, layer: Int8Linear, on_codes: bool) -> None:
        super().__init__(layer, on_codes)
        self.weights = Weights(layer.weight, layer.weight_scale, layer.bias, layer.input_scale)

    def forward(self, codes: Tensor) -> Tensor:
        """(*, in_features) to (*, out_features)."""
        shape = codes.shape
        if codes.dim() != 2:
            codes = self.input.move(codes, lambda values: values.reshape(-1, shape[-1]))
        output = self.to_output(operators.gemm(self.input.dequantize(codes), *self.weights()))
        if len(shape) == 2:
            return output
        leading = (-1, *shape[1:-1]) if len(shape) > 2 else ()
        return self.move_output(output, (*leading, output.shape[-1]))


class QDQConvolution(QDQLayer):
    """A convolution of one, two or three dimensions."""

    def __init__(self, layer: Int8Convolution, on_codes: bool) -> None:
        super().__init__(layer, on_codes)
        self.weights = Weights(layer.weight, layer.weight_scale, layer.bias, layer.input_scale)
        self.geometry = layer.geometry
        self.padding = layer.padding
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    def forward(self, codes: Tensor) -> Tensor:
        """(N, I, *size) to (N, O, *size'), or the same without N."""
        unbatched = codes.dim() == len(self.geometry.stride) + 1
        if unbatched:
            codes = self.input.move(codes, lambda values: values.unsqueeze(0))
        if self.padding:
            codes = self._pad(codes)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.geometry.stride) - 1]
        weight, bias = self.weights()
        output = self.to_output(convolution(self.input.dequantize(codes), weight, bias, *self.geometry))
        return self.move_output(output, tuple(output.shape[1:])) if unbatched else output

    def _pad(self, codes: Tensor) -> Tensor:
        """What no kernel of a convolution pads by itself."""
        if not self.on_codes:
            pad = _wrapped if self.mode == "circular" else F.pad
            return self.input.move(codes, lambda values: pad(values, self.padding, mode=self.mode))
        # Of torch, the last dimension comes first.
        before, after = ([0, 0, *reversed(self.padding[side::2])] for side in (0, 1))
        return operators.pad_codes(codes, self.input.zero_point, before, after, _ONNX_MODES[self.mode])


def _wrapped(values: Tensor, padding: tuple[int, ...], mode: str) -> Tensor:
    """Circular padding by concatenation: few engines have the mode "wrap" of ``Pad``."""
    for index, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        axis = values.dim() - 1 - index
        size = values.shape[axis]
        parts = [values.narrow(axis, size - before, before), values, values.narrow(axis, 0, after)]
        values = torch.cat(parts, axis)
    return values


class QDQEmbedding(nn.Module):
    """Rows of an int8 table, dequantized after they are picked: the table stays int8."""

    table: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: Int8Embedding) -> None:
        super().__init__()
        self.float_dtype = layer.float_dtype
        self.per_row = layer.weight_scale.numel() > 1
        self.register_buffer("table", layer.weight.clone())
        self.register_buffer("scale", layer.weight_scale.reshape((-1, 1) if self.per_row else ()).clone())
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def forward(self, indices: Tensor) -> Tensor:
        """Indices (*) to rows (*, embedding_dim)."""
        rows = F.embedding(indices, self.table)
        if self.per_row:
            values = rows.to(torch.float32) * F.embedding(indices, self.scale)
        else:
            values = operators.dequantize(rows, self.scale, self.zero_point)
        return in_dtype(values, self.float_dtype)
