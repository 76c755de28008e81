"""Batch normalization in training with what follows it, forward: a kernel of :mod:`..operators.normalization`.

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
from .arithmetic import grid_zero_point
from .fake_quantization import quantize_block, store_partials, summarize, widened
from .launch import BLOCK, EXACT, blocks_of


@triton.jit
def channels_of_block(start, columns, IN_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
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
        channel = channels_of_block(start, columns, IN_GROUPS, BLOCK)
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
        lowest_seen, highest_seen, nan_seen = widened(lowest_seen, highest_seen, nan_seen, bounded, inside)
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
    mean, inverse_deviation = mean.contiguous(), inverse_deviation.contiguous()
    programs, each = blocks_of(input.numel())
    partials = input.new_empty((3, programs), dtype=torch.float32)
    columns = input.shape[1]
    _normalize[(programs,)](
        input,
        mean,
        inverse_deviation,
        mean if weight is None else weight.contiguous(),
        mean if bias is None else bias.contiguous(),
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
