"""Averages of models, some of which had seen no data: what these were constructed with is taken out again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import SMALLEST_SCALE
from ..scheme import QuantizationScheme

# Of a node without data. Next to nothing, so that an average of parameters alone, which does not tell how many of its
# models had data, lacks their share of a scale and no more.
INITIAL_SCALE = SMALLEST_SCALE

_ALL_HAD_DATA = 1 - 1e-4  # what is nearer to 1 is rounding


def some_had_none(share: float) -> bool:
    """Whether a share of models that had data, averaged as ``initialized``, is one of some models and not of all.

    A share below one half stands for no data.
    """
    return 0.5 <= share < _ALL_HAD_DATA


@torch.no_grad()
def take_initial_values_out(scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme, share: float) -> None:
    """Makes averages those of the models that had data, in place.

    A linear average that has ``initialized`` among its tensors has the rest of its weights on the values that scale and
    zero point were constructed with.

    Args:
        scale, zero_point: averages, shape (1,) or (C,).
        scheme: their grid.
        share: of the models that had data.
    """
    scale.sub_((1 - share) * INITIAL_SCALE).div_(share).clamp_(SMALLEST_SCALE)
    if not scheme.symmetric:
        initial = (1 - share) * scheme.symmetric_zero_point
        zero_point.sub_(initial).div_(share).clamp_(scheme.quant_min, scheme.quant_max)
