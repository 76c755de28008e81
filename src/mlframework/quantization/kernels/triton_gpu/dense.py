"""A layer as a matrix product on the int8 tensor cores, with the rest of the layer in its registers.

A convolution's matrix of codes, a row to a position of the output and in it the channels of every tap, is never made:
the kernel reads a tile of it where it lies in the input.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import to_codes
from .results import as_signed, store_result
from .tuning import WINDOW
from .windows import window_of


@triton.jit(do_not_specialize=["rows", "steps", *WINDOW])
def dense(
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
    HAS_WINDOW: tl.constexpr,
    IS_FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    PADDING_IN_MEMORY: tl.constexpr,
    PADS_WITH_ZERO: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the output; the second axis of the grid is that of the groups.

    ``rows`` are all positions, ``outputs`` and ``channels`` those of a group, and ``length`` is the number of products
    to a sum. Without a window, a row of the matrix is a row of the input. With one, a tile of the input lies within one
    tap or, flat, goes over several, of few channels.
    """
    # Tiles in bands of some rows of tiles, a column of a band after the other: tiles that run at the same time read the
    # same codes and weights, which the L2 cache then holds.
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(outputs, BLOCK_N)
    band = program // (TOGETHER * across)
    tall = tl.minimum(down - band * TOGETHER, TOGETHER)
    tile_m = band * TOGETHER + program % (TOGETHER * across) % tall
    tile_n = program % (TOGETHER * across) // tall

    # Beyond the last one, the last one again, whose results are not stored.
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    source = tl.minimum(row, rows - 1)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    output_channel = group * outputs + column
    k = tl.arange(0, BLOCK_K)
    weight_row = (group * outputs + tl.minimum(column, outputs - 1)) * length
    if not HAS_WINDOW:
        start = source * row_stride
    else:
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
    start += group * channels
    if PADDING_IN_MEMORY:
        padding_code = tl.load(padding_code).to(tl.int32)
    zero = to_codes(tl.full((BLOCK_M, 1), padding_code, tl.int32), codes.dtype.element_ty)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    blocks = tl.cdiv(channels, BLOCK_K)  # to a tap
    for step in range(steps):
        if not HAS_WINDOW:
            at = step * BLOCK_K + k
            place = at.to(tl.int64)
            is_product = at < length
            inside = tl.full((BLOCK_M, 1), 1, tl.int1)
        elif not IS_FLAT:
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
        if EVEN and not HAS_WINDOW:
            values = tl.load(address)
        elif PADS_WITH_ZERO or not HAS_WINDOW:
            values = tl.load(address, inside, other=0)
        else:
            values = tl.load(address, inside, other=zero)
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
