r"""Integer products with what follows them: codes in, codes (or floats) out, in one step where a kernel does it in one.

A product (:mod:`.integer_products`) gives exact sums. :class:`Epilogue` says what becomes of them,

.. math:: q_y = \mathrm{rne}(\mathrm{clamp}((a + b)\, m,\ q_{low} - z,\ q_{high} - z)) + z
   \qquad\text{or}\qquad y = \mathrm{clamp}((a + b)\, m,\ low,\ high),

and :class:`IntegerLayer` does both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import arithmetic
from .exact_floats import EXACT_IN_FLOAT32
from .native import has_integer_layers, operators, use_native
from .onednn import ConvolutionGeometry
from .operations import along_channels, requantize, with_bias


@dataclass(frozen=True)
class Epilogue:
    """What a layer does to its sums.

    Args:
        bias: int32, (O,).
        multiplier: float32, (O,) or (1,): from the accumulator's grid to the output's, or to values.
        zero_point: of the output's codes.
        lowest, highest: the codes, or the values, that the output saturates at.
        dtype: of the output: ``torch.uint8`` or ``torch.int8`` for codes, ``torch.float32`` for values.
    """

    bias: Tensor
    multiplier: Tensor
    zero_point: int = 0
    lowest: float = -math.inf
    highest: float = math.inf
    dtype: torch.dtype = torch.float32

    def __call__(self, sums: Tensor, bias: Tensor, channel_axis: int) -> Tensor:
        """Sums to codes or values; ``bias`` is this one's, in the dtype to accumulate in (see :func:`requantize`)."""
        if self.dtype.is_floating_point:
            accumulator = with_bias(sums, bias, channel_axis)
            multiplier = along_channels(self.multiplier, sums, channel_axis)
            return arithmetic.rescale_accumulator(accumulator, multiplier).clamp_(self.lowest, self.highest)
        return requantize(
            sums,
            bias,
            self.multiplier,
            self.zero_point,
            int(self.lowest),
            int(self.highest),
            self.dtype,
            channel_axis,
        )


class Convolution2d(NamedTuple):
    """A product as a 2-d convolution: ``weight`` (O, I / groups, height, width) and where it is applied."""

    weight: Tensor
    geometry: ConvolutionGeometry


class Product(Protocol):
    """Exact sums of a layer; a bound on them; and the input's zero point and dtype.

    Attributes:
        channel_axis: of the sums.
    """

    weight: Tensor
    zero_point: int
    dtype: torch.dtype
    bound: int
    channel_axis: int

    def __call__(self, codes: Tensor) -> Tensor: ...

    def as_convolution(self) -> Convolution2d | None:
        """The 2-d convolution that this is, if it is one."""


class IntegerLayer:
    """A product and its epilogue.

    Raises:
        OverflowError: a sum may exceed int32.
    """

    def __init__(self, product: Product, epilogue: Epilogue) -> None:
        self.product = product
        self.epilogue = epilogue
        bound = product.bound + int(epilogue.bias.to(torch.int64).abs().max())
        if bound >= 2**31:
            raise OverflowError(f"sums of a weight of shape {tuple(product.weight.shape)} may exceed int32")
        # Float sums that stay exact with the bias need not become integers first.
        self.float_bias = epilogue.bias.to(torch.float32) if bound < EXACT_IN_FLOAT32 else epilogue.bias
        self.native = _pack_native(product, epilogue)
        self.operator = operators.get("linear" if product.channel_axis == -1 else "convolution")

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes to codes, or to float32 values."""
        if self.native is not None and use_native(codes):
            output: Tensor = self.operator(codes, self.native)  # type: ignore[misc]
            return output
        sums = self.product(codes)
        bias = self.float_bias if sums.is_floating_point() else self.epilogue.bias
        return self.epilogue(sums, bias, self.product.channel_axis)


def _pack_native(product: Product, epilogue: Epilogue) -> Tensor | None:
    """The layer in the form that the compiled kernels run, where they do."""
    convolution = product.as_convolution()
    if convolution is None or convolution.weight.device.type != "cpu" or not has_integer_layers():
        return None
    weight, geometry = convolution
    depthwise = geometry.groups == weight.shape[0] and weight.shape[1] == 1
    if geometry.groups != 1 and not depthwise:
        return None
    packed: Tensor = operators["pack_layer"](
        weight,
        epilogue.bias,
        epilogue.multiplier,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        product.zero_point,
        product.dtype,
        epilogue.zero_point,
        epilogue.lowest,
        epilogue.highest,
        epilogue.dtype,
    )
    return packed
