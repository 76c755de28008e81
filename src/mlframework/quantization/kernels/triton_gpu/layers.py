"""Layers on codes: the kernels of :mod:`..operators.integer_layers` and :mod:`..operators.training_layers`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.integer_layers import fold_zero_point
from ..operators.layer_sums import Ints, output_like
from .depthwise import depthwise
from .products import convolution, linear
from .results import Result
from .weights import Averages, QuantizedWeight, quantized_weight

Geometry = tuple[Ints, Ints, Ints, int]


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
    geometry = stride, padding, dilation, groups
    output = output_like(codes, weight.shape[0], weight.shape[1:-1], geometry, dtype)
    result = Result(bias, multiplier, float(zero_point), float(lowest), float(highest))
    _product(codes, padding_code, weight, result, output, geometry)
    return output


def integer_layer(
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
    geometry = stride, padding, dilation, groups
    output = output_like(codes, weight.shape[0], weight.shape[2:], geometry, dtype)
    weight, bias = fold_zero_point(weight, bias, zero_point, codes.dtype)
    if output_zero_point is None or lowest is None or highest is None:
        result = Result(bias, multiplier, 0.0, clip_low, clip_high)
    else:
        result = Result(bias, multiplier, output_zero_point, lowest, highest)
    _product(codes, zero_point, weight, result, output, geometry)
    return output


def train_layer(
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
    averages = Averages(minimum, maximum, batches, zero_point, momentum) if observes else None
    quantized = quantized_weight(weight, scale, bias, grid, axis, lowest, highest, codes.dtype, averages, wants_mask)
    geometry = stride, padding, dilation, groups
    return _trained(codes, grid, weight, quantized, geometry, dtype), quantized.mask, quantized.scale


def weighted_product(
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
    quantized = quantized_weight(
        weight, weight_scale, bias, grid, axis, lowest, highest, codes.dtype, None, wants_mask=False
    )
    return _trained(codes, grid, weight, quantized, (stride, padding, dilation, groups), dtype)


def _trained(
    codes: Tensor, grid: Tensor, weight: Tensor, quantized: QuantizedWeight, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    output = output_like(codes, weight.shape[0], weight.shape[2:], geometry, dtype)
    result = Result(quantized.bias, quantized.multiplier)
    _product(codes, grid.reshape(-1)[1:], quantized.codes, result, output, geometry)
    return output


def _product(
    codes: Tensor, padding_code: int | Tensor, weight: Tensor, result: Result, output: Tensor, geometry: Geometry
) -> None:
    """A weight (O, *kernel, I / groups) on codes (N, I, *size), in at most two dimensions."""
    if output.numel() == 0:
        return
    strides, padding, dilation, groups = geometry
    if not strides:
        linear(codes.reshape(-1, codes.shape[-1]), padding_code, weight, result, output)
        return
    if len(strides) == 1:  # a row of an image
        codes, weight, output = codes.unsqueeze(2), weight.unsqueeze(1), output.unsqueeze(2)
        strides, padding, dilation = (1, *strides), (0, *padding), (1, *dilation)
    run = depthwise if groups == weight.shape[0] == codes.shape[1] else convolution
    run(codes, padding_code, weight, result, output, (strides, padding, dilation, groups))
