"""Pooling of codes: the kernels of :mod:`..operators.codes` that take several positions together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from .arithmetic import requantized, to_codes
from .launch import BLOCK_OF_CODES, EXACT, WARPS_OF_CODES, tile, tiles_of


@triton.jit
def _max_pool2d(
    codes,
    pooled,
    rows,
    columns,
    channels,
    height,
    width,
    pooled_height,
    pooled_width,
    image_step,
    channel_step,
    line_step,
    position_step,
    LOWEST: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    PADDING_HEIGHT: tl.constexpr,
    PADDING_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    beside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The output is rows of what is innermost in it, channels or the positions of a line; any strides of the input."""
    row, column = tile(beside, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    if CHANNELS_LAST:
        line = row // pooled_width
        left = row % pooled_width * STRIDE_WIDTH - PADDING_WIDTH
        image = line // pooled_height
        channel = column
    else:
        line = row
        left = column * STRIDE_WIDTH - PADDING_WIDTH
        plane = line // pooled_height
        image = plane // channels
        channel = plane % channels
    top = line % pooled_height * STRIDE_HEIGHT - PADDING_HEIGHT
    origin = codes + image * image_step + channel * channel_step
    largest = tl.full((ROWS, COLUMNS), LOWEST, codes.dtype.element_ty)
    for down in range(KERNEL_HEIGHT):
        y = top + down * DILATION_HEIGHT
        for right in tl.static_range(KERNEL_WIDTH):
            x = left + right * DILATION_WIDTH
            within = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            largest = tl.maximum(largest, tl.load(origin + y * line_step + x * position_step, within, other=LOWEST))
    tl.store(pooled + row * columns + column, largest, inside)


def max_pool2d(
    codes: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    pooled: Tensor = DECLARED["max_pool2d"].empty_outputs(codes, kernel, stride, padding, dilation, ceil_mode)
    if pooled.numel() == 0:
        return pooled
    _, channels, height, width = pooled.shape
    is_channels_last = not pooled.is_contiguous()
    columns = channels if is_channels_last else width
    rows = pooled.numel() // columns
    programs, *tiles = tiles_of(rows, columns, BLOCK_OF_CODES)
    _max_pool2d[(programs,)](
        codes,
        pooled,
        rows,
        columns,
        channels,
        *codes.shape[2:],
        height,
        width,
        *codes.stride(),
        torch.iinfo(codes.dtype).min,
        *kernel,
        *stride,
        *padding,
        *dilation,
        is_channels_last,
        *tiles,
        num_warps=WARPS_OF_CODES,
        **EXACT,
    )
    return pooled


@triton.jit
def _sums_of(
    codes,
    row,
    rows,
    channels,
    positions,
    image_step,
    channel_step,
    position_step,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Of each ``row``, a channel of an image, the sum over its positions: int32 (ROWS,)."""
    first = codes + row // channels * image_step + row % channels * channel_step
    total = tl.zeros((ROWS, POSITIONS), tl.int32)
    for step in range(STEPS):
        position = (step * POSITIONS + tl.arange(0, POSITIONS)).to(tl.int64)
        inside = (row < rows)[:, None] & (position < positions)[None, :]
        total += tl.load(first[:, None] + (position * position_step)[None, :], inside, other=0).to(tl.int32)
    return tl.sum(total, 1)


@triton.jit
def _sum_positions(
    codes,
    sums,
    rows,
    channels,
    positions,
    image_step,
    channel_step,
    position_step,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    steps = image_step, channel_step, position_step
    sum = _sums_of(codes, row, rows, channels, positions, *steps, STEPS, ROWS, POSITIONS)
    tl.store(sums + row, sum, row < rows)


@triton.jit(do_not_specialize=["lowest", "highest"])
def _average_positions(
    codes,
    averages,
    zero_point,
    scale,
    output_scale,
    output_zero_point,
    lowest,
    highest,
    rows,
    channels,
    positions,
    image_step,
    channel_step,
    position_step,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    steps = image_step, channel_step, position_step
    sum = _sums_of(codes, row, rows, channels, positions, *steps, STEPS, ROWS, POSITIONS)
    accumulator = sum - tl.load(zero_point) * positions
    multiplier = tl.math.div_rn(tl.load(scale), tl.load(output_scale) * positions)
    zero = tl.load(output_zero_point).to(tl.float32)
    code = requantized(accumulator, multiplier, zero, lowest, highest)
    tl.store(averages + row, to_codes(code, averages.dtype.element_ty), row < rows)


class _Positions(NamedTuple):
    """How sums over positions are shared out.

    Attributes:
        codes: (N, C, P).
        arguments: of :func:`_sums_of`, from ``rows`` on: every program sums ``ROWS`` rows, ``POSITIONS`` at a time.
    """

    codes: Tensor
    grid: tuple[int]
    arguments: tuple[int, ...]


def _positions_of(codes: Tensor) -> _Positions:
    """Of codes (N, C, *size)."""
    codes = codes.flatten(2)
    images, channels, positions = codes.shape
    # Where channels lie side by side, no fewer are read of a position than fill a sector of a cache.
    longest, fewest = (BLOCK_OF_CODES, 1) if codes.stride(2) == 1 else (512, 32)
    at_once = min(triton.next_power_of_2(max(positions, 1)), longest)
    # A power of two, since kernels are compiled for every value of it.
    steps = triton.next_power_of_2(max(triton.cdiv(positions, at_once), 1))
    rows = max(BLOCK_OF_CODES // at_once, fewest)
    arguments = images * channels, channels, positions, *codes.stride(), steps, rows, at_once
    return _Positions(codes, (triton.cdiv(images * channels, rows),), arguments)


def sum_positions(codes: Tensor) -> Tensor:
    sums: Tensor = DECLARED["sum_positions"].empty_outputs(codes)
    if sums.numel() > 0:
        flat, grid, arguments = _positions_of(codes)
        _sum_positions[grid](flat, sums, *arguments, num_warps=WARPS_OF_CODES, **EXACT)
    return sums


def average_positions(
    codes: Tensor,
    zero_point: Tensor,
    scale: Tensor,
    output_scale: Tensor,
    output_zero_point: Tensor,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
) -> Tensor:
    numbers = zero_point, scale, output_scale, output_zero_point
    averages: Tensor = DECLARED["average_positions"].empty_outputs(codes, *numbers, lowest, highest, dtype)
    if averages.numel() > 0:
        flat, grid, arguments = _positions_of(codes)
        ends = lowest, highest
        _average_positions[grid](flat, averages, *numbers, *ends, *arguments, num_warps=WARPS_OF_CODES, **EXACT)
    return averages
