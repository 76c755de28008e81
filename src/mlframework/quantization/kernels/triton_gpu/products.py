"""Linear layers and convolutions as one matrix product on the int8 tensor cores, with the rest of the layer in its
registers.

A convolution's matrix of codes, a row to a position of the output and in it the channels of every tap, is never made:
the kernel reads a tile of it where it lies in the input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.layer_sums import Ints
from ..operators.layout import with_channels_last
from .arithmetic import to_codes
from .launch import BLOCK, EXACT
from .results import Result, as_signed, signed, store_result
from .tuning import fastest, loop_bound

# How a tile of the input is found. ROWS: a row of the matrix is a row of the input. TAPS: a tile lies within one tap.
# FLAT: a tile goes over several taps, of few channels.
ROWS: tl.constexpr = tl.constexpr(0)
TAPS: tl.constexpr = tl.constexpr(1)
FLAT: tl.constexpr = tl.constexpr(2)

# Tiles that share their weights, or their codes, run at the same time: the second reads them from the cache.
_TILES_TOGETHER = 8


@triton.jit
def _dense(
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
    outputs,
    channels,
    steps,
    length,
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
    MODE: tl.constexpr,
    EVEN: tl.constexpr,
    PADDING_IN_MEMORY: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the output; the second axis of the grid is that of the groups. ``rows`` are all positions, ``outputs``
    and ``channels`` those of a group, and ``length`` is the number of products to a sum."""
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(outputs, BLOCK_N)
    band = program // (TOGETHER * across)
    tall = tl.minimum(down - band * TOGETHER, TOGETHER)
    tile_m = band * TOGETHER + program % (TOGETHER * across) % tall
    tile_n = program % (TOGETHER * across) // tall

    # Beyond the last one, the last one again, whose results are not stored.
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = tl.minimum(row, rows - 1)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    output_channel = group * outputs + column
    k = tl.arange(0, BLOCK_K)
    weight_row = (group * outputs + tl.minimum(column, outputs - 1)) * length
    if MODE == ROWS:
        start = source * row_stride
    else:
        right = (source % output_width).to(tl.int32) * step_right - left
        below = (source // output_width % output_height).to(tl.int32) * step_down - top
        image = source // output_width // output_height
        start = image * input_stride + below.to(tl.int64) * row_stride + right.to(tl.int64) * column_stride
    start += group * channels
    if PADDING_IN_MEMORY:
        padding_code = tl.load(padding_code).to(tl.int32)
    zero = to_codes(tl.full((BLOCK_M, 1), padding_code, tl.int32), codes.dtype.element_ty)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    blocks = tl.cdiv(channels, BLOCK_K)  # to a tap
    for step in range(steps):
        if MODE == ROWS:
            at = step * BLOCK_K + k
            place = at.to(tl.int64)
            is_product = at < length
            inside = tl.full((BLOCK_M, 1), 1, tl.int1)
        elif MODE == TAPS:
            tap = step // blocks
            channel = step % blocks * BLOCK_K + k
            tap_row = tap // kernel_width * dilation_down
            tap_column = tap % kernel_width * dilation_right
            at = tap * channels + channel
            place = tap_row.to(tl.int64) * row_stride + tap_column.to(tl.int64) * column_stride + channel
            is_product = channel < channels
            y = below + tap_row
            x = right + tap_column
            inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        else:
            at = step * BLOCK_K + k
            tap = at // channels
            tap_row = tap // kernel_width * dilation_down
            tap_column = tap % kernel_width * dilation_right
            place = tap_row.to(tl.int64) * row_stride + tap_column.to(tl.int64) * column_stride + at % channels
            is_product = at < length
            y = below[:, None] + tap_row[None, :]
            x = right[:, None] + tap_column[None, :]
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        address = codes + (start[:, None] + place[None, :])
        weight_address = weight + (weight_row[None, :] + at[:, None])
        if EVEN:
            weights = tl.load(weight_address)
        else:  # what is read in the place of a code then does not matter
            inside = inside & is_product[None, :]
            weights = tl.load(weight_address, is_product[:, None], other=0)
        values = tl.load(address) if EVEN and MODE == ROWS else tl.load(address, inside, other=zero)
        sums = tl.dot(as_signed(values), weights, sums, out_dtype=tl.int32)
    store_result(
        sums,
        row[:, None] * (outputs * tl.num_programs(1)) + output_channel[None, :],
        (row < rows)[:, None] & (column < outputs)[None, :],
        (group * outputs + tl.minimum(column, outputs - 1))[None, :],
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
    """Of a launch: the tile, as positions, outputs and products to a round; warps, and rounds that are loaded ahead."""

    rows: int
    outputs: int
    products: int
    warps: int
    stages: int


# The first that is not too large for a layer runs where nothing can be measured.
_CONFIGURATIONS = (
    Configuration(128, 128, 128, 8, 3),
    Configuration(128, 256, 128, 8, 3),
    Configuration(128, 64, 128, 4, 3),
    Configuration(64, 128, 128, 4, 4),
    Configuration(64, 64, 128, 4, 4),
    Configuration(64, 32, 128, 4, 4),
    Configuration(16, 64, 128, 4, 5),
    Configuration(16, 16, 128, 4, 5),
)


@functools.cache
def configurations(rows: int, outputs: int, products: int) -> tuple[Configuration, ...]:
    """Those for a layer with that many positions and outputs and, in a row of its input, products."""
    largest_rows, largest_outputs = (max(triton.next_power_of_2(size), 16) for size in (rows, outputs))
    # The fewest products with zeros, and then the longest rounds.
    length = min((128, 64, 32), key=lambda size: triton.cdiv(products, size) * size)
    return tuple(
        each._replace(products=length)
        for each in _CONFIGURATIONS
        if each.rows <= largest_rows and each.outputs <= largest_outputs
    )


class _Layer(NamedTuple):
    """The numbers that :func:`_dense` takes from ``rows`` on, but for the number of steps, which the tile says."""

    rows: int
    outputs: int
    channels: int
    length: int
    size: tuple[int, int]
    output_size: tuple[int, int]
    kernel_width: int
    strides: tuple[int, int, int]
    geometry: Sequence[int]


def linear(rows: Tensor, padding_code: int | Tensor, weight: Tensor, result: Result, output: Tensor) -> None:
    """Codes (M, I) by a weight (O, I), into ``output`` of M times O elements."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    outputs, channels = weight.shape
    one = (1, 1)
    layer = _Layer(rows.shape[0], outputs, channels, channels, one, one, 1, (0, rows.stride(0), 0), (*one, 0, 0, *one))
    _run(rows, padding_code, weight, result, output, layer, ROWS.value, 1)


def convolution(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    geometry: tuple[Ints, Ints, Ints, int],
) -> None:
    """Codes (N, C, H, W) by a weight (O, height, width, C / groups), into an output whose channels lie innermost."""
    codes = codes if codes.stride(1) == 1 else with_channels_last(codes)
    strides, padding, dilation, groups = geometry
    outputs, *kernel, channels = weight.shape
    number, _, height, width = codes.shape
    down, right = codes.stride(2), codes.stride(3)
    lies_in_rows = codes.stride(0) == height * down and down == width * right
    if kernel == [1, 1] and set(strides) == {1} and set(padding) == {0} and groups == 1 and lies_in_rows:
        rows = codes.as_strided((number * height * width, channels), (right, 1))
        linear(rows, padding_code, weight.reshape(outputs, channels), result, output)
        return
    size = output.shape[2], output.shape[3]
    layer = _Layer(
        number * size[0] * size[1],
        outputs // groups,
        channels,
        kernel[0] * kernel[1] * channels,
        (height, width),
        size,
        kernel[1],
        (codes.stride(0), down, right),
        (*strides, *padding, *dilation),
    )
    mode = TAPS.value if channels >= 32 else FLAT.value
    _run(codes, padding_code, weight, result, output, layer, mode, groups)


def _run(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    layer: _Layer,
    mode: int,
    groups: int,
) -> None:
    products = layer.channels if mode == TAPS.value else layer.length
    bucket = triton.next_power_of_2(layer.rows)
    choices: tuple[Configuration | None, ...] = configurations(bucket, layer.outputs, products)
    if mode == ROWS.value and _suits_int_mm(codes, weight):
        choices = (*choices, None)

    def run(choice: Configuration | None) -> None:
        if choice is None:
            _through_int_mm(codes, weight, result, output)
        else:
            _launch(codes, padding_code, weight, result, output, layer, mode, groups, choice)

    key = (bucket, layer[1:], mode, groups, codes.dtype, output.dtype, codes.device)
    run(fastest(key, choices, run))


def _launch(
    codes: Tensor,
    padding_code: int | Tensor,
    weight: Tensor,
    result: Result,
    output: Tensor,
    layer: _Layer,
    mode: int,
    groups: int,
    configuration: Configuration,
) -> None:
    block_m, block_n, block_k, warps, stages = configuration
    taps = layer.length // layer.channels if mode == TAPS.value else 1
    products = layer.channels if mode == TAPS.value else layer.length
    tiles = triton.cdiv(layer.rows, block_m) * triton.cdiv(layer.outputs, block_n)
    _dense[(tiles, groups)](
        codes,
        weight,
        result.bias,
        result.multiplier,
        output,
        padding_code,
        *result[2:],
        layer.rows,
        layer.outputs,
        layer.channels,
        loop_bound(taps * triton.cdiv(products, block_k)),
        layer.length,
        *layer.size,
        *layer.output_size,
        layer.kernel_width,
        *layer.strides,
        *layer.geometry,
        mode,
        mode != FLAT.value and products % block_k == 0,
        isinstance(padding_code, Tensor),
        result.multiplier.numel() > 1,
        result.is_in_memory,
        _TILES_TOGETHER,
        block_m,
        block_n,
        block_k,
        num_warps=warps,
        num_stages=stages,
        **EXACT,
    )


def _suits_int_mm(rows: Tensor, weight: Tensor) -> bool:
    """Whether cuBLAS takes these operands."""
    sizes = weight.shape
    return rows.is_cuda and rows.is_contiguous() and rows.shape[0] > 16 and all(size % 8 == 0 for size in sizes)


def _through_int_mm(rows: Tensor, weight: Tensor, result: Result, output: Tensor) -> None:
    sums = torch._int_mm(signed(rows), weight.t())
    _finish[(triton.cdiv(sums.numel(), BLOCK),)](
        sums,
        result.bias,
        result.multiplier,
        output,
        *result[2:],
        sums.numel(),
        sums.shape[1],
        result.multiplier.numel() > 1,
        result.is_in_memory,
        BLOCK,
        **EXACT,
    )


@triton.jit
def _finish(
    sums,
    bias,
    multiplier,
    output,
    zero_point,
    lowest,
    highest,
    count,
    channels,
    PER_CHANNEL: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    store_result(
        tl.load(sums + offset, inside, other=0),
        offset,
        inside,
        offset % channels,
        bias,
        multiplier,
        output,
        zero_point,
        lowest,
        highest,
        PER_CHANNEL,
        IN_MEMORY,
    )
