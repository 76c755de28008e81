"""Backward of what is quantized on a learned grid, in one step with what comes before: gradients of scale and zero
point are summed in the pass over the gradient that is made anyway."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import arithmetic
from ...scheme import QuantizationScheme
from .declaration import operator
from .fake_quantization import Clip, fake_quantize_sums, mask_gradient
from .layout import with_channels_last
from .normalization import affine_of, normalize_backward

_FLOAT = (torch.float32,)


@operator(
    "learned_normalize_backward(Tensor gradient, Tensor mask, Tensor values, Tensor mean, Tensor inverse_deviation,"
    " Tensor? weight, Tensor? bias, Tensor scale, Tensor zero_point, int lowest, int highest, float clip_low,"
    " float clip_high, float gradient_clip, bool is_frozen)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _FLOAT,
)
def _learned_normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    clip_low: float,
    clip_high: float,
    gradient_clip: float,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    clip = None if math.isinf(gradient_clip) else gradient_clip
    factor, offset = affine_of(mean, inverse_deviation, weight, bias, values.dim())
    quantized = (values.to(torch.float32) * factor + offset).clamp(clip_low, clip_high)
    sums = fake_quantize_sums(gradient, quantized, scale, zero_point, lowest, highest, clip)
    statistics = mean, inverse_deviation
    return *normalize_backward(gradient, mask, values, *statistics, weight, clip, is_frozen=is_frozen), *sums


@_learned_normalize_backward.fake
def _(
    gradient: Tensor, mask: Tensor, values: Tensor, mean: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = values.new_empty(1, dtype=torch.float32), values.new_empty(1, dtype=torch.float32)
    return torch.empty_like(values), torch.empty_like(mean), torch.empty_like(mean), *sums


def learned_normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    clip: Clip,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    gradient_clip: float | None,
    *,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients as :func:`.normalize_backward` returns them, and those of a scale and a zero point that learn.

    The latter are :func:`.fake_quantize_backward`'s, of :func:`.normalize`'s :math:`y`, each of shape (1,).
    """
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _learned_normalize_backward(
        with_channels_last(gradient),
        mask,
        values,
        mean,
        inverse_deviation,
        weight,
        bias,
        scale,
        zero_point,
        scheme.quant_min,
        scheme.quant_max,
        *clip,
        math.inf if gradient_clip is None else gradient_clip,
        is_frozen,
    )
    return gradients


@operator(
    "learned_clip_backward(Tensor gradient, Tensor mask, Tensor values, Tensor? values_grid, Tensor? addend,"
    " Tensor? addend_grid, Tensor scale, Tensor zero_point, int lowest, int highest, float clip_low, float clip_high,"
    " float gradient_clip) -> (Tensor, Tensor, Tensor)",
    _FLOAT,
)
def _learned_clip_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    values_grid: Tensor | None,
    addend: Tensor | None,
    addend_grid: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    lowest: int,
    highest: int,
    clip_low: float,
    clip_high: float,
    gradient_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    clip = None if math.isinf(gradient_clip) else gradient_clip
    total = _values_of(values, values_grid)
    if addend is not None:
        total = total + _values_of(addend, addend_grid)
    quantized = total.clamp(clip_low, clip_high)
    sums = fake_quantize_sums(gradient, quantized, scale, zero_point, lowest, highest, clip)
    return mask_gradient(gradient, mask, torch.empty_like(values).stride(), clip), *sums


def _values_of(tensor: Tensor, grid: Tensor | None) -> Tensor:
    return tensor if grid is None else arithmetic.dequantize_codes(tensor, grid[0], grid[1], None)


@_learned_clip_backward.fake
def _(gradient: Tensor, mask: Tensor, values: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    sums = gradient.new_empty(1, dtype=torch.float32), gradient.new_empty(1, dtype=torch.float32)
    return torch.empty_like(values, dtype=gradient.dtype), *sums


class Summand(NamedTuple):
    """A tensor: float32 or, where a ``grid`` is given, codes on it, float32 (2, 1) with scale and zero point."""

    tensor: Tensor
    grid: Tensor | None = None


def learned_clip_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Summand,
    addend: Summand | None,
    clip: Clip,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    gradient_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of ``values`` (and of ``addend``, the same), the scale and the zero point, of
    :func:`.fake_quantize` of their clipped sum on one learned grid.

    Args:
        gradient: of what it returned.
        mask: what it returned.
        values: of any layout.
        addend: of the shape of ``values``; None for none.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = _learned_clip_backward(
        gradient,
        mask,
        *values,
        *((None, None) if addend is None else addend),
        scale,
        zero_point,
        scheme.quant_min,
        scheme.quant_max,
        *clip,
        math.inf if gradient_clip is None else gradient_clip,
    )
    return gradients
