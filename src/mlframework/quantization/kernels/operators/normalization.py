r"""Batch normalization in training together with the clip and the fake quantization that follow it.

A convolution's output :math:`x` of shape (N, C, *size) becomes, with :math:`\mu, \sigma^2` of the batch or frozen ones,

.. math:: y = \mathrm{clip}(x\,a + b),\quad a = \gamma / \sigma,\quad b = \beta - \mu a
   \qquad\text{and}\qquad q = \mathrm{clamp}(\mathrm{rne}(y / s) + z,\ q_{min},\ q_{max}).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...scheme import QuantizationScheme
from .declaration import operator
from .fake_quantization import Clip, fake_quantize
from .layout import with_channels_last
from .masks import unpack_mask

_FLOAT = (torch.float32,)


class Normalized(NamedTuple):
    """What :func:`normalize` makes of a tensor.

    Attributes:
        values: on the grid, in the dtype of what is normalized.
        codes: of the scheme's dtype; None where not asked for.
        mask: uint8, a bit to an element in memory order: whether the gradient passes, neither clipped nor saturated.
        extremes: float32 (2, 1), ``[-minimum, maximum]`` before rounding; minus infinity where not finite.
        grid: of the codes, as :class:`.FakeQuantized` has it.
    """

    values: Tensor
    codes: Tensor | None
    mask: Tensor
    extremes: Tensor
    grid: Tensor | None


def lies_in_rows(values: Tensor) -> bool:
    """Whether a tensor has its channels innermost in memory, as the operators of this file take it."""
    return values.dim() >= 2 and values.movedim(1, -1).is_contiguous()


@operator(
    "batch_statistics(Tensor values, Tensor(a!)? running_mean, Tensor(b!)? running_variance, float momentum,"
    " float epsilon) -> (Tensor, Tensor)",
    _FLOAT,
)
def batch_statistics(
    values: Tensor, running_mean: Tensor | None, running_variance: Tensor | None, momentum: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    r"""Mean :math:`\mu` and :math:`1 / \sigma = 1 / \sqrt{var + \epsilon}` of each channel, summed in float64.

    Running statistics, float32 (C,), are moved by ``momentum`` towards the mean and the unbiased variance, in place.
    """
    rows = values.movedim(1, -1).reshape(-1, values.shape[1]).double()
    variance, mean = torch.var_mean(rows, dim=0, correction=0)
    if running_mean is not None and running_variance is not None:
        running_mean.lerp_(mean.float(), momentum)
        unbiased = variance * (rows.shape[0] / (rows.shape[0] - 1))
        running_variance.lerp_(unbiased.float(), momentum)
    return mean.float(), torch.rsqrt(variance + epsilon).float()


@batch_statistics.fake
def _(
    values: Tensor, running_mean: Tensor | None, running_variance: Tensor | None, momentum: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    mean = values.new_empty(values.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def frozen_statistics(mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """What :func:`batch_statistics` returns, of statistics that are known."""
    return mean, torch.rsqrt(variance.double() + epsilon).float()


def affine_of(
    mean: Tensor, inverse_deviation: Tensor, weight: Tensor | None, bias: Tensor | None, dimensions: int
) -> tuple[Tensor, Tensor]:
    """:math:`a` and :math:`b`, broadcasting against a tensor of so many dimensions."""
    factor = inverse_deviation if weight is None else inverse_deviation * weight
    offset = (0.0 if bias is None else bias) - mean * factor
    along = [1, -1, *[1] * (dimensions - 2)]
    return factor.reshape(along), offset.reshape(along)


_Results = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


@operator(
    "normalize(Tensor values, Tensor mean, Tensor inverse_deviation, Tensor? weight, Tensor? bias, Tensor scale,"
    " Tensor zero_point, int lowest, int highest, float clip_low, float clip_high, ScalarType? code_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _FLOAT,
)
def _normalize(
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
    code_dtype: torch.dtype | None,
) -> _Results:
    factor, offset = affine_of(mean, inverse_deviation, weight, bias, values.dim())
    normalized = values.to(torch.float32) * factor + offset
    result = fake_quantize(
        normalized,
        scale,
        zero_point,
        lowest,
        highest,
        None,
        clip=(clip_low, clip_high),
        codes=code_dtype,
        mask=True,
        extremes=True,
    )
    assert result.values is not None and result.mask is not None and result.extremes is not None
    return result.values.to(values.dtype), result.codes, result.mask, result.extremes, result.grid


@_normalize.fake
def _(
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
    code_dtype: torch.dtype | None,
) -> _Results:
    return (
        torch.empty_like(values),
        None if code_dtype is None else torch.empty_like(values, dtype=code_dtype),
        values.new_empty((values.numel() + 7) // 8, dtype=torch.uint8),
        values.new_empty((2, 1), dtype=torch.float32),
        None if code_dtype is None else values.new_empty((2, 1), dtype=torch.float32),
    )


def normalize(
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    clip: Clip,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    *,
    codes: bool = True,
) -> Normalized:
    r"""Normalizes, clips and quantizes.

    Args:
        values: as :func:`lies_in_rows` says; float32, on a GPU also bfloat16 and float16, which compute in float32.
        mean, inverse_deviation: of :func:`batch_statistics`.
        weight, bias: :math:`\gamma` and :math:`\beta`, float32 (C,), or None for 1 and 0.
        clip: the range of an activation that only clips; infinite ends clip nothing.
        scale, zero_point: of shape (1,).
        scheme: the grid.
        codes: whether to return them.
    """
    return Normalized._make(
        _normalize(
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
            scheme.dtype if codes else None,
        )
    )


@operator(
    "normalize_backward(Tensor gradient, Tensor mask, Tensor values, Tensor mean, Tensor inverse_deviation,"
    " Tensor? weight, float gradient_clip, bool is_frozen) -> (Tensor, Tensor, Tensor)",
    _FLOAT,
)
def _normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    gradient_clip: float,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inside = unpack_mask(mask, values.shape, values.stride())
    passed = torch.where(inside, gradient.clamp(-gradient_clip, gradient_clip), 0.0).movedim(1, -1).double()
    rows = passed.reshape(-1, values.shape[1])
    normalized = ((values.movedim(1, -1).double() - mean) * inverse_deviation.double()).reshape(rows.shape)
    to_bias, to_weight = rows.sum(dim=0), (rows * normalized).sum(dim=0)
    factor = inverse_deviation.double() if weight is None else inverse_deviation.double() * weight
    # Statistics that are not the batch's own do not change with its values.
    common = 0.0 if is_frozen else (to_bias + normalized * to_weight) / rows.shape[0]
    to_rows = (rows - common) * factor
    to_values = to_rows.to(values.dtype).reshape(passed.shape).movedim(-1, 1)
    return to_values, to_weight.to(torch.float32), to_bias.to(torch.float32)


@_normalize_backward.fake
def _(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    gradient_clip: float,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(mean), torch.empty_like(mean)


def normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    gradient_clip: float | None,
    *,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``values``, in its dtype, and of :math:`\\gamma` and of :math:`\\beta`, float32, summed in float64.

    Only what the mask lets pass counts, its magnitude clipped first. ``is_frozen``: the statistics are not those of
    ``values``.
    """
    to_values, to_weight, to_bias = _normalize_backward(
        with_channels_last(gradient),
        mask,
        values,
        mean,
        inverse_deviation,
        weight,
        math.inf if gradient_clip is None else gradient_clip,
        is_frozen,
    )
    return to_values, to_weight, to_bias
