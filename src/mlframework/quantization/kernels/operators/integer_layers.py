"""Layers of an evaluation: integer weights, given with the call or packed once, on codes (:mod:`.layer_sums`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import arithmetic
from ..geometry import ConvolutionGeometry, is_dense_or_depthwise
from .declaration import CODES, Operator, operator
from .layer_sums import GEOMETRY, Ints, exact_sums, geometry_arguments, output_like


@operator(
    "integer_layer(Tensor codes, Tensor zero_point, Tensor weight, Tensor bias, Tensor multiplier,"
    " Tensor? output_zero_point, Tensor? lowest, Tensor? highest, float clip_low, float clip_high, ScalarType dtype,"
    f" {GEOMETRY}) -> Tensor",
    CODES,
)
def _integer_layer(
    codes: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    output_zero_point: Tensor | None,
    lowest: Tensor | None,
    highest: Tensor | None,
    clip_low: float,
    clip_high: float,
    dtype: torch.dtype,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_padding: Ints | None = None,
) -> Tensor:
    sums = exact_sums(codes, zero_point, weight, (stride, padding, dilation, groups), output_padding)
    axis = (1 if stride else -1) % sums.dim()
    accumulator = sums + arithmetic.along_axis(bias, sums.dim(), axis)
    multiplier = arithmetic.along_axis(multiplier, sums.dim(), axis)
    if output_zero_point is None:
        return arithmetic.rescale_accumulator(accumulator, multiplier).clamp_(clip_low, clip_high)
    assert lowest is not None and highest is not None
    return arithmetic.requantize_accumulator(accumulator, multiplier, output_zero_point, lowest, highest, dtype)


@_integer_layer.fake
def _(
    codes: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    output_zero_point: Tensor | None,
    lowest: Tensor | None,
    highest: Tensor | None,
    clip_low: float,
    clip_high: float,
    dtype: torch.dtype,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    return output_like(codes, weight.shape[0], weight.shape[2:], (stride, padding, dilation, groups), dtype)


class OutputGrid(NamedTuple):
    """The grid of an output, and the codes that it saturates at; each of shape (1,)."""

    zero_point: Tensor
    lowest: Tensor
    highest: Tensor
    dtype: torch.dtype


def integer_layer(
    codes: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    output: OutputGrid | None,
    clip: tuple[float, float],
    geometry: ConvolutionGeometry | None,
    output_padding: Ints | None = None,
) -> Tensor:
    """A whole layer with integer weights that are given with the call: for graphs, which read nothing back.

    Args:
        codes: of the input, with a batch; ``zero_point``, of shape (1,), is theirs.
        weight, bias: int8, and int32 (O,).
        multiplier: float32 (O,) or (1,): from the accumulator's grid to the output's, or to values.
        output: None for float32 values, which saturate at the ends of ``clip``.
        geometry: of a convolution; None for a linear layer.
        output_padding: of a transposed convolution; None for any other layer.
    """
    grid = (None, None, None, *clip, torch.float32) if output is None else (*output[:3], *clip, output.dtype)
    arguments = (codes, zero_point, weight, bias, multiplier, *grid, *geometry_arguments(geometry))
    groups = 1 if geometry is None else geometry.groups
    is_compiled = weight.dim() <= 4 and is_dense_or_depthwise(weight.shape, groups)
    if output_padding is None and is_compiled:
        result: Tensor = _integer_layer(*arguments)
    else:
        result = _integer_layer.reference(*arguments, output_padding)
    return result


# Packed once for many calls, in an order that only the compiled kernels of this processor read.
pack_layer = Operator(
    "pack_layer(Tensor weight, Tensor? bias, Tensor multiplier, int[] stride, int[] padding, int[] dilation,"
    " int groups, int input_zero_point, ScalarType input_dtype, int zero_point, float lowest, float highest,"
    " ScalarType dtype) -> Tensor",
    None,
    (torch.int8,),
)

packed_layer = Operator(
    f"packed_layer(Tensor codes, Tensor packed, int channels, int[] kernel, {GEOMETRY}, ScalarType dtype) -> Tensor",
    None,
    CODES,
)


@packed_layer.fake
def _(
    codes: Tensor,
    packed: Tensor,
    channels: int,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    return output_like(codes, channels, kernel, (stride, padding, dilation, groups), dtype)
