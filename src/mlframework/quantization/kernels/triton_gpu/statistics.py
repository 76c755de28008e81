"""Extremes of tensors, and the moving averages of observers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arithmetic import LARGEST_SCALE, SMALLEST_SCALE
from ..operators.declaration import DECLARED
from ..operators.layout import dense
from .arithmetic import is_finite, moved_average, scale_of_range, zero_point_of_range
from .launch import EXACT, channels_of
from .reductions import channels_as_matrix, partial_places, reduced_tile


@triton.jit
def _extremes(
    input,
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
    """``[-minimum, maximum]`` of every row or column of a matrix; infinity where one holds NaN."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    kept = program // splits
    negated = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for step in range(EACH):
        row, column = reduced_tile(kept, split, step, AXIS, EACH, ROWS, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(input + row[:, None] * columns + column[None, :], inside, other=0.0).to(tl.float32)
        is_nan = value != value
        low = tl.where(is_nan, float("inf"), -value)
        high = tl.where(is_nan, float("inf"), value)
        negated = tl.maximum(negated, tl.where(inside, low, float("-inf")))
        highest = tl.maximum(highest, tl.where(inside, high, float("-inf")))
    place, is_kept = partial_places(kept, split, rows, columns, splits, AXIS, ROWS, COLUMNS)
    tl.store(partials + place, tl.max(negated, AXIS), is_kept)
    tl.store(partials + size + place, tl.max(highest, AXIS), is_kept)


def extremes(input: Tensor, axis: int) -> Tensor:
    operator = DECLARED["extremes"]
    if input.numel() == 0:
        return operator.reference(input, axis)  # type: ignore[no-any-return]
    input = dense(input)
    matrix = channels_as_matrix(input, axis)
    outer, channels, _ = channels_of(input, axis)
    partials = input.new_empty((2, *matrix.partials), dtype=torch.float32)
    _extremes[(matrix.programs,)](input, partials, *matrix.numbers, *matrix.constants, **EXACT)
    both = partials.view(2, outer, channels, matrix.splits).amax((1, 3)) if matrix.axis == 1 else partials.amax(1)
    return both.masked_fill_(both == torch.inf, -torch.inf)


@triton.jit
def _update_moving_average(
    extremes,
    minimum,
    maximum,
    batches,
    scale,
    zero_point,
    channels,
    momentum,
    SYMMETRIC_ZERO: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    DUE: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Of all channels in one program, which is to count the batch once."""
    any_finite = tl.zeros((BLOCK,), tl.int32)
    for block in range(BLOCKS):
        channel = block * BLOCK + tl.arange(0, BLOCK)
        inside = channel < channels
        low = -tl.load(extremes + channel, inside, other=float("-inf"))
        high = tl.load(extremes + channels + channel, inside, other=float("-inf"))
        any_finite = any_finite | (is_finite(low) | is_finite(high)).to(tl.int32)
        low = moved_average(tl.load(minimum + channel, inside, other=0.0), low, momentum)
        high = moved_average(tl.load(maximum + channel, inside, other=0.0), high, momentum)
        tl.store(minimum + channel, low, inside)
        tl.store(maximum + channel, high, inside)
        if DUE:
            step = scale_of_range(low, high, LOWEST, HIGHEST, SYMMETRIC, SYMMETRIC_ZERO, SMALLEST, LARGEST)
            tl.store(scale + channel, step, inside)
            if SYMMETRIC:
                tl.store(zero_point + channel, step * 0 + SYMMETRIC_ZERO, inside)
            else:
                tl.store(zero_point + channel, zero_point_of_range(low, step, LOWEST, HIGHEST), inside)
    tl.store(batches, tl.load(batches) + tl.max(any_finite, 0))


def update_moving_average(
    batch: Tensor,
    is_measured: bool,
    axis: int,
    minimum: Tensor,
    maximum: Tensor,
    batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    lowest: int,
    highest: int,
    symmetric: bool,
    symmetric_zero: int,
    due: bool,
) -> None:
    both = batch if is_measured else extremes(batch.detach(), axis)
    channels = minimum.numel()
    block = min(triton.next_power_of_2(channels), 1024)
    _update_moving_average[(1,)](
        both.contiguous(),
        minimum,
        maximum,
        batches,
        scale,
        zero_point,
        channels,
        momentum,
        symmetric_zero,
        lowest,
        highest,
        symmetric,
        due,
        SMALLEST_SCALE,
        LARGEST_SCALE,
        block,
        triton.cdiv(channels, block),
        **EXACT,
    )
