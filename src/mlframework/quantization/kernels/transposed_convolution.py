"""Exact sums of transposed convolutions: no integer kernel computes them, but one computes their phases."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact_floats import EXACT_IN_FLOAT32, WHOLE, largest_sum, sums_in_floating_point
from .integer_layer import Convolution2d, Epilogue, IntegerLayer
from .integer_products import PackedConvolution
from .native import use_native
from .onednn import ConvolutionGeometry
from .subpixel import SubpixelConvolution, subpixel_convolution


class PackedTransposedConvolution:
    """Sums of a 2-d transposed convolution.

    With one stride for both axes, no dilation and no groups it runs as the convolution of its phases
    (:mod:`.subpixel`), else in floating point wide enough to be exact.

    Args:
        weight: codes of shape (I, O / groups, height, width), int8.
        zero_point, dtype: of the input's codes.
        geometry: stride, padding, dilation, groups.
        output_padding: rows and columns that the output has besides.
    """

    channel_axis = 1

    def __init__(
        self,
        weight: Tensor,
        zero_point: int,
        dtype: torch.dtype,
        geometry: ConvolutionGeometry,
        output_padding: tuple[int, ...],
    ) -> None:
        self.weight = weight
        self.zero_point = zero_point
        self.dtype = dtype
        self.geometry = geometry
        self.output_padding = output_padding
        # Every tap of every input channel may meet in one output.
        self.bound = largest_sum(weight.transpose(0, 1), zero_point, dtype)

    @functools.cached_property
    def phases(self) -> tuple[SubpixelConvolution, PackedConvolution] | None:
        """The convolution that computes the phases, if this is a transposed convolution that has one."""
        stride, padding, dilation, groups = self.geometry
        if groups != 1 or set(dilation) != {1} or len(set(stride)) != 1:
            return None
        subpixel = subpixel_convolution(
            self.weight, stride[0], (padding[0], padding[1]), (self.output_padding[0], self.output_padding[1])
        )
        geometry = ConvolutionGeometry((1, 1), subpixel.padding, (1, 1))
        return subpixel, PackedConvolution(subpixel.weight, self.zero_point, self.dtype, geometry)

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (N, I, H, W) to sums (N, O, H', W')."""
        if not torch.compiler.is_compiling() and codes.numel() > 0 and self.phases is not None:
            subpixel, convolution = self.phases
            if convolution.packed:
                return subpixel.shuffled(convolution(codes))
        stride, padding, dilation, groups = self.geometry
        return sums_in_floating_point(
            lambda values, weight: F.conv_transpose2d(
                values, weight, None, stride, padding, self.output_padding, groups, dilation
            ),
            codes,
            self.zero_point,
            self.weight,
            WHOLE if self.bound < EXACT_IN_FLOAT32 else [],
        )

    def as_convolution(self) -> Convolution2d | None:
        """None: not without a shuffle of its output."""
        return None

    def followed_by(self, epilogue: Epilogue) -> TransposedLayer:
        """The layer that does this to the sums."""
        return TransposedLayer(self, epilogue)


class TransposedLayer:
    """A transposed convolution and its epilogue, which comes before the shuffle where compiled kernels do both.

    Raises:
        OverflowError: a sum may exceed int32.
    """

    def __init__(self, product: PackedTransposedConvolution, epilogue: Epilogue) -> None:
        self.whole = IntegerLayer(product, epilogue)
        self.phases: tuple[SubpixelConvolution, IntegerLayer] | None = None
        if product.phases is None:
            return
        subpixel, convolution = product.phases
        # A phase is a channel, with the bias and the multiplier of the channel that it is a phase of.
        bias, multiplier = (
            values.expand(product.weight.shape[1]).repeat_interleave(subpixel.stride**2)
            for values in (epilogue.bias, epilogue.multiplier)
        )
        layer = IntegerLayer(convolution, dataclasses.replace(epilogue, bias=bias, multiplier=multiplier))
        if layer.native is not None:
            self.phases = subpixel, layer

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes to codes, or to float32 values."""
        if self.phases is not None and use_native(codes):
            subpixel, layer = self.phases
            return subpixel.shuffled(layer(codes))
        return self.whole(codes)
