"""Gradients of a fake quantization whose scale or zero point learns."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from ..operators.fake_quantization import gradient_scale
from ..operators.layout import dense, laid_out_like
from .arithmetic import clamped, grid_zero_point, unsaturated_codes
from .launch import EXACT, channels_of
from .reductions import channels_as_matrix, partial_places, reduced_tile, total


@triton.jit
def _fake_quantize_backward(
    gradient,
    input,
    scale,
    zero_point,
    to_input,
    partials,
    channels,
    clip,
    factor,
    rows,
    columns,
    splits,
    size,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PASSES_SATURATED: tl.constexpr,
    CLIPS: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,
    AXIS: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    kept = program // splits
    to_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    to_zero_point = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(EACH):
        row, column = reduced_tile(kept, split, step, AXIS, EACH, ROWS, COLUMNS)
        offset = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        if not PER_CHANNEL:
            own_scale = tl.load(scale).to(tl.float32)
            zero = grid_zero_point(tl.load(zero_point), LOWEST, HIGHEST)
        elif AXIS == 1:
            own_scale = tl.load(scale + row % channels)[:, None].to(tl.float32)
            zero = grid_zero_point(tl.load(zero_point + row % channels)[:, None], LOWEST, HIGHEST)
        else:
            own_scale = tl.load(scale + column % channels)[None, :].to(tl.float32)
            zero = grid_zero_point(tl.load(zero_point + column % channels)[None, :], LOWEST, HIGHEST)
        value = tl.load(input + offset, inside, other=0.0).to(tl.float32)
        passed = tl.load(gradient + offset, inside, other=0.0).to(tl.float32)
        if CLIPS:
            passed = clamped(passed, -clip, clip)
        code = unsaturated_codes(value, own_scale, zero)
        is_on_grid = (code >= LOWEST) & (code <= HIGHEST)
        if NEEDS_INPUT:
            onwards = passed if PASSES_SATURATED else tl.where(is_on_grid, passed, 0.0)
            tl.store(to_input + offset, onwards.to(to_input.dtype.element_ty), inside)
        scaled = passed * factor
        ratio = tl.where(is_on_grid, tl.math.div_rn(value, own_scale), 0.0)
        to_scale += tl.where(inside, scaled * (clamped(code, LOWEST, HIGHEST) - zero - ratio), 0.0)
        to_zero_point += tl.where(inside & (is_on_grid == 0), scaled * -own_scale, 0.0)
    place, is_kept = partial_places(kept, split, rows, columns, splits, AXIS, ROWS, COLUMNS)
    tl.store(partials + place, tl.sum(to_scale, AXIS), is_kept)
    tl.store(partials + size + place, tl.sum(to_zero_point, AXIS), is_kept)


def fake_quantize_backward(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    pass_saturated: bool,
    gradient_clip: float | None,
    needs_input: bool,
) -> Any:
    options = (lowest, highest, axis, pass_saturated, gradient_clip, needs_input)
    operator = DECLARED["fake_quantize_backward"]
    if input.numel() == 0:
        return operator.reference(gradient, input, scale, zero_point, *options)
    to_input, to_scale, to_zero_point = operator.empty_outputs(gradient, input, scale, zero_point, *options)
    input, scale, zero_point = dense(input), scale.contiguous(), zero_point.contiguous()
    per_channel = scale.numel() > 1
    matrix = channels_as_matrix(input, axis if per_channel else -1)
    outer, channels, _ = channels_of(input, axis if per_channel else -1)
    partials = input.new_empty((2, *matrix.partials), dtype=torch.float32)
    _fake_quantize_backward[(matrix.programs,)](
        laid_out_like(gradient, input),
        input,
        scale,
        zero_point,
        input if to_input is None else to_input,
        partials,
        channels,
        0.0 if gradient_clip is None else gradient_clip,
        gradient_scale(input, scale, highest),
        *matrix.numbers,
        lowest,
        highest,
        per_channel,
        pass_saturated,
        gradient_clip is not None,
        needs_input,
        *matrix.constants,
        **EXACT,
    )
    if outer == 1 or matrix.axis == 0:
        total(partials, matrix, to_scale, to_zero_point)
    else:
        sums = partials.view(2, outer, channels, matrix.splits).sum((1, 3), dtype=torch.float64)
        to_scale.copy_(sums[0])
        to_zero_point.copy_(sums[1])
    return to_input, to_scale, to_zero_point
