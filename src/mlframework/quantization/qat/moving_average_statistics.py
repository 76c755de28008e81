"""Running extremes of what flows through a point of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.operators.moving_average import fold_extremes


class MovingAverageStatistics(nn.Module):
    r"""Exponential moving averages of batch minima and maxima.

    The first batch is copied; then :math:`r \leftarrow r + m\,(batch - r)` with momentum :math:`m`, as batch
    normalization counts it. An end that is not finite in a batch (NaN, infinity, an empty batch) leaves the running
    value as it was: one broken batch does not spoil the statistics.

    Args:
        momentum: the weight of the newest batch, in (0, 1]. 1 keeps the newest batch alone.
        num_channels: how many channels have statistics of their own.

    Attributes:
        minimum, maximum: float32 buffers of shape (num_channels,), updated in place; infinite until data came.

    Raises:
        ValueError: ``momentum`` is outside (0, 1], or ``num_channels`` is not a positive int.

    Example:
        >>> statistics = MovingAverageStatistics(momentum=0.1)
        >>> statistics.update(torch.tensor([-1.0]), torch.tensor([2.0]))
        >>> statistics.update(torch.tensor([-2.0]), torch.tensor([2.0]))
        >>> statistics.minimum, statistics.maximum
        (tensor([-1.1000]), tensor([2.]))
    """

    minimum: Tensor
    maximum: Tensor

    def __init__(self, momentum: float = 0.01, num_channels: int = 1) -> None:
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 < momentum <= 1:
            raise ValueError(f"momentum must be a number in (0, 1], got {momentum!r}")
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"num_channels must be a positive int, got {num_channels!r}")
        self.momentum = float(momentum)
        self.register_buffer("minimum", torch.full((num_channels,), torch.inf))
        self.register_buffer("maximum", torch.full((num_channels,), -torch.inf))

    @torch.no_grad()
    def update(self, minimum: Tensor, maximum: Tensor) -> None:
        """Folds one batch in: its extremes, each of shape (num_channels,)."""
        for running, batch in ((self.minimum, minimum), (self.maximum, maximum)):
            if batch.shape != running.shape:
                raise ValueError(f"expected extremes of shape {tuple(running.shape)}, got {tuple(batch.shape)}")
            fold_extremes(running, batch, self.momentum)

    def state_faults(self, state: Mapping[str, Any], prefix: str) -> Iterable[str]:
        """No value is refused: from one that is not finite, as an average of models may have, the next batch starts
        anew; and where batches had one infinite end each, the averages of the others may have crossed."""
        return ()

    def reset(self) -> None:
        """Forgets everything."""
        self.minimum.fill_(torch.inf)
        self.maximum.fill_(-torch.inf)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, num_channels={self.minimum.numel()}"
