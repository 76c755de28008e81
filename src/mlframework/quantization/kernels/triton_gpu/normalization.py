"""Batch normalization in training with what follows it: the kernels of :mod:`..operators.normalization`.

Tensors lie in rows, their channels innermost: a matrix with a column to a channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from .arithmetic import clamped, grid_zero_point, interpolated
from .fake_quantization import quantize_block, store_partials, summarize
from .launch import BLOCK, EXACT, blocks_of
from .reductions import reduction


@triton.jit
def _sums_of_columns(
    values,
    partials,
    rows,
    columns,
    splits,
    size,
    AXIS: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums, and sums of squares, of what values are above the first of their column, which keeps the digits."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    column = program // splits * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(values + column, column < columns, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(EACH):
        row = (split * EACH + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(values + row[:, None] * columns + column[None, :], inside, other=0.0).to(tl.float32)
        above = tl.where(inside, value - first, 0.0)
        sums += above
        squares += above * above
    place = split * columns + column
    tl.store(partials + place, tl.sum(sums, 0), column < columns)
    tl.store(partials + size + place, tl.sum(squares, 0), column < columns)


@triton.jit
def _statistics_of_columns(
    values,
    partials,
    mean,
    inverse_deviation,
    running_mean,
    running_variance,
    rows,
    columns,
    splits,
    size,
    momentum,
    epsilon,
    HAS_RUNNING: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    inside = (split < splits)[:, None] & (column < columns)[None, :]
    place = split[:, None] * columns + column[None, :]
    sums = tl.sum(tl.load(partials + place, inside, other=0.0).to(tl.float64), 0)
    squares = tl.sum(tl.load(partials + size + place, inside, other=0.0).to(tl.float64), 0)
    is_column = column < columns
    first = tl.load(values + column, is_column, other=0.0).to(tl.float64)
    above = sums / rows
    variance = squares / rows - above * above
    variance = tl.where(variance < 0.0, 0.0, variance)
    own_mean = (first + above).to(tl.float32)
    tl.store(mean + column, own_mean, is_column)
    tl.store(inverse_deviation + column, (1.0 / tl.sqrt(variance + epsilon)).to(tl.float32), is_column)
    if HAS_RUNNING:
        count = tl.full((COLUMNS,), rows, tl.float64)
        unbiased = (variance * (count / (count - 1))).to(tl.float32)
        before = tl.load(running_mean + column, is_column, other=0.0)
        tl.store(running_mean + column, interpolated(before, own_mean, momentum), is_column)
        before = tl.load(running_variance + column, is_column, other=0.0)
        tl.store(running_variance + column, interpolated(before, unbiased, momentum), is_column)


def batch_statistics(
    values: Tensor, running_mean: Tensor | None, running_variance: Tensor | None, momentum: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    mean, inverse_deviation = DECLARED["batch_statistics"].empty_outputs(
        values, running_mean, running_variance, momentum, epsilon
    )
    columns = values.shape[1]
    matrix = reduction(values.numel() // columns, columns, 0)
    partials = values.new_empty((2, *matrix.partials), dtype=torch.float32)
    _sums_of_columns[(matrix.programs,)](values, partials, *matrix.numbers, *matrix.constants, **EXACT)
    splits = triton.next_power_of_2(matrix.splits)
    width = max(min(triton.next_power_of_2(columns), 2 * BLOCK // splits), 1)
    _statistics_of_columns[(triton.cdiv(columns, width),)](
        values,
        partials,
        mean,
        inverse_deviation,
        mean if running_mean is None else running_mean,
        mean if running_variance is None else running_variance,
        *matrix.numbers,
        momentum,
        epsilon,
        running_mean is not None,
        splits,
        width,
        **EXACT,
    )
    return mean, inverse_deviation


@triton.jit
def _channels(start, columns, IN_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """The column of each of the elements (BLOCK // 8, 8) from ``start`` on. One division serves eight neighbours where
    rows are whole groups of them."""
    if IN_GROUPS:
        groups = columns // 8
        group = ((start // 8) % groups).to(tl.int32) + tl.arange(0, BLOCK // 8)
        return (group % groups)[:, None] * 8 + tl.arange(0, 8)[None, :]
    place = (start % columns).to(tl.int32) + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return place % columns


@triton.jit
def _normalize(
    input,
    mean,
    inverse_deviation,
    weight,
    bias,
    scale,
    zero_point,
    values,
    codes,
    mask,
    partials,
    count,
    columns,
    clip_low,
    clip_high,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    CLIPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    IN_GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * EACH
    places = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    lowest_seen = tl.full((BLOCK // 8, 8), float("inf"), tl.float32)
    highest_seen = tl.full((BLOCK // 8, 8), float("-inf"), tl.float32)
    nan_seen = tl.zeros((BLOCK // 8, 8), tl.int32)
    own_scale = tl.load(scale).to(tl.float32)
    zero = grid_zero_point(tl.load(zero_point), LOWEST, HIGHEST)
    for step in range(EACH):
        start = (first + step) * BLOCK
        channel = _channels(start, columns, IN_GROUPS, BLOCK)
        inside = start + places < count
        factor = tl.load(inverse_deviation + channel)
        if HAS_WEIGHT:
            factor = factor * tl.load(weight + channel)
        offset = -(tl.load(mean + channel) * factor)
        if HAS_BIAS:
            offset = tl.load(bias + channel) + offset
        value = tl.load(input + start + places, inside, other=0.0).to(tl.float32) * factor + offset
        bounded = quantize_block(
            value,
            start,
            count,
            own_scale,
            zero,
            values,
            codes,
            mask,
            clip_low,
            clip_high,
            LOWEST,
            HIGHEST,
            CLIPS,
            True,
            WANTS_CODES,
            True,
            BLOCK,
        )
        lowest_seen = tl.minimum(lowest_seen, tl.where(inside, bounded, float("inf")))
        highest_seen = tl.maximum(highest_seen, tl.where(inside, bounded, float("-inf")))
        nan_seen = nan_seen | (inside & (bounded != bounded)).to(tl.int32)
    store_partials(partials, lowest_seen, highest_seen, nan_seen)


def normalize(
    input: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    clip_low: float,
    clip_high: float,
    code_dtype: torch.dtype | None,
) -> Any:
    numbers = (mean, inverse_deviation, weight, bias, scale, zero_point, lowest, highest, clip_low, clip_high)
    outputs = DECLARED["normalize"].empty_outputs(input, *numbers, code_dtype)
    values, codes, mask, extremes, grid = outputs
    programs, each = blocks_of(input.numel())
    partials = input.new_empty((3, programs), dtype=torch.float32)
    columns = input.shape[1]
    _normalize[(programs,)](
        input,
        mean,
        inverse_deviation,
        mean if weight is None else weight,
        mean if bias is None else bias,
        scale,
        zero_point,
        values,
        input if codes is None else codes,
        mask,
        partials,
        input.numel(),
        columns,
        clip_low,
        clip_high,
        lowest,
        highest,
        clip_low > -math.inf or clip_high < math.inf,
        weight is not None,
        bias is not None,
        codes is not None,
        columns % 8 == 0,
        each,
        BLOCK,
        **EXACT,
    )
    summarize(partials, scale, zero_point, extremes, grid, lowest, highest)
    return outputs


@triton.jit
def _passed(gradient, mask, offset, inside, clip):
    """The gradient where the mask lets it pass, clipped; float32."""
    bits = tl.load(mask + offset // 8, inside, other=0).to(tl.int32)
    value = clamped(tl.load(gradient + offset, inside, other=0.0).to(tl.float32), -clip, clip)
    return tl.where(((bits >> (offset % 8).to(tl.int32)) & 1) > 0, value, 0.0)


@triton.jit
def _sums_of_gradients(
    gradient,
    mask,
    values,
    mean,
    inverse_deviation,
    partials,
    clip,
    rows,
    columns,
    splits,
    size,
    AXIS: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    column = program // splits * COLUMNS + tl.arange(0, COLUMNS)
    own_mean = tl.load(mean + column, column < columns, other=0.0)[None, :]
    inverse = tl.load(inverse_deviation + column, column < columns, other=0.0)[None, :]
    to_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(EACH):
        row = (split * EACH + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offset = row[:, None] * columns + column[None, :]
        passed = _passed(gradient, mask, offset, inside, clip)
        value = tl.load(values + offset, inside, other=0.0).to(tl.float32)
        to_bias += passed
        to_weight += tl.where(inside, passed * ((value - own_mean) * inverse), 0.0)
    place = split * columns + column
    tl.store(partials + place, tl.sum(to_bias, 0), column < columns)
    tl.store(partials + size + place, tl.sum(to_weight, 0), column < columns)


@triton.jit
def _normalize_backward(
    gradient,
    mask,
    values,
    mean,
    inverse_deviation,
    weight,
    to_bias,
    to_weight,
    to_values,
    clip,
    share,
    count,
    columns,
    HAS_WEIGHT: tl.constexpr,
    IN_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = offset < count
    channel = _channels(start, columns, IN_GROUPS, BLOCK)
    passed = _passed(gradient, mask, offset, inside, clip)
    value = tl.load(values + offset, inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_deviation + channel)
    normalized = (value - tl.load(mean + channel)) * inverse
    common = tl.load(to_bias + channel) + normalized * tl.load(to_weight + channel)
    factor = inverse * tl.load(weight + channel) if HAS_WEIGHT else inverse
    tl.store(to_values + offset, ((passed - common * share) * factor).to(to_values.dtype.element_ty), inside)


def normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    gradient_clip: float,
) -> Any:
    to_values, to_weight, to_bias = DECLARED["normalize_backward"].empty_outputs(
        gradient, mask, values, mean, inverse_deviation, weight, gradient_clip
    )
    count, columns = values.numel(), values.shape[1]
    matrix = reduction(count // columns, columns, 0)
    partials = values.new_empty((2, *matrix.partials), dtype=torch.float32)
    _sums_of_gradients[(matrix.programs,)](
        gradient,
        mask,
        values,
        mean,
        inverse_deviation,
        partials,
        gradient_clip,
        *matrix.numbers,
        *matrix.constants,
        **EXACT,
    )
    sums = partials.sum(1, dtype=torch.float64)
    to_bias.copy_(sums[0])
    to_weight.copy_(sums[1])
    _normalize_backward[(triton.cdiv(count, BLOCK),)](
        gradient,
        mask,
        values,
        mean,
        inverse_deviation,
        mean if weight is None else weight,
        to_bias,
        to_weight,
        to_values,
        gradient_clip,
        columns / count,
        count,
        columns,
        weight is not None,
        columns % 8 == 0,
        BLOCK,
        **EXACT,
    )
    return to_values, to_weight, to_bias
