"""What becomes of the sums of an integer layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import arithmetic
from .operators.codes import along_channels, requantize, with_bias


@dataclass(frozen=True)
class Epilogue:
    """What a layer does to its sums.

    Args:
        bias: int32, (O,).
        multiplier: float32, (O,) or (1,): from the accumulator's grid to the output's, or to values.
        zero_point: of the output's codes.
        lowest, highest: the codes, or the values, that the output saturates at.
        dtype: of the output: ``torch.uint8`` or ``torch.int8`` for codes; for values a floating-point one, where the
            backend has it, or else float32.
    """

    bias: Tensor
    multiplier: Tensor
    zero_point: int = 0
    lowest: float = -math.inf
    highest: float = math.inf
    dtype: torch.dtype = torch.float32

    def __call__(self, sums: Tensor, bias: Tensor, channel_axis: int) -> Tensor:
        """Sums to codes or values; ``bias`` is this one's, in the dtype to accumulate in (see :func:`requantize`)."""
        if self.dtype.is_floating_point:
            accumulator = with_bias(sums, bias, channel_axis)
            multiplier = along_channels(self.multiplier, sums, channel_axis)
            return arithmetic.rescale_accumulator(accumulator, multiplier).clamp_(self.lowest, self.highest)
        codes: Tensor = requantize(
            sums,
            bias,
            self.multiplier,
            self.zero_point,
            int(self.lowest),
            int(self.highest),
            self.dtype,
            channel_axis,
        )
        return codes
