"""Operations on codes: the kernels of :mod:`..operators.codes`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators.declaration import DECLARED
from ..operators.layout import dense
from .launch import BLOCK, EXACT, channels_of


@triton.jit
def _dequantize(
    codes, scale, zero_point, values, count, channels, inner, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    channel = (offset // inner) % channels if PER_CHANNEL else 0
    code = tl.load(codes + offset, inside, other=0).to(tl.float32)
    step = tl.load(scale + channel)
    zero = tl.load(zero_point + channel).to(tl.float32)
    tl.store(values + offset, ((code - zero) * step).to(values.dtype.element_ty), inside)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    values: Tensor = DECLARED["dequantize"].empty_outputs(codes, scale, zero_point, axis, dtype)
    if codes.numel() == 0:
        return values
    codes = dense(codes)
    _, channels, inner = channels_of(codes, axis)
    _dequantize[(triton.cdiv(codes.numel(), BLOCK),)](
        codes, scale, zero_point, values, codes.numel(), channels, inner, scale.numel() > 1, BLOCK, **EXACT
    )
    return values
