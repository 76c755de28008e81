r"""Sums :math:`\sum (q_x - z_x)\, q_w` of linear layers and convolutions: what they are, apart from who computes them.

A product holds the weight and knows its own arithmetic in PyTorch's operations; backends (:mod:`.backends`) compute it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import POINTWISE, ConvolutionGeometry, is_dense_or_depthwise
from .subpixel import SubpixelConvolution, subpixel_convolution


class Description(NamedTuple):
    """What of a layer says who can run it.

    Attributes:
        kind: the class of product of product.
        weight: its shape.
        geometry: of a convolution.
        dtype: of the input's codes.
        bound: on the magnitude of any sum.
        device: the type of the device that it lies on.
    """

    kind: str
    weight: tuple[int, ...]
    geometry: ConvolutionGeometry | None
    dtype: torch.dtype
    bound: int
    device: str

    @property
    def is_dense_or_depthwise(self) -> bool:
        """Whether every output channel reads all input channels, or every one its own."""
        groups = 1 if self.geometry is None else self.geometry.groups
        return is_dense_or_depthwise(self.weight, groups)


class Convolution2d(NamedTuple):
    """A product as a 2-d convolution: ``weight`` (O, I / groups, height, width) and where it is applied."""

    weight: Tensor
    geometry: ConvolutionGeometry


class Product(ABC):
    """Exact sums of a layer.

    Args:
        weight: codes, int8.
        zero_point: the input's.
        dtype: of the input's codes, ``torch.int8`` or ``torch.uint8``.

    Attributes:
        bound: on the magnitude of any sum.
        channel_axis: of the sums.
    """

    channel_axis: ClassVar[int]

    def __init__(self, weight: Tensor, zero_point: int, dtype: torch.dtype) -> None:
        self.weight = weight
        self.zero_point = zero_point
        self.dtype = dtype
        self.bound = largest_sum(self.outputs_first(), zero_point, dtype)

    @property
    @abstractmethod
    def description(self) -> Description:
        """What a backend is chosen by."""

    @abstractmethod
    def on_floats(self, values: Tensor, weight: Tensor) -> Tensor:
        """The operation in PyTorch, on floats of any dtype."""

    def outputs_first(self) -> Tensor:
        """The weight with the output's channels as axis 0, as far as sums are bounded by it."""
        return self.weight

    def as_convolution(self) -> Convolution2d | None:
        """The 2-d convolution that this is, if it is one."""
        return None

    def _describe(self, geometry: ConvolutionGeometry | None) -> Description:
        shape = tuple(self.weight.shape)
        return Description(type(self).__name__, shape, geometry, self.dtype, self.bound, self.weight.device.type)


class LinearProduct(Product):
    """Of a linear layer: weight (O, I), codes (*, I) to sums (*, O)."""

    channel_axis = -1

    @property
    def description(self) -> Description:
        return self._describe(None)

    def on_floats(self, values: Tensor, weight: Tensor) -> Tensor:
        return F.linear(values, weight)

    def as_convolution(self) -> Convolution2d:
        return Convolution2d(self.weight[:, :, None, None], POINTWISE)


class ConvolutionProduct(Product):
    """Of a 1-d, 2-d or 3-d convolution: weight (O, I / groups, *kernel), codes (N, I, *size) to sums (N, O, *size')."""

    channel_axis = 1

    def __init__(self, weight: Tensor, zero_point: int, dtype: torch.dtype, geometry: ConvolutionGeometry) -> None:
        super().__init__(weight, zero_point, dtype)
        self.geometry = geometry

    @property
    def description(self) -> Description:
        return self._describe(self.geometry)

    def on_floats(self, values: Tensor, weight: Tensor) -> Tensor:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return convolution(values, weight, None, *self.geometry)

    def as_convolution(self) -> Convolution2d | None:
        """This one, if it is 2-d, or 1-d as one that is a row high; None in 3-d."""
        if self.weight.dim() > 4:
            return None
        weight = self.weight.unsqueeze(2) if self.weight.dim() == 3 else self.weight
        return Convolution2d(weight, self.geometry.as_2d())


class TransposedProduct(Product):
    """Of a 2-d transposed convolution: weight (I, O / groups, height, width), codes (N, I, H, W) to (N, O, H', W').

    Args:
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
        super().__init__(weight, zero_point, dtype)
        self.geometry = geometry
        self.output_padding = output_padding

    @property
    def description(self) -> Description:
        return self._describe(self.geometry)

    def outputs_first(self) -> Tensor:
        # Every tap of every input channel may meet in one output.
        return self.weight.transpose(0, 1)

    def on_floats(self, values: Tensor, weight: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        return F.conv_transpose2d(values, weight, None, stride, padding, self.output_padding, groups, dilation)

    @functools.cached_property
    def phases(self) -> tuple[SubpixelConvolution, ConvolutionProduct] | None:
        """The convolution that computes the phases (:mod:`.subpixel`), if this is one that has it: with one stride for
        both axes, no dilation and no groups."""
        stride, padding, dilation, groups = self.geometry
        if groups != 1 or set(dilation) != {1} or len(set(stride)) != 1:
            return None
        subpixel = subpixel_convolution(
            self.weight, stride[0], (padding[0], padding[1]), (self.output_padding[0], self.output_padding[1])
        )
        geometry = ConvolutionGeometry((1, 1), subpixel.padding, (1, 1))
        return subpixel, ConvolutionProduct(subpixel.weight, self.zero_point, self.dtype, geometry)


def largest_sum(weight: Tensor, zero_point: int, dtype: torch.dtype) -> int:
    """A bound on the magnitude of any sum: weight codes with outputs first, input codes of that dtype."""
    # The magnitude of -128, which is no int8, is -128 again, and 128 as a uint8.
    magnitudes = weight.abs().view(torch.uint8)
    return int(magnitudes.flatten(1).sum(dim=1, dtype=torch.int32).max()) * largest_code(zero_point, dtype)


def largest_code(zero_point: int, dtype: torch.dtype) -> int:
    """The largest magnitude of a code less the zero point."""
    codes = torch.iinfo(dtype)
    return max(codes.max - zero_point, zero_point - codes.min)
