"""Depthwise convolutions: every channel by taps of its own, which is too little work for a matrix product."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..operators.layer_sums import Ints
from ..operators.layout import with_channels_last
from .arithmetic import to_codes
from .launch import EXACT
from .results import Result, as_signed, store_result
from .tuning import WINDOW, fastest, loop_bound
from .windows import window_of


@triton.jit(do_not_specialize=["rows", "taps", "weight_stride", *WINDOW])
def _depthwise(
    codes,
    weight,
    bias,
    multiplier,
    output,
    padding_code,
    zero_point,
    lowest,
    highest,
    rows,
    channels,
    taps,
    weight_stride,
    height,
    width,
    output_height,
    output_width,
    kernel_width,
    input_stride,
    row_stride,
    column_stride,
    step_down,
    step_right,
    top,
    left,
    dilation_down,
    dilation_right,
    PADDING_IN_MEMORY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Some positions of the output, by some channels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = tl.minimum(channel, channels - 1)
    source = tl.minimum(row, rows - 1)
    below, right, start = window_of(
        source,
        output_height,
        output_width,
        step_down,
        step_right,
        top,
        left,
        input_stride,
        row_stride,
        column_stride,
    )
    if PADDING_IN_MEMORY:
        padding_code = tl.load(padding_code).to(tl.int32)
    zero = to_codes(tl.full((BLOCK_M, 1), padding_code, tl.int32), codes.dtype.element_ty)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for tap in range(taps):
        tap_row = tap // kernel_width * dilation_down
        tap_column = tap % kernel_width * dilation_right
        y = below + tap_row
        x = right + tap_column
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = start + (tap_row.to(tl.int64) * row_stride + tap_column.to(tl.int64) * column_stride)
        values = tl.load(
            codes + (place[:, None] + channel[None, :]),
            inside[:, None] & (channel < channels)[None, :],
            other=zero,
        )
        factor = tl.load(weight + (known * weight_stride + tap)).to(tl.int32)
        sums += as_signed(values).to(tl.int32) * factor[None, :]
    store_result(
        sums,
        row[:, None] * channels + channel[None, :],
        (row < rows)[:, None] & (channel < channels)[None, :],
        known[None, :],
        bias,
        multiplier,
        output,
        zero_point,
        lowest,
        highest,
        PER_CHANNEL,
        IN_MEMORY,
    )


class Configuration(NamedTuple):
    """Of a launch: positions and channels to a program, and warps."""

    rows: int
    channels: int
    warps: int


_CONFIGURATIONS = (Configuration(32, 64, 4), Configuration(64, 32, 4), Configuration(16, 128, 4))


def depthwise(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    geometry: tuple[Ints, Ints, Ints, int],
) -> None:
    """Codes (N, C, H, W) by a weight (C, height, width, 1), into an output whose channels lie innermost."""
    codes = codes if codes.stride(1) == 1 else with_channels_last(codes)
    strides, padding, dilation, _ = geometry
    channels, *kernel, _ = weight.shape
    size = output.shape[2], output.shape[3]
    rows = codes.shape[0] * size[0] * size[1]

    def run(choice: Configuration) -> None:
        grid = triton.cdiv(rows, choice.rows), triton.cdiv(channels, choice.channels)
        _depthwise[grid](
            codes,
            weight,
            result.bias,
            result.multiplier,
            output,
            padding_code,
            *result[2:],
            rows,
            channels,
            loop_bound(kernel[0] * kernel[1]),
            kernel[0] * kernel[1],
            codes.shape[2],
            codes.shape[3],
            *size,
            kernel[1],
            codes.stride(0),
            codes.stride(2),
            codes.stride(3),
            *strides,
            *padding,
            *dilation,
            isinstance(padding_code, Tensor),
            result.multiplier.numel() > 1,
            result.is_in_memory,
            choice.rows,
            choice.channels,
            num_warps=choice.warps,
            **EXACT,
        )

    shapes = triton.next_power_of_2(rows), channels, tuple(kernel), tuple(strides), tuple(dilation)
    run(fastest((shapes, codes.dtype, output.dtype, codes.device), _CONFIGURATIONS, run))
