"""The codes of a fake-quantized tensor, kept beside it: what a layer that computes on integers reads.

A tensor of values on a grid and its codes say the same. Whatever only sees the values works as ever; a quantized layer
finds the codes and need not quantize again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import kernels
from ..scheme import QuantizationScheme

_ATTRIBUTE = "_quantized_codes"


class Codes(NamedTuple):
    """Codes, and the grid that they were made with: scale and zero point as they were then, of shape (1,) or (C,)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    version: int


def attach_codes(values: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    """Keeps codes beside their values, for as long as nothing changes these in place."""
    setattr(values, _ATTRIBUTE, Codes(codes, scale.detach().clone(), zero_point.detach().clone(), values._version))


def codes_of(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Codes | None:
    """The codes of values on that grid; None where some are NaN, which has no code.

    Values that were moved or selected since they were quantized are quantized anew, to the very same codes.
    """
    attached: Codes | None = getattr(values, _ATTRIBUTE, None)
    if attached is not None and attached.version == values._version:
        return attached
    scale, zero_point = scale.detach().clone(), zero_point.detach().clone()
    axis = scheme.resolve_channel_axis(values.dim())
    codes = kernels.fake_quantize(
        values, scale, zero_point, scheme.quant_min, scheme.quant_max, axis, values=False, codes=scheme.dtype
    ).codes
    return None if codes is None else Codes(codes, scale, zero_point, values._version)
