"""What an observer of moving averages does with a batch, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import QuantizationScheme
from .native import operators, use_native


def update_moving_average(
    extremes: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    scheme: QuantizationScheme,
    due: bool,
) -> bool:
    """Folds extremes into running averages and, where due, makes scale and zero point of them, all in place.

    It is what ``MovingAverageObserver.update`` and ``FakeQuantizeLayer.update_parameters`` do, bit for bit, and has no
    other reference: where the compiled kernels do not take the state it changes nothing.

    Args:
        extremes: ``[-minimum, maximum]`` of the batch, float32 (2, C).
        minimum, maximum: the running averages, float32 (C,).
        batches: int64 (1,), the number of batches that held a finite value.
        scale, zero_point: float32 (C,).
        momentum: the weight of the batch.
        scheme: the grid.
        due: whether to change scale and zero point.

    Returns:
        Whether it was done.
    """
    state = (minimum, maximum, batches, scale, zero_point)
    if not (
        extremes.dtype is minimum.dtype is maximum.dtype is scale.dtype is zero_point.dtype is torch.float32
        and use_native(extremes)
        and all(type(tensor) is Tensor and tensor.is_cpu and not tensor.is_inference() for tensor in state)
    ):
        return False
    operators["update_moving_average"](
        extremes,
        *state,
        momentum,
        scheme.quant_min,
        scheme.quant_max,
        scheme.symmetric,
        scheme.symmetric_zero_point,
        due,
    )
    torch.autograd.graph.increment_version(state)  # which is how others see that it changed
    return True
