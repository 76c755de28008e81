"""What becomes of the sums of a layer, in the registers of the kernel that has formed them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import clamped, requantized, to_codes


class Result(NamedTuple):
    """The rest of a layer: codes or values, whichever the output's dtype says.

    Attributes:
        bias: int32 (O,), with what makes up for the zero point and for unsigned codes (:func:`.fold_zero_point`).
        multiplier: float32, (O,) or (1,).
        zero_point: of the output's codes.
        lowest, highest: the codes, or the values, that the output saturates at. All three are numbers, or all three
            tensors of one element.
    """

    bias: Tensor
    multiplier: Tensor
    zero_point: float | Tensor = 0.0
    lowest: float | Tensor = -math.inf
    highest: float | Tensor = math.inf

    @property
    def is_in_memory(self) -> bool:
        """Whether kernels have to load what the output saturates at."""
        return isinstance(self.lowest, Tensor)


def signed(codes: Tensor) -> Tensor:
    """Codes as int8; unsigned ones are lowered by 128."""
    return (codes ^ 128).view(torch.int8) if codes.dtype is torch.uint8 else codes


@triton.jit
def as_signed(codes):
    """:func:`signed` on the device."""
    return (codes ^ 128).to(tl.int8, bitcast=True) if codes.dtype == tl.uint8 else codes


@triton.jit
def store_result(
    sums,
    places,
    inside,
    channel,
    bias,
    multiplier,
    output,
    zero_point,
    lowest,
    highest,
    PER_CHANNEL: tl.constexpr,
    IN_MEMORY: tl.constexpr,
):
    """Stores codes or values of int32 sums; ``channel`` is that of each, or of each column."""
    if IN_MEMORY:
        zero_point = tl.load(zero_point).to(tl.float32)
        lowest = tl.load(lowest).to(tl.float32)
        highest = tl.load(highest).to(tl.float32)
    accumulator = sums + tl.load(bias + channel)
    factor = tl.load(multiplier + (channel if PER_CHANNEL else channel * 0))
    if output.dtype.element_ty.is_int():
        codes = requantized(accumulator, factor, zero_point, lowest, highest)
        tl.store(output + places, to_codes(codes, output.dtype.element_ty), inside)
    else:
        values = clamped(accumulator.to(tl.float32) * factor, lowest, highest)
        tl.store(output + places, values.to(output.dtype.element_ty), inside)
