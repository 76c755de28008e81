"""Layers of an evaluation: integer weights, given with the call or packed once, on codes (:mod:`.layer_sums`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import arithmetic
from .. import devices
from ..geometry import POINTWISE, ConvolutionGeometry, is_dense_or_depthwise
from .declaration import CODES, Operator, operator
from .layer_sums import GEOMETRY, Ints, exact_sums, geometry_arguments, output_like

# What lowers an unsigned code to a signed one.
UNSIGNED_OFFSET = 128


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
    if geometry is None and torch.compiler.is_exporting():
        # A linear layer's geometry is empty lists, which the packages of AOTInductor hand to the operator as None.
        weight = weight[..., None, None]
        pixels = codes.reshape(-1, codes.shape[-1], 1, 1)
        each = integer_layer(pixels, zero_point, weight, bias, multiplier, output, clip, POINTWISE)
        return each.reshape(*codes.shape[:-1], weight.shape[0])
    grid = (None, None, None, *clip, torch.float32) if output is None else (*output[:3], *clip, output.dtype)
    arguments = (codes, zero_point, weight, bias, multiplier, *grid, *geometry_arguments(geometry))
    groups = 1 if geometry is None else geometry.groups
    has_kernel = devices.kernels_for(codes) == "triton" or is_dense_or_depthwise(weight.shape, groups)
    if output_padding is None and weight.dim() <= 4 and has_kernel:
        result: Tensor = _integer_layer(*arguments)
    else:
        result = _integer_layer.reference(*arguments, output_padding)
    return result


def fold_zero_point(
    weight: Tensor, bias: Tensor, zero_point: int | Tensor, input_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""A layer's weight and bias for products of int8 codes alone, which know no zero point.

    With codes :math:`q'_x` lowered by 128 where they are unsigned, and :math:`z'` the zero point lowered by as much,
    :math:`\sum (q_x - z_x)\, q_w = \sum q'_x q_w - z' \sum q_w`; integers wrap around, so that no part of it overflows.

    Returns:
        The weight as (O, *kernel, I / groups), contiguous, and the bias with the second sum in it, int32 (O,).
    """
    offset = UNSIGNED_OFFSET if input_dtype is torch.uint8 else 0
    difference = offset - (zero_point.to(torch.int32) if isinstance(zero_point, Tensor) else zero_point)
    sums = weight.flatten(1).sum(dim=1, dtype=torch.int32)
    return weight.movedim(1, -1).contiguous(), bias + sums * difference


@operator(
    "folded_layer(Tensor codes, int padding_code, Tensor weight, Tensor bias, Tensor multiplier, int zero_point,"
    f" float lowest, float highest, ScalarType dtype, {GEOMETRY}) -> Tensor",
    (),
)
def folded_layer(
    codes: Tensor,
    padding_code: int,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    zero_point: int,
    lowest: float,
    highest: float,
    dtype: torch.dtype,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """A layer with weight and bias of :func:`fold_zero_point`, as kernels for GPUs read them.

    Args:
        codes: of the input, with a batch; ``padding_code`` is their zero point.
        multiplier: float32, (O,) or (1,).
        zero_point, lowest, highest: of the output's codes, or of its values, which have no zero point.
        dtype: of the output.
    """
    geometry = stride, padding, dilation, groups
    oriented = weight.movedim(-1, 1)
    # These sums are of codes less their zero point: the bias loses the (offset - zero point) * sum(weight) in it.
    offset = UNSIGNED_OFFSET if codes.dtype is torch.uint8 else 0
    bias = fold_zero_point(oriented, bias, offset - padding_code, torch.int8)[1]
    sums = exact_sums(codes, padding_code, oriented, geometry)
    axis = (1 if stride else -1) % sums.dim()
    accumulator = sums + arithmetic.along_axis(bias, sums.dim(), axis)
    factor = arithmetic.along_axis(multiplier, sums.dim(), axis)
    if dtype.is_floating_point:
        return arithmetic.rescale_accumulator(accumulator, factor).clamp_(lowest, highest).to(dtype)
    return arithmetic.requantize_accumulator(accumulator, factor, zero_point, int(lowest), int(highest), dtype)


@folded_layer.fake
def _(
    codes: Tensor,
    padding_code: int,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    zero_point: int,
    lowest: float,
    highest: float,
    dtype: torch.dtype,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    return output_like(codes, weight.shape[0], weight.shape[1:-1], (stride, padding, dilation, groups), dtype)


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
