"""Transposed convolutions as a file states them: as such, or, where an engine has no integer form of that, as ordinary
convolutions of more output channels or of a spread-out input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..int8.layers import Int8ConvTranspose2d
from ..kernels.subpixel import subpixel_convolution
from . import qdq_operators as operators
from .qdq_layers import QDQLayer, Weights


def transposed_convolution(layer: Int8ConvTranspose2d, on_codes: bool) -> nn.Module:
    """The form for an engine: ONNX Runtime, which wants operations on codes, has no integer ``ConvTranspose``."""
    if not on_codes:
        return QDQConvTranspose(layer, on_codes)
    if set(layer.geometry.dilation) == {1} and len(set(layer.geometry.stride)) == 1:
        return QDQSubpixelConvolution(layer, on_codes)
    return QDQSpreadConvolution(layer, on_codes)


class _Transposed(QDQLayer):
    def forward(self, codes: Tensor) -> Tensor:
        """(N, I, H, W) to (N, O, H', W'), or the same without N."""
        if codes.dim() == 4:
            return self.on_batch(codes)
        output = self.on_batch(self.input.move(codes, lambda values: values.unsqueeze(0)))
        return self.move_output(output, tuple(output.shape[1:]))

    def on_batch(self, codes: Tensor) -> Tensor:
        """(N, I, H, W) to (N, O, H', W')."""
        raise NotImplementedError


class QDQConvTranspose(_Transposed):
    """A transposed convolution as such."""

    def __init__(self, layer: Int8ConvTranspose2d, on_codes: bool) -> None:
        super().__init__(layer, on_codes)
        self.weights = Weights(layer.weight, layer.weight_scale, layer.bias, layer.input_scale, axis=1)
        self.geometry = layer.geometry
        self.output_padding = layer.output_padding

    def on_batch(self, codes: Tensor) -> Tensor:
        """(N, I, H, W) to (N, O, H', W')."""
        stride, padding, dilation, groups = self.geometry
        weight, bias = self.weights()
        values = self.input.dequantize(codes)
        return self.to_output(
            F.conv_transpose2d(values, weight, bias, stride, padding, self.output_padding, groups, dilation)
        )


class QDQSubpixelConvolution(_Transposed):
    """A convolution whose output channels are shuffled into place."""

    def __init__(self, layer: Int8ConvTranspose2d, on_codes: bool) -> None:
        super().__init__(layer, on_codes)
        (stride, _), padding, _, _ = layer.geometry
        self.subpixel = subpixel_convolution(
            layer.weight, stride, (padding[0], padding[1]), (layer.output_padding[0], layer.output_padding[1])
        )
        scale, bias = (values.repeat_interleave(stride * stride) for values in (layer.weight_scale, layer.bias))
        self.weights = Weights(self.subpixel.weight, scale, bias, layer.input_scale)

    def on_batch(self, codes: Tensor) -> Tensor:
        """(N, I, H, W) to (N, O, H', W')."""
        weight, bias = self.weights()
        values = self.input.dequantize(codes)
        phases = self.to_output(F.conv2d(values, weight, bias, padding=self.subpixel.padding))
        if self.output is None:
            return self.subpixel.shuffled(phases)
        stride, (top, bottom, left, right) = self.subpixel.stride, self.subpixel.crop
        shuffled = self.output.grid.move(phases, lambda values: F.pixel_shuffle(values, stride))
        height, width = shuffled.shape[-2:]
        if not any(self.subpixel.crop):
            return shuffled
        return self.output.grid.move(shuffled, lambda values: values[..., top : height - bottom, left : width - right])


class QDQSpreadConvolution(_Transposed):
    """A convolution of the input with zeros between its values, for any strides and dilation."""

    def __init__(self, layer: Int8ConvTranspose2d, on_codes: bool) -> None:
        super().__init__(layer, on_codes)
        self.stride, padding, self.dilation, _ = layer.geometry
        kernel = layer.weight.shape[2:]
        self.weights = Weights(
            layer.weight.transpose(0, 1).flip(2, 3), layer.weight_scale, layer.bias, layer.input_scale
        )
        reach = [size * (length - 1) for size, length in zip(self.dilation, kernel, strict=True)]
        self.before = [length - cut for length, cut in zip(reach, padding, strict=True)]
        self.after = [
            length + more - (step - 1)  # the zeros that follow the last value are there already
            for length, more, step in zip(self.before, layer.output_padding, self.stride, strict=True)
        ]

    def on_batch(self, codes: Tensor) -> Tensor:
        """(N, I, H, W) to (N, O, H', W')."""
        _, channels, height, width = codes.shape
        rows, columns = self.stride
        codes = self.input.move(codes, lambda values: values.reshape(-1, channels, height, 1, width, 1))
        codes = self._padded(codes, [0] * 6, [0, 0, 0, rows - 1, 0, columns - 1])
        codes = self.input.move(codes, lambda values: values.reshape(-1, channels, height * rows, width * columns))
        codes = self._padded(codes, [0, 0, *self.before], [0, 0, *self.after])
        weight, bias = self.weights()
        values = self.input.dequantize(codes)
        return self.to_output(F.conv2d(values, weight, bias, dilation=self.dilation))

    def _padded(self, codes: Tensor, before: list[int], after: list[int]) -> Tensor:
        return operators.pad_codes(codes, self.input.zero_point, before, after, "constant")
