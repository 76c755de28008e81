"""What an observer of moving averages does with a batch, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import arithmetic
from ...scheme import QuantizationScheme
from .declaration import FLOATS, operator
from .fake_quantization import extremes


@operator(
    "update_moving_average(Tensor batch, bool is_measured, int axis, Tensor(a!) minimum, Tensor(b!) maximum,"
    " Tensor(c!) batches, Tensor(d!) scale, Tensor(e!) zero_point, float momentum, int lowest, int highest,"
    " bool symmetric, int symmetric_zero, bool due) -> ()",
    FLOATS,
)
def update(
    batch: Tensor,
    is_measured: bool,
    axis: int,
    minimum: Tensor,
    maximum: Tensor,
    batches: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    lowest: int,
    highest: int,
    symmetric: bool,
    symmetric_zero: int,
    due: bool,
) -> None:
    with torch.no_grad():
        both = batch if is_measured else extremes(batch, None if axis < 0 else axis)
        fold_extremes(minimum, -both[0], momentum)
        fold_extremes(maximum, both[1], momentum)
        batches.add_(torch.isfinite(both).any())
        if due:
            zero = symmetric_zero if symmetric else None
            parameters = arithmetic.range_to_parameters(
                *arithmetic.finite_range(minimum, maximum), lowest, highest, zero
            )
            scale.copy_(parameters[0])
            zero_point.copy_(parameters[1])


@update.fake
def _(*arguments: object) -> None:
    return None


def fold_extremes(running: Tensor, batch: Tensor, momentum: float) -> None:
    r"""One step of a moving average, in place: :math:`r \leftarrow r + m\,(batch - r)`; the first batch is copied.

    What is not finite in a batch leaves the running value as it was.
    """
    # lerp, because r + 1 * (batch - r) is not the batch where r is much larger.
    averaged = torch.lerp(running, batch.to(running.dtype), momentum)
    averaged = torch.where(torch.isfinite(running), averaged, batch)
    running.copy_(torch.where(torch.isfinite(batch), averaged, running))


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
) -> None:
    """Folds a batch into running averages of its extremes and, where due, makes scale and zero point of them.

    It is what ``MovingAverageObserver.update`` and ``FakeQuantizeLayer.update_parameters`` do, in place.

    Args:
        batch: the extremes ``[-minimum, maximum]``, float32 (2, C), if ``is_measured``; else the tensor itself.
        axis: of the channels of an unmeasured batch, non-negative, or None.
        minimum, maximum: the running averages, float32 (C,).
        batches: int64 (1,), the number of batches that held a finite value.
        scale, zero_point: float32 (C,).
        momentum: the weight of the batch.
        scheme: the grid.
        due: whether to change scale and zero point.
    """
    update(
        batch,
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
