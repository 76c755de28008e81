"""Layers of a training step: float weights, quantized for one call, on the codes of an input (:mod:`.layer_sums`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import arithmetic
from ...scheme import QuantizationScheme
from ..geometry import ConvolutionGeometry
from .declaration import CODES, operator
from .fake_quantization import holds_nan
from .layer_sums import GEOMETRY, Ints, channel_axis_of, exact_sums, geometry_arguments, output_like
from .masks import pack_mask
from .moving_average import update


class TrainedLayer(NamedTuple):
    """What :func:`train_layer` gives.

    Attributes:
        output: in the dtype that was asked for.
        mask: of the weight, a bit to an element in memory order; None where not asked for.
        scale: of the weight as it was used, (O,): a channel whose bias would not fit the accumulator has a
            larger one, as in conversion; one whose weights hold NaN has NaN, and so has one that is observed with an
            infinite weight.
    """

    output: Tensor
    mask: Tensor | None
    scale: Tensor


@operator(
    "train_layer(Tensor codes, Tensor grid, Tensor weight, Tensor? bias, int axis, Tensor(a!) minimum,"
    " Tensor(b!) maximum, Tensor(c!) batches, Tensor(d!) scale, Tensor(e!) zero_point, float momentum, int lowest,"
    f" int highest, bool observes, bool wants_mask, {GEOMETRY}, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    CODES,
)
def _train_layer(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    minimum: Tensor,
    maximum: Tensor,
    batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    lowest: int,
    highest: int,
    observes: bool,
    wants_mask: bool,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    geometry = stride, padding, dilation, groups
    with torch.no_grad():
        if observes:
            averages = minimum, maximum, batches
            update.reference(
                weight, False, axis, *averages, scale, zero_point, momentum, lowest, highest, True, 0, True
            )
        channel_axis = None if axis < 0 else axis
        step = arithmetic.along_axis(scale, weight.dim(), channel_axis)
        unsaturated = arithmetic.unsaturated_codes(weight, step, torch.zeros_like(step))
        mask = pack_mask((unsaturated >= lowest) & (unsaturated <= highest)) if wants_mask else None
        if observes and channel_axis == 0:  # the averages do not follow what is not finite
            is_finite = weight.isfinite().flatten(1).all(dim=1)
            weight = torch.where(arithmetic.along_axis(is_finite, weight.dim(), 0), weight, torch.nan)
        output, used = _product(codes, grid, weight, scale, bias, axis, lowest, highest, geometry, dtype)
    return output, mask, used


@_train_layer.fake
def _(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    minimum: Tensor,
    maximum: Tensor,
    batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    lowest: int,
    highest: int,
    observes: bool,
    wants_mask: bool,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    output = output_like(codes, weight.shape[0], weight.shape[2:], (stride, padding, dilation, groups), dtype)
    mask = weight.new_empty((weight.numel() + 7) // 8, dtype=torch.uint8) if wants_mask else None
    return output, mask, scale.new_empty(weight.shape[0])


def train_layer(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    averages: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    scheme: QuantizationScheme,
    geometry: ConvolutionGeometry | None,
    *,
    observes: bool,
    mask: bool,
    dtype: torch.dtype = torch.float32,
) -> TrainedLayer:
    """Observes a weight, quantizes it, and computes its layer on codes.

    Args:
        codes: of the input.
        grid: theirs, float32 (2, 1): scale and zero point. A scale of NaN makes the output NaN.
        weight: float32, on a GPU also bfloat16 and float16.
        bias: float32 (O,), rounded to units of the accumulator; None for none.
        averages: running minimum and maximum of the weight, float32 (C,), and the number of batches, int64 (1,).
        scale, zero_point: float32 (C,), of the weight; the zero point is 0.
        momentum: of the averages.
        scheme: int8, symmetric.
        geometry: of a convolution; None for a linear layer.
        observes: whether to fold the weight into the averages, and make a scale of them, first.
        mask: whether to return where a gradient of the weight passes.
        dtype: of the output: float32, on a GPU also bfloat16 and float16.
    """
    return TrainedLayer._make(
        _train_layer(
            codes,
            grid,
            weight,
            bias,
            -1 if scheme.channel_axis is None else scheme.channel_axis,
            *averages,
            scale,
            zero_point,
            momentum,
            scheme.quant_min,
            scheme.quant_max,
            observes,
            mask,
            *geometry_arguments(geometry),
            dtype,
        )
    )


@operator(
    "weighted_product(Tensor codes, Tensor grid, Tensor weight, Tensor weight_scale, Tensor? bias, int axis,"
    f" int lowest, int highest, {GEOMETRY}, ScalarType dtype) -> Tensor",
    CODES,
)
def _weighted_product(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    axis: int,
    lowest: int,
    highest: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    geometry = stride, padding, dilation, groups
    with torch.no_grad():
        return _product(codes, grid, weight, weight_scale, bias, axis, lowest, highest, geometry, dtype)[0]


@_weighted_product.fake
def _(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    axis: int,
    lowest: int,
    highest: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    return output_like(codes, weight.shape[0], weight.shape[2:], (stride, padding, dilation, groups), dtype)


def weighted_product(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    scheme: QuantizationScheme,
    geometry: ConvolutionGeometry | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A layer on codes, its weight quantized with a scale that is given: what :func:`train_layer` returns as output."""
    output: Tensor = _weighted_product(
        codes,
        grid,
        weight,
        scale,
        bias,
        -1 if scheme.channel_axis is None else scheme.channel_axis,
        scheme.quant_min,
        scheme.quant_max,
        *geometry_arguments(geometry),
        dtype,
    )
    return output


def _product(
    codes: Tensor,
    grid: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    axis: int,
    lowest: int,
    highest: int,
    geometry: tuple[Ints, Ints, Ints, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output, and the scale of the weight as it was used."""
    channel_axis = None if axis < 0 else axis
    weight_codes = arithmetic.quantize_to(
        weight.nan_to_num(nan=0.0), scale, torch.zeros_like(scale), lowest, highest, torch.int8, channel_axis
    )
    input_scale, zero_point = grid[0], grid[1]
    offset = torch.zeros(weight.shape[0], device=weight.device) if bias is None else bias
    # An input that held NaN has a scale of NaN, which says nothing of the room that a bias needs.
    known_scale = input_scale.nan_to_num(nan=torch.inf, posinf=torch.inf)
    weight_codes, used = arithmetic.with_room_for_bias(weight_codes, scale, offset, known_scale)
    bias_codes = arithmetic.quantize_bias(offset, input_scale * used)
    used = torch.where(holds_nan(weight, channel_axis) | ~offset.isfinite(), torch.nan, used)
    sums = exact_sums(codes, zero_point, weight_codes, geometry)
    output_axis = channel_axis_of(geometry) % sums.dim()
    accumulator = sums + arithmetic.along_axis(bias_codes, sums.dim(), output_axis)
    multiplier = arithmetic.along_axis(input_scale * used, sums.dim(), output_axis)
    return arithmetic.rescale_accumulator(accumulator, multiplier).to(dtype), used
