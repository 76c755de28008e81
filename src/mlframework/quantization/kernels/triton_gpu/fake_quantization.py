"""Fake quantization: the kernels of :mod:`..operators.fake_quantization`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from ..operators.layout import dense, laid_out_like
from .arithmetic import clamped, grid_zero_point, packed_bits, to_codes, unpacked_bits, unsaturated_codes
from .launch import BLOCK, EXACT, blocks_of, channels_of


@triton.jit
def quantize_block(
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
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    CLIPS: tl.constexpr,
    WANTS_VALUES: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    WANTS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clips and quantizes float32 values (BLOCK // 8, 8), the first of which is element ``start``, a multiple of eight;
    stores what is wanted, and returns them as they were rounded."""
    byte = tl.arange(0, BLOCK // 8)
    offset = start + byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = offset < count
    bounded = clamped(value, clip_low, clip_high) if CLIPS else value
    code = unsaturated_codes(bounded, own_scale, zero)
    saturated = clamped(code, LOWEST, HIGHEST)
    if WANTS_VALUES:
        tl.store(values + offset, ((saturated - zero) * own_scale).to(values.dtype.element_ty), inside)
    if WANTS_CODES:
        known = tl.where(bounded != bounded, LOWEST, saturated)
        tl.store(codes + offset, to_codes(known, codes.dtype.element_ty), inside)
    if WANTS_MASK:
        passes = inside & (code >= LOWEST) & (code <= HIGHEST)
        if CLIPS:
            passes = passes & (value > clip_low) & (value < clip_high)
        tl.store(mask + start // 8 + byte, packed_bits(passes.to(tl.int32)), start + byte * 8 < count)
    return bounded


@triton.jit
def widened(lowest_seen, highest_seen, nan_seen, value, inside):
    """What a program has seen so far, and more values."""
    lowest_seen = tl.minimum(lowest_seen, tl.where(inside, value, float("inf")))
    highest_seen = tl.maximum(highest_seen, tl.where(inside, value, float("-inf")))
    return lowest_seen, highest_seen, nan_seen | (inside & (value != value)).to(tl.int32)


@triton.jit
def store_partials(partials, lowest_seen, highest_seen, nan_seen):
    """What a program has seen, for :func:`_summarize`."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partials + program, tl.max(tl.max(nan_seen, 1), 0).to(tl.float32))
    tl.store(partials + programs + program, tl.min(tl.min(lowest_seen, 1), 0))
    tl.store(partials + 2 * programs + program, tl.max(tl.max(highest_seen, 1), 0))


@triton.jit
def _fake_quantize(
    input,
    addend,
    scale,
    zero_point,
    values,
    codes,
    mask,
    partials,
    grid,
    count,
    channels,
    inner,
    clip_low,
    clip_high,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    CLIPS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WANTS_VALUES: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    WANTS_MASK: tl.constexpr,
    SUMMARIZES: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * EACH
    # Eight neighbours to a row: a byte of the mask.
    places = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    lowest_seen = tl.full((BLOCK // 8, 8), float("inf"), tl.float32)
    highest_seen = tl.full((BLOCK // 8, 8), float("-inf"), tl.float32)
    nan_seen = tl.zeros((BLOCK // 8, 8), tl.int32)
    for step in range(EACH):
        start = (first + step) * BLOCK
        offset = start + places
        inside = offset < count
        value = tl.load(input + offset, inside, other=0.0).to(tl.float32)
        if HAS_ADDEND:
            value += tl.load(addend + offset, inside, other=0.0).to(tl.float32)
        channel = (offset // inner) % channels if PER_CHANNEL else 0
        bounded = quantize_block(
            value,
            start,
            count,
            tl.load(scale + channel).to(tl.float32),
            grid_zero_point(tl.load(zero_point + channel), LOWEST, HIGHEST),
            values,
            codes,
            mask,
            clip_low,
            clip_high,
            LOWEST,
            HIGHEST,
            CLIPS,
            WANTS_VALUES,
            WANTS_CODES,
            WANTS_MASK,
            BLOCK,
        )
        if PER_CHANNEL and WANTS_CODES:
            nowhere = tl.full((BLOCK // 8, 8), float("nan"), tl.float32)
            tl.store(grid + channel, nowhere, inside & (bounded != bounded))
        if SUMMARIZES:
            lowest_seen, highest_seen, nan_seen = widened(lowest_seen, highest_seen, nan_seen, bounded, inside)
    if SUMMARIZES:
        store_partials(partials, lowest_seen, highest_seen, nan_seen)


@triton.jit
def _summarize(
    partials,
    scale,
    zero_point,
    extremes,
    grid,
    programs,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    WANTS_CODES: tl.constexpr,
    WANTS_EXTREMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What programs have seen (:func:`store_partials`), as extremes and the grid of the codes; one program."""
    offset = tl.arange(0, BLOCK)
    inside = offset < programs
    has_nan = tl.max(tl.load(partials + offset, inside, other=0.0), 0) > 0
    if WANTS_EXTREMES:
        minimum = tl.min(tl.load(partials + programs + offset, inside, other=float("inf")), 0)
        maximum = tl.max(tl.load(partials + 2 * programs + offset, inside, other=float("-inf")), 0)
        negated = tl.where(has_nan | (tl.abs(minimum) == float("inf")), float("-inf"), -minimum)
        tl.store(extremes, negated)
        tl.store(extremes + 1, tl.where(has_nan | (tl.abs(maximum) == float("inf")), float("-inf"), maximum))
    if WANTS_CODES:
        tl.store(grid, tl.where(has_nan, float("nan"), tl.load(scale).to(tl.float32)))
        tl.store(grid + 1, grid_zero_point(tl.load(zero_point), LOWEST, HIGHEST))


def fake_quantize(
    input: Tensor,
    addend: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    axis: int,
    clip_low: float,
    clip_high: float,
    wants_values: bool,
    wants_mask: bool,
    wants_extremes: bool,
    code_dtype: torch.dtype | None,
) -> Any:
    operator = DECLARED["fake_quantize"]
    per_channel = scale.numel() > 1
    if input.numel() == 0 or (wants_extremes and axis >= 0):
        # The extremes of channels are asked for by themselves.
        rest = (clip_low, clip_high, wants_values, wants_mask, wants_extremes, code_dtype)
        return operator.reference(input, addend, scale, zero_point, lowest, highest, axis, *rest)
    outputs = operator.empty_outputs(
        input,
        addend,
        scale,
        zero_point,
        lowest,
        highest,
        axis,
        clip_low,
        clip_high,
        wants_values,
        wants_mask,
        wants_extremes,
        code_dtype,
    )
    values, codes, mask, both, grid = outputs
    input, scale, zero_point = dense(input), scale.contiguous(), zero_point.contiguous()
    if grid is not None and per_channel:
        grid[0] = scale
        grid[1] = torch.round(zero_point.to(torch.float32)).clamp(lowest, highest)
    count = input.numel()
    programs, each = blocks_of(count)
    summarizes = not per_channel and (wants_extremes or codes is not None)
    partials = input.new_empty((3, programs), dtype=torch.float32) if summarizes else input
    _, channels, inner = channels_of(input, axis)
    _fake_quantize[(programs,)](
        input,
        input if addend is None else laid_out_like(addend, input),
        scale,
        zero_point,
        input if values is None else values,
        input if codes is None else codes,
        input if mask is None else mask,
        partials,
        input if grid is None else grid,
        count,
        channels,
        inner,
        clip_low,
        clip_high,
        lowest,
        highest,
        addend is not None,
        clip_low > -math.inf or clip_high < math.inf,
        per_channel,
        wants_values,
        codes is not None,
        wants_mask,
        summarizes,
        each,
        BLOCK,
        **EXACT,
    )
    if summarizes:
        summarize(partials, scale, zero_point, both, grid, lowest, highest)
    return outputs


def summarize(
    partials: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    extremes: Tensor | None,
    grid: Tensor | None,
    lowest: int,
    highest: int,
) -> None:
    """Fills in extremes and grid of per-tensor codes, where wanted, from what the programs have left behind."""
    _summarize[(1,)](
        partials,
        scale,
        zero_point,
        partials if extremes is None else extremes,
        partials if grid is None else grid,
        partials.shape[1],
        lowest,
        highest,
        grid is not None,
        extremes is not None,
        triton.next_power_of_2(partials.shape[1]),
        **EXACT,
    )


@triton.jit
def _mask_gradient(gradient, mask, passed, count, clip, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = start + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = offset < count
    value = tl.load(gradient + offset, inside, other=0.0).to(tl.float32)
    if CLIPS:
        value = clamped(value, -clip, clip)
    value = tl.where(unpacked_bits(mask, start, count, BLOCK), value, 0.0)
    tl.store(passed + offset, value.to(passed.dtype.element_ty), inside)


def mask_gradient(gradient: Tensor, mask: Tensor, strides: list[int], gradient_clip: float | None) -> Tensor:
    passed: Tensor = DECLARED["mask_gradient"].empty_outputs(gradient, mask, strides, gradient_clip)
    count = gradient.numel()
    if count > 0:
        clip = 0.0 if gradient_clip is None else gradient_clip
        _mask_gradient[(triton.cdiv(count, BLOCK),)](
            laid_out_like(gradient, passed), mask, passed, count, clip, gradient_clip is not None, BLOCK, **EXACT
        )
    return passed
