r"""Batch normalization in training together with the clip and the fake quantization that follow it, compiled.

A convolution's output :math:`x` of shape (N, C, *size) becomes, with :math:`\mu, \sigma^2` of the batch,

.. math:: y = \mathrm{clip}(x\,a + b),\quad a = \gamma / \sigma,\quad b = \beta - \mu a
   \qquad\text{and}\qquad q = \mathrm{clamp}(\mathrm{rne}(y / s) + z,\ q_{min},\ q_{max}).

There is no other implementation: where these do not run, the model's own modules do the same one after the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..scheme import QuantizationScheme
from .native import operators, use_native


class Normalized(NamedTuple):
    """What :func:`normalize` makes of a tensor.

    Attributes:
        values: float32, on the grid.
        codes: of the scheme's dtype; None where not asked for, and where a value is NaN, which has no code.
        mask: uint8, a bit to an element in memory order: whether the gradient passes, neither clipped nor saturated.
        extremes: float32 (2, 1), ``[-minimum, maximum]`` before rounding; minus infinity where not finite.
    """

    values: Tensor
    codes: Tensor | None
    mask: Tensor
    extremes: Tensor


def can_normalize(values: Tensor) -> bool:
    """Whether the functions of this file take a tensor: float32, with its channels innermost in memory."""
    if not use_native(values) or values.dtype is not torch.float32 or values.dim() < 2 or values.numel() == 0:
        return False
    return values.movedim(1, -1).is_contiguous()


def batch_statistics(
    values: Tensor, running_mean: Tensor | None, running_variance: Tensor | None, momentum: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    r"""Mean :math:`\mu` and :math:`1 / \sigma = 1 / \sqrt{var + \epsilon}` of each channel, summed in float64.

    Running statistics, float32 (C,), are moved by ``momentum`` towards the mean and the unbiased variance, in place.
    """
    mean, inverse_deviation = operators["batch_statistics"](values, running_mean, running_variance, momentum, epsilon)
    # Which is how others see that they have changed.
    torch.autograd.graph.increment_version([each for each in (running_mean, running_variance) if each is not None])
    return mean, inverse_deviation


def normalize(
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    clip: tuple[float, float],
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantizationScheme,
    *,
    codes: bool = True,
) -> Normalized:
    r"""Normalizes, clips and quantizes.

    Args:
        values: as :func:`can_normalize` takes them.
        mean, inverse_deviation: of :func:`batch_statistics`.
        weight, bias: :math:`\gamma` and :math:`\beta`, float32 (C,), or None for 1 and 0.
        clip: the range of an activation that only clips; infinite ends clip nothing.
        scale, zero_point: of shape (1,).
        scheme: the grid.
        codes: whether to return them.
    """
    return Normalized(
        *operators["normalize"](
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


def normalize_backward(
    gradient: Tensor,
    mask: Tensor,
    values: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    gradient_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``values``, of :math:`\\gamma` and of :math:`\\beta`, summed in float64.

    Only what the mask lets pass counts, its magnitude clipped first.
    """
    to_values, to_weight, to_bias = operators["normalize_backward"](
        with_channels_innermost(gradient),
        mask,
        values,
        mean,
        inverse_deviation,
        weight,
        math.inf if gradient_clip is None else gradient_clip,
    )
    return to_values, to_weight, to_bias


def with_channels_innermost(values: Tensor) -> Tensor:
    """The tensor with axis 1 innermost in memory: itself, or a copy."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)
