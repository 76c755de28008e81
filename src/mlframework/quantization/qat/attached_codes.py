"""The codes of a fake-quantized tensor, kept beside it: what a layer that computes on integers reads.

A tensor of values on a grid and its codes say the same. Whatever only sees the values works as ever; a quantized layer
finds the codes and need not quantize again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import arithmetic, kernels
from ..scheme import QuantizationScheme

_ATTRIBUTE = "_quantized_codes"


class Codes(NamedTuple):
    """Codes, and the grid that they were made with, as it was then: scale and zero point (a code) of shape (1,) or
    (C,)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def attach_codes(values: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> None:
    """Keeps codes beside their values, for as long as nothing changes these in place."""
    if not values.is_inference():  # which nobody would notice being changed
        setattr(values, _ATTRIBUTE, (_on_grid_of_now(codes, scale, zero_point, scheme), values._version))


def codes_of(values: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Codes | None:
    """The codes of values on that grid; None where some are NaN, which has no code.

    Values that were moved or selected since they were quantized are quantized anew, to the very same codes.
    """
    attached: tuple[Codes, int] | None = getattr(values, _ATTRIBUTE, None)
    if attached is not None and attached[1] == values._version:
        return attached[0]
    axis = scheme.resolve_channel_axis(values.dim())
    codes = kernels.fake_quantize(
        values, scale, zero_point, scheme.quant_min, scheme.quant_max, axis, values=False, codes=scheme.dtype
    ).codes
    return None if codes is None else _on_grid_of_now(codes, scale, zero_point, scheme)


def _on_grid_of_now(codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> Codes:
    """With copies, since scale and zero point are updated in place."""
    learned = isinstance(zero_point, nn.Parameter)  # and else on the grid
    zero_point = arithmetic.grid_zero_point(zero_point.detach(), scheme) if learned else zero_point.detach().clone()
    return Codes(codes, scale.detach().clone(), zero_point)
