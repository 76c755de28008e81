"""Batch normalization in training with what follows it, backward: kernels of :mod:`..operators.normalization`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from .arithmetic import clamped, unpacked_bits
from .launch import BLOCK, EXACT
from .normalization import channels_of_block
from .reductions import reduction, total


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
    is_column = column < columns
    own_mean = tl.load(mean + column, is_column, other=0.0)[None, :]
    inverse = tl.load(inverse_deviation + column, is_column, other=0.0)[None, :]
    to_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(EACH):
        row = (split * EACH + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & is_column[None, :]
        offset = row[:, None] * columns + column[None, :]
        byte = tl.load(mask + offset // 8, inside, other=0).to(tl.int32)
        passes = ((byte >> (offset % 8).to(tl.int32)) & 1) > 0
        passed = clamped(tl.load(gradient + offset, inside, other=0.0).to(tl.float32), -clip, clip)
        passed = tl.where(passes, passed, 0.0)
        value = tl.load(values + offset, inside, other=0.0).to(tl.float32)
        to_bias += passed
        to_weight += tl.where(inside, passed * ((value - own_mean) * inverse), 0.0)
    place = split * columns + column
    tl.store(partials + place, tl.sum(to_bias, 0), is_column)
    tl.store(partials + size + place, tl.sum(to_weight, 0), is_column)


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
    IS_FROZEN: tl.constexpr,
    IN_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = offset < count
    channel = channels_of_block(start, columns, IN_GROUPS, BLOCK)
    passed = clamped(tl.load(gradient + offset, inside, other=0.0).to(tl.float32), -clip, clip)
    passed = tl.where(unpacked_bits(mask, start, count, BLOCK), passed, 0.0)
    inverse = tl.load(inverse_deviation + channel)
    factor = inverse * tl.load(weight + channel) if HAS_WEIGHT else inverse
    if not IS_FROZEN:  # or else the statistics change with the values
        value = tl.load(values + offset, inside, other=0.0).to(tl.float32)
        normalized = (value - tl.load(mean + channel)) * inverse
        passed -= (tl.load(to_bias + channel) + normalized * tl.load(to_weight + channel)) * share
    tl.store(to_values + offset, (passed * factor).to(to_values.dtype.element_ty), inside)


def normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    gradient_clip: float,
    is_frozen: bool,
) -> Any:
    to_values, to_weight, to_bias = DECLARED["normalize_backward"].empty_outputs(
        gradient, mask, values, mean, inverse_deviation, weight, gradient_clip, is_frozen
    )
    mean, inverse_deviation = mean.contiguous(), inverse_deviation.contiguous()
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
    total(partials, matrix, to_bias, to_weight)
    _normalize_backward[(triton.cdiv(count, BLOCK),)](
        gradient,
        mask,
        values,
        mean,
        inverse_deviation,
        mean if weight is None else weight.contiguous(),
        to_bias,
        to_weight,
        to_values,
        gradient_clip,
        columns / count,
        count,
        columns,
        weight is not None,
        is_frozen,
        columns % 8 == 0,
        BLOCK,
        **EXACT,
    )
    return to_values, to_weight, to_bias
