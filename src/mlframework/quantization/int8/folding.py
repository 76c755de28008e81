r"""Weights, batch normalization and bias as integers.

Batch normalization needs no folding while training: with symmetric per-channel weights, folding
:math:`y = (w x - \mu)\,\gamma / \sigma + \beta` into the weight multiplies channel c by a number, which its scale
takes over whole: :math:`s_w' = s_w\,|\gamma / \sigma|`. The codes stay, but for a change of sign where
:math:`\gamma < 0`. Nothing is divided by :math:`\gamma`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import arithmetic
from ..scheme import QuantizationScheme

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class IntegerWeights(NamedTuple):
    """``codes`` as the layer's weight lies, int8; ``scale`` float32 and ``bias`` int32, both of shape (O,); ``scheme``
    is the grid of the codes."""

    codes: Tensor
    scale: Tensor
    bias: Tensor
    scheme: QuantizationScheme = QuantizationScheme()


@torch.no_grad()
def fold(
    codes: Tensor,
    scale: Tensor,
    scheme: QuantizationScheme,
    bias: Tensor | None,
    input_scale: Tensor,
    batch_norm: BatchNorm | None,
    output_axis: int = 0,
) -> IntegerWeights:
    """Folds batch normalization (in its evaluation form) into quantized weights and quantizes the bias.

    Args:
        codes: weight codes, int8, zero point 0.
        scale: (1,) or (O,), float32.
        scheme: the weights' grid; a sign change saturates on a grid that is not closed under negation.
        bias: (O,) or None.
        input_scale: (1,).
        batch_norm: with running statistics, or None.
        output_axis: the axis of ``codes`` that the output's channels lie along.
    """
    channels = codes.shape[output_axis]
    scale = scale.double().expand(channels)
    offset = torch.zeros_like(scale) if bias is None else bias.double()
    if batch_norm is not None:
        assert batch_norm.running_mean is not None and batch_norm.running_var is not None
        factor = torch.rsqrt(batch_norm.running_var.double() + batch_norm.eps)
        if batch_norm.weight is not None:
            factor = factor * batch_norm.weight.double()
        offset = (offset - batch_norm.running_mean.double()) * factor
        if batch_norm.bias is not None:
            offset = offset + batch_norm.bias.double()
        sign = arithmetic.along_axis(torch.sign(factor), codes.dim(), output_axis)
        codes = (codes * sign).clamp_(scheme.quant_min, scheme.quant_max)
        scale = torch.where(factor == 0, scale, scale * factor.abs())
    codes, raised = arithmetic.with_room_for_bias(codes, scale, offset, input_scale, output_axis)
    bias_codes = arithmetic.quantize_bias(offset.to(torch.float32), input_scale * raised)
    return IntegerWeights(codes, raised, bias_codes, scheme)
