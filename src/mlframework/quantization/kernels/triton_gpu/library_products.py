"""Matrix products of the vendor's library (``torch._int_mm``), whose int32 sums go through memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import BLOCK, EXACT
from .results import Result, signed, store_result


def suits_library(rows: Tensor, weight: Tensor) -> bool:
    """Whether it takes these operands on a GPU: whole, aligned, more than 16 rows, and sizes in multiples of 8. (Others
    are padded in the registers of the kernel that is its alternative, rather than in memory.)"""
    if not (rows.is_cuda and rows.is_contiguous() and rows.shape[0] > 16):
        return False
    is_aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (rows, weight))
    return is_aligned and all(size % 8 == 0 for size in weight.shape)


def through_library(rows: Tensor, weight: Tensor, result: Result, output: Tensor) -> None:
    """Codes (M, I) by a weight (O, I), and the rest of the layer after it."""
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
