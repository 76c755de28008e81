"""What an observer of moving averages does with a batch, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import QuantizationScheme
from .native import operators, use_native


def update_moving_average(
    batch: Tensor,
    is_measured: bool,
    axis: int | None,
    minimum: Tensor,
    maximum: Tensor,
    batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    scheme: QuantizationScheme,
    due: bool,
) -> bool:
    """Folds a batch into running averages of its extremes and, where due, makes scale and zero point of them.

    It is what ``MovingAverageObserver.update`` and ``FakeQuantizeLayer.update_parameters`` do, bit for bit and in
    place; they are its reference. Where the compiled kernels do not take the tensors it changes nothing.

    Args:
        batch: the extremes ``[-minimum, maximum]``, float32 (2, C), if ``is_measured``; else the tensor itself, float32
            or bfloat16.
        axis: of the channels of an unmeasured batch, non-negative, or None.
        minimum, maximum: the running averages, float32 (C,).
        batches: int64 (1,), the number of batches that held a finite value.
        scale, zero_point: float32 (C,).
        momentum: the weight of the batch.
        scheme: the grid.
        due: whether to change scale and zero point.

    Returns:
        Whether it was done.
    """
    if not (
        (batch.dtype is torch.float32 or (batch.dtype is torch.bfloat16 and not is_measured))
        and minimum.dtype is maximum.dtype is scale.dtype is zero_point.dtype is torch.float32
        and use_native(batch)
        and type(scale) is type(minimum) is Tensor
        and scale.is_cpu
        and not scale.is_inference()  # which has no version to count
    ):
        return False
    operators["update_moving_average"](
        batch.detach() if batch.requires_grad else batch,
        is_measured,
        -1 if axis is None else axis,
        minimum,
        maximum,
        batches,
        scale,
        zero_point,
        momentum,
        scheme.quant_min,
        scheme.quant_max,
        scheme.symmetric,
        scheme.symmetric_zero_point,
        due,
    )
    # Which is how others see that they have changed.
    torch.autograd.graph.increment_version((minimum, maximum, batches, scale, zero_point))
    return True
