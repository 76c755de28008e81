"""The weight of a layer in one training step: observed, quantized, with room for the bias, as the products read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import arithmetic
from ..operators.integer_layers import UNSIGNED_OFFSET
from .arithmetic import (
    bias_code,
    clamped,
    is_finite,
    moved_average,
    rescaled_code,
    scale_of_range,
    scale_with_room,
    unsaturated_codes,
)
from .fake_quantization import fake_quantize
from .launch import BLOCK, EXACT
from .statistics import update_moving_average
from .tuning import loop_bound


class Averages(NamedTuple):
    """What observes a weight, updated in place."""

    minimum: Tensor
    maximum: Tensor
    batches: Tensor
    zero_point: Tensor
    momentum: float


class QuantizedWeight(NamedTuple):
    """Of a weight (O, I / groups, *kernel).

    Attributes:
        codes: int8 (O, *kernel, I / groups).
        bias: int32 (O,), with what makes up for the input's zero point and for unsigned codes.
        multiplier: from the accumulator to values, float32 (O,).
        scale: as it was used, float32 (O,); NaN where nothing is known.
        mask: whether a gradient passes, a bit to an element in the order of the weight's memory; None if not asked for.
    """

    codes: Tensor
    bias: Tensor
    multiplier: Tensor
    scale: Tensor
    mask: Tensor | None


@triton.jit(do_not_specialize=["outputs", "blocks", "offset"])
def _prepare(
    weight,
    scale,
    bias,
    grid,
    minimum,
    maximum,
    batches,
    zero_point,
    is_counted,
    codes,
    folded,
    multiplier,
    used,
    outputs,
    length,
    blocks,
    taps,
    channels,
    offset,
    momentum,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    OBSERVES: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some of the output's channels, each a row whose elements lie side by side, ``channels`` times ``taps`` of them;
    where these already are next to each other as the products read them, ``taps`` is 1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < outputs
    start = (row * length)[:, None]
    column = tl.arange(0, COLUMNS)
    step = tl.load(scale + (row if PER_CHANNEL else row * 0), is_row, other=1.0)
    is_unknown = step != step
    if not IS_QUANTIZED:
        lowest_seen = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
        highest_seen = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
        nan_seen = tl.zeros((ROWS, COLUMNS), tl.int32)
        for block in range(blocks):
            place = (block * COLUMNS + column)[None, :]
            inside = is_row[:, None] & (place < length)
            value = tl.load(weight + (start + place), inside, other=0.0).to(tl.float32)
            is_value = inside & (value == value)
            lowest_seen = tl.minimum(lowest_seen, tl.where(is_value, value, float("inf")))
            highest_seen = tl.maximum(highest_seen, tl.where(is_value, value, float("-inf")))
            nan_seen = nan_seen | (value != value).to(tl.int32)
        has_nan = tl.max(nan_seen, 1) > 0
        is_unknown = is_unknown | has_nan
        if OBSERVES:
            low = tl.where(has_nan, float("inf"), tl.min(lowest_seen, 1))
            high = tl.where(has_nan, float("-inf"), tl.max(highest_seen, 1))
            # The averages do not follow what is not finite: the grid would be an older weight's.
            is_unknown = is_unknown | ~is_finite(low) | ~is_finite(high)
            any_finite = tl.max((is_row & (is_finite(low) | is_finite(high))).to(tl.int32), 0)
            low = moved_average(tl.load(minimum + row, is_row, other=0.0), low, momentum)
            high = moved_average(tl.load(maximum + row, is_row, other=0.0), high, momentum)
            step = scale_of_range(low, high, LOWEST, HIGHEST, True, 0, SMALLEST, LARGEST)
            tl.store(minimum + row, low, is_row)
            tl.store(maximum + row, high, is_row)
            tl.store(scale + row, step, is_row)
            tl.store(zero_point + row, step * 0, is_row)
            # The first program to get here counts the batch.
            before = tl.atomic_max(is_counted, any_finite)
            tl.store(batches, tl.load(batches) + 1, (any_finite > 0) & (before == 0))

    input_scale = tl.load(grid)
    if HAS_BIAS:
        own_bias = tl.load(bias + row, is_row, other=0.0).to(tl.float32)
        is_unknown = is_unknown | ~is_finite(own_bias)
        own_bias = tl.where(is_finite(own_bias), own_bias, 0.0)
    else:
        own_bias = tl.zeros((ROWS,), tl.float32)
    own_step = tl.where(step == step, step, 1.0)
    raised, ratio = scale_with_room(own_step, own_bias, input_scale, SMALLEST, LARGEST_BIAS)

    code_sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    for block in range(blocks):
        place = (block * COLUMNS + column)[None, :]
        inside = is_row[:, None] & (place < length)
        value = tl.load(weight + (start + place), inside, other=0).to(tl.float32)
        if not IS_QUANTIZED:
            number = tl.where(value == value, value, 0.0)
            value = clamped(unsaturated_codes(number, own_step[:, None], 0.0), LOWEST, HIGHEST)
        code = rescaled_code(value, ratio[:, None])
        code_sums += tl.where(inside, code, 0)
        tl.store(codes + (start + place % taps * channels + place // taps), code.to(tl.int8), inside)

    input_zero = tl.load(grid + 1).to(tl.int32)
    tl.store(
        folded + row, bias_code(own_bias, input_scale * raised) + tl.sum(code_sums, 1) * (offset - input_zero), is_row
    )
    own_used = tl.where(is_unknown, float("nan"), raised)
    tl.store(used + row, own_used, is_row)
    tl.store(multiplier + row, input_scale * own_used, is_row)


def quantized_weight(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    axis: int,
    lowest: int,
    highest: int,
    input_dtype: torch.dtype,
    averages: Averages | None,
    wants_mask: bool,
) -> QuantizedWeight:
    """The weight as it is used in this step; with ``averages``, it is observed first, and its scale updated."""
    ends = (lowest, highest, axis, -torch.inf, torch.inf, False, wants_mask, False)
    if axis < 0:
        # What concerns all channels is to be known before the first of them.
        if averages is not None:
            minimum, maximum, batches, zero_point, momentum = averages
            state = minimum, maximum, batches, scale, zero_point
            update_moving_average(weight, False, axis, *state, momentum, lowest, highest, True, 0, True)
        _, codes, mask, _, own_grid = fake_quantize(weight, None, scale, torch.zeros_like(scale), *ends, torch.int8)
        return _prepared(codes, own_grid[0], bias, grid, lowest, highest, input_dtype, None, mask)
    result = _prepared(weight, scale, bias, grid, lowest, highest, input_dtype, averages, None)
    if not wants_mask:
        return result
    mask = fake_quantize(weight, None, scale, torch.zeros_like(scale), *ends, None)[2]
    return result._replace(mask=mask)


def _prepared(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Tensor,
    lowest: int,
    highest: int,
    input_dtype: torch.dtype,
    averages: Averages | None,
    mask: Tensor | None,
) -> QuantizedWeight:
    outputs, channels, *kernel = weight.shape
    if weight.movedim(1, -1).is_contiguous():
        taps = 1
    else:
        weight = weight.contiguous()
        taps = weight.numel() // (outputs * channels)
    length = weight.numel() // outputs
    codes = weight.new_empty((outputs, *kernel, channels), dtype=torch.int8)
    folded = weight.new_empty(outputs, dtype=torch.int32)
    multiplier, used = (weight.new_empty(outputs, dtype=torch.float32) for _ in range(2))
    columns = min(triton.next_power_of_2(length), BLOCK)
    rows = min(BLOCK // columns, triton.next_power_of_2(outputs), 64)
    nothing = used  # in the place of what is not read
    state = (nothing,) * 4 if averages is None else averages[:4]
    _prepare[(triton.cdiv(outputs, rows),)](
        weight,
        scale,
        nothing if bias is None else bias,
        grid.contiguous(),
        *state,
        nothing if averages is None else weight.new_zeros(1, dtype=torch.int32),
        codes,
        folded,
        multiplier,
        used,
        outputs,
        length,
        loop_bound(triton.cdiv(length, columns)),
        taps,
        channels,
        UNSIGNED_OFFSET if input_dtype is torch.uint8 else 0,
        1.0 if averages is None else averages.momentum,
        lowest,
        highest,
        arithmetic.SMALLEST_SCALE,
        arithmetic.LARGEST_SCALE,
        arithmetic.LARGEST_BIAS_CODE,
        bias is not None,
        weight.dtype is torch.int8,
        averages is not None,
        scale.numel() > 1,
        rows,
        columns,
        **EXACT,
    )
    return QuantizedWeight(codes, folded, multiplier, used, mask)
