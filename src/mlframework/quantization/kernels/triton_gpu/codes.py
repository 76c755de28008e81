"""Operations on codes, element by element: the kernels of :mod:`..operators.codes`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from ..operators.layout import dense, laid_out_like
from .arithmetic import clamped, requantized, to_codes, unsaturated_codes
from .launch import BLOCK, BLOCK_OF_CODES, EXACT, WARPS_OF_CODES, channel_rows, of_channels, tile, tiles_of


@triton.jit(do_not_specialize=["lowest", "highest"])
def _quantize(
    values,
    scale,
    zero_point,
    codes,
    rows,
    columns,
    channels,
    lowest,
    highest,
    PER_CHANNEL: tl.constexpr,
    ARE_INNERMOST: tl.constexpr,
    beside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile(beside, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row * columns + column
    own_scale = of_channels(scale, row, column, channels, PER_CHANNEL, ARE_INNERMOST).to(tl.float32)
    zero = of_channels(zero_point, row, column, channels, PER_CHANNEL, ARE_INNERMOST).to(tl.float32)
    value = tl.load(values + offset, inside, other=0.0).to(tl.float32)
    code = unsaturated_codes(value, own_scale, zero)
    saturated = tl.where(code == code, clamped(code, lowest, highest), lowest)  # NaN has no code
    tl.store(codes + offset, to_codes(saturated, codes.dtype.element_ty), inside)


def quantize(
    values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, dtype: torch.dtype, axis: int
) -> Tensor:
    codes: Tensor = DECLARED["quantize"].empty_outputs(values, scale, zero_point, lowest, highest, dtype, axis)
    if codes.numel() == 0:
        return codes
    values = dense(values)
    per_channel = scale.numel() > 1
    rows, columns, channels, are_innermost = channel_rows(values, axis if per_channel else -1)
    programs, *tiles = tiles_of(rows, columns)
    _quantize[(programs,)](
        values,
        scale.contiguous(),
        zero_point.contiguous(),
        codes,
        rows,
        columns,
        channels,
        lowest,
        highest,
        per_channel,
        are_innermost,
        *tiles,
        **EXACT,
    )
    return codes


@triton.jit
def _dequantize(
    codes,
    scale,
    zero_point,
    values,
    rows,
    columns,
    channels,
    PER_CHANNEL: tl.constexpr,
    ARE_INNERMOST: tl.constexpr,
    beside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile(beside, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row * columns + column
    own_scale = of_channels(scale, row, column, channels, PER_CHANNEL, ARE_INNERMOST)
    zero = of_channels(zero_point, row, column, channels, PER_CHANNEL, ARE_INNERMOST).to(tl.float32)
    code = tl.load(codes + offset, inside, other=0).to(tl.float32)
    tl.store(values + offset, ((code - zero) * own_scale).to(values.dtype.element_ty), inside)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    values: Tensor = DECLARED["dequantize"].empty_outputs(codes, scale, zero_point, axis, dtype)
    if codes.numel() == 0:
        return values
    codes = dense(codes)
    per_channel = scale.numel() > 1
    rows, columns, channels, are_innermost = channel_rows(codes, axis if per_channel else -1)
    programs, *tiles = tiles_of(rows, columns)
    _dequantize[(programs,)](
        codes,
        scale.contiguous(),
        zero_point.contiguous(),
        values,
        rows,
        columns,
        channels,
        per_channel,
        are_innermost,
        *tiles,
        **EXACT,
    )
    return values


@triton.jit
def _place_of(code):
    """The place of a code among all 256 of its dtype, the lowest first."""
    return code.to(tl.int32) + (128 if code.dtype == tl.int8 else 0)


def _of_all_codes(numbers: Tensor, name: str) -> Tensor:
    """The numbers for the 256 codes one after another: a kernel reads at any code without looking."""
    if numbers.numel() != 256:
        raise RuntimeError(f"{name} must hold 256 numbers, got {numbers.numel()}")
    return numbers.contiguous()


@triton.jit
def _lookup(codes, table, results, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    place = _place_of(tl.load(codes + offset, inside, other=0))
    tl.store(results + offset, tl.load(table + place), inside)


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    table = _of_all_codes(table, "table")
    results: Tensor = DECLARED["lookup"].empty_outputs(codes, table)
    count = codes.numel()
    if count > 0:
        grid = (triton.cdiv(count, BLOCK_OF_CODES),)
        _lookup[grid](dense(codes), table, results, count, BLOCK_OF_CODES, num_warps=WARPS_OF_CODES, **EXACT)
    return results


@triton.jit
def _lookup_gradient(gradient, codes, slopes, passed, count, clip, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    value = tl.load(gradient + offset, inside, other=0.0).to(tl.float32)
    slope = tl.load(slopes + _place_of(tl.load(codes + offset, inside, other=0)))
    if CLIPS:
        value = clamped(value, -clip, clip)
    tl.store(passed + offset, tl.where(slope == 0, 0.0, value * slope).to(passed.dtype.element_ty), inside)


def lookup_gradient(gradient: Tensor, codes: Tensor, slopes: Tensor, gradient_clip: float | None) -> Tensor:
    slopes = _of_all_codes(slopes, "slopes")
    if gradient.shape != codes.shape:
        raise RuntimeError(f"gradient must have the shape of codes, got {[*gradient.shape]} and {[*codes.shape]}")
    passed: Tensor = DECLARED["lookup_gradient"].empty_outputs(gradient, codes, slopes, gradient_clip)
    count = codes.numel()
    if count > 0:
        clip = 0.0 if gradient_clip is None else gradient_clip
        _lookup_gradient[(triton.cdiv(count, BLOCK),)](
            laid_out_like(gradient, passed),
            dense(codes),
            slopes,
            passed,
            count,
            clip,
            gradient_clip is not None,
            BLOCK,
            **EXACT,
        )
    return passed


@triton.jit
def _occurring(codes, present, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    place = _place_of(tl.load(codes + offset, inside, other=0))
    # What other programs have found is seen sooner or later, and most blocks then hold nothing new. They write the same
    # ones, so that their order does not matter.
    is_new = inside & (tl.load(present + place) == 0)
    if tl.max(is_new.to(tl.int32), 0) > 0:
        found = tl.histogram(place, 256, inside) > 0
        tl.store(present + tl.arange(0, 256), tl.full((256,), 1, present.dtype.element_ty), found)


def occurring(codes: Tensor) -> Tensor:
    present: Tensor = DECLARED["occurring"].empty_outputs(codes).zero_()
    count = codes.numel()
    if count > 0:
        grid = (triton.cdiv(count, BLOCK_OF_CODES),)
        _occurring[grid](dense(codes), present, count, BLOCK_OF_CODES, num_warps=WARPS_OF_CODES, **EXACT)
    return present


@triton.jit(do_not_specialize=["zero_point", "lowest", "highest"])
def _requantize(
    sums,
    bias,
    multiplier,
    codes,
    rows,
    columns,
    channels,
    zero_point,
    lowest,
    highest,
    HAS_BIAS: tl.constexpr,
    BIAS_PER_CHANNEL: tl.constexpr,
    MULTIPLIER_PER_CHANNEL: tl.constexpr,
    ARE_INNERMOST: tl.constexpr,
    beside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile(beside, ROWS, COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row * columns + column
    accumulator = tl.load(sums + offset, inside, other=0)
    if HAS_BIAS:
        addend = of_channels(bias, row, column, channels, BIAS_PER_CHANNEL, ARE_INNERMOST)
        # An int32 bias makes an int32 accumulator, and a float32 one a float32 accumulator.
        accumulator = accumulator.to(addend.dtype) + addend
    factor = of_channels(multiplier, row, column, channels, MULTIPLIER_PER_CHANNEL, ARE_INNERMOST)
    code = requantized(accumulator, factor, zero_point, lowest, highest)
    tl.store(codes + offset, to_codes(code, codes.dtype.element_ty), inside)


def requantize(
    sums: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    zero_point: int,
    lowest: int,
    highest: int,
    dtype: torch.dtype,
    channel_axis: int,
) -> Tensor:
    codes: Tensor = DECLARED["requantize"].empty_outputs(
        sums, bias, multiplier, zero_point, lowest, highest, dtype, channel_axis
    )
    if codes.numel() == 0:
        return codes
    bias_per_channel = bias is not None and bias.numel() > 1
    per_channel = bias_per_channel or multiplier.numel() > 1
    axis = channel_axis % codes.dim() if per_channel else -1
    rows, columns, channels, are_innermost = channel_rows(codes, axis)
    programs, *tiles = tiles_of(rows, columns, BLOCK_OF_CODES)
    _requantize[(programs,)](
        laid_out_like(sums, codes),
        sums if bias is None else bias.contiguous(),
        multiplier.contiguous(),
        codes,
        rows,
        columns,
        channels,
        zero_point,
        lowest,
        highest,
        bias is not None,
        bias_per_channel,
        multiplier.numel() > 1,
        are_innermost,
        *tiles,
        num_warps=WARPS_OF_CODES,
        **EXACT,
    )
    return codes
