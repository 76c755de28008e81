"""Observers: what they measure of a batch, how they keep it, and the range that they make of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..scheme import QuantizationScheme
from ..state_check import faults_where
from .host_value import HostValue
from .moving_average_statistics import MovingAverageStatistics


class BatchStatistics(NamedTuple):
    """What an observer measured of one batch, in a form that reduces over ranks.

    ``extremes`` of shape (2, C) holds ``[-minimum, maximum]`` and reduces by MAX (minus infinity where nothing finite
    was seen); ``counts`` is a histogram and reduces by SUM, or None.
    """

    extremes: Tensor
    counts: Tensor | None = None


class ActivationObserver(nn.Module):
    """Watches tensors and says what range they span.

    Calling an observer folds the tensor into its statistics and returns the tensor. State has its final shape from
    construction, is updated in place and lives in ``state_dict()``; nothing reads a value back to the host.
    A batch end that is not finite (NaN, infinity, an empty batch) leaves the statistics as they were.

    Args:
        channel_axis: axis along which channels have statistics of their own; None is per tensor.
        num_channels: how many channels that axis has.
        update_every: after how many batches quantization parameters are recomputed from the statistics. The first
            batch always counts.

    Attributes:
        enabled: switch observation off with ``observer.enabled = False``; on again with True.
        batches: int64 buffer of shape (1,), the number of batches seen that held a finite value.

    Raises:
        ValueError: an argument is out of range, or a tensor does not have the channels that were announced.
    """

    batches: Tensor

    def __init__(self, *, channel_axis: int | None = None, num_channels: int = 1, update_every: int = 1) -> None:
        super().__init__()
        for name, value in (("num_channels", num_channels), ("update_every", update_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if channel_axis is None and num_channels != 1:
            raise ValueError(f"num_channels must be 1 without a channel_axis, got {num_channels}")
        self.channel_axis = channel_axis
        self.num_channels = num_channels
        self.update_every = update_every
        self.enabled = True
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
        self._batches = HostValue(self.batches, 0)

    @property
    def measures_extremes(self) -> bool:
        """Whether the extremes of a batch are all that :meth:`measure` finds."""
        return type(self)._measure is ActivationObserver._measure

    def forward(self, input: Tensor) -> Tensor:
        """Folds ``input`` into the statistics and returns it."""
        if self.enabled:
            self.update(self.measure(input))
        return input

    def measure(self, input: Tensor) -> BatchStatistics:
        """The statistics of one tensor, without keeping them."""
        if not input.is_floating_point():
            raise TypeError(f"input must be a floating-point tensor, got {input.dtype}")
        return self._measure(input.detach() if input.requires_grad else input)

    @torch.no_grad()
    def update(self, statistics: BatchStatistics) -> None:
        """Keeps what :meth:`measure` returned."""
        self._update(statistics)
        before = self._count()
        self.batches.add_(torch.isfinite(statistics.extremes).any())
        self._count_one_more_than(before)

    def nothing(self) -> BatchStatistics:
        """What :meth:`measure` says of an empty tensor."""
        return BatchStatistics(torch.full((2, self.num_channels), -torch.inf, device=self.batches.device))

    def due(self) -> bool | Tensor:
        """Whether parameters are to be recomputed after the newest batch.

        Under ``torch.compile``, where a count that Python keeps would mean a new graph for every batch, a bool tensor
        of shape (1,).
        """
        if self.update_every == 1:
            return True
        if kernels.is_traced():
            return (self.batches - 1) % self.update_every == 0
        return (self._count() - 1) % self.update_every == 0

    def range(self, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
        """The range to cover with that grid: minimum and maximum, each of shape (C,); (0, 0) before any data."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets everything."""
        self.batches.zero_()

    def state_faults(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """What is wrong with a state that is about to be loaded, which the observer could not go on from."""
        yield from faults_where(state, f"{prefix}batches", self.batches, lambda count: count >= 0, "not be negative")

    def start_from(self, minimum: Tensor, maximum: Tensor) -> None:
        """Forgets everything and takes a range, each end of shape (C,), for that of the first batch."""
        self.reset()
        self.update(BatchStatistics(torch.stack([-minimum, maximum])))

    def _count(self) -> float:
        """The number of batches, where it matters. Nothing is read back, so one without finite values counts too."""
        return 0 if self.update_every == 1 else self._batches.read(self.batches)

    def _count_one_more_than(self, before: float) -> None:
        if self.update_every != 1 and not kernels.is_traced():
            self._batches.set(self.batches, before + 1)

    def _measure(self, input: Tensor) -> BatchStatistics:
        return BatchStatistics(batch_extremes(input, self.channel_axis, self.num_channels))

    def _update(self, statistics: BatchStatistics) -> None:
        raise NotImplementedError

    def extra_repr(self) -> str:
        parts = [] if self.channel_axis is None else [f"channel_axis={self.channel_axis}, channels={self.num_channels}"]
        if self.update_every != 1:
            parts.append(f"update_every={self.update_every}")
        return ", ".join(parts)


class MinMaxObserver(ActivationObserver):
    """The extremes of everything seen so far: the range only ever widens.

    Example:
        >>> observer = MinMaxObserver()
        >>> _ = observer(torch.tensor([-1.0, 2.0])), observer(torch.tensor([0.0, 3.0]))
        >>> observer.range(QuantizationScheme())
        (tensor([-1.]), tensor([3.]))
    """

    extremes: Tensor

    def __init__(self, *, channel_axis: int | None = None, num_channels: int = 1, update_every: int = 1) -> None:
        super().__init__(channel_axis=channel_axis, num_channels=num_channels, update_every=update_every)
        self.register_buffer("extremes", torch.full((2, num_channels), -torch.inf))

    def _update(self, statistics: BatchStatistics) -> None:
        self.extremes.copy_(torch.fmax(self.extremes, statistics.extremes))  # NaN is an average of nothing

    def state_faults(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super().state_faults(state, prefix)
        yield from extremes_faults(state, f"{prefix}extremes", self.extremes)

    def range(self, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
        return arithmetic.finite_range(-self.extremes[0], self.extremes[1])

    def reset(self) -> None:
        super().reset()
        self.extremes.fill_(-torch.inf)


class MovingAverageObserver(ActivationObserver):
    """Moving averages of the batch extremes (:class:`MovingAverageStatistics`): outliers fade, drift is followed.

    Args:
        momentum: weight of the newest batch; 1 follows the newest batch alone.

    Example:
        >>> observer = MovingAverageObserver(momentum=0.5)
        >>> _ = observer(torch.tensor([-1.0, 2.0])), observer(torch.tensor([-1.0, 4.0]))
        >>> observer.range(QuantizationScheme())
        (tensor([-1.]), tensor([3.]))
    """

    def __init__(
        self,
        momentum: float = 0.01,
        *,
        channel_axis: int | None = None,
        num_channels: int = 1,
        update_every: int = 1,
    ) -> None:
        super().__init__(channel_axis=channel_axis, num_channels=num_channels, update_every=update_every)
        self.statistics = MovingAverageStatistics(momentum, num_channels)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running minimum, running maximum and the number of batches, for a kernel to update."""
        averages: dict[str, Any] = self.statistics._buffers  # in every step, where a module's own look-up is slow
        return averages["minimum"], averages["maximum"], self._buffers["batches"]  # type: ignore[return-value]

    def update_with_parameters(
        self,
        batch: Tensor,
        axis: int | None,
        scale: Tensor,
        zero_point: Tensor,
        scheme: QuantizationScheme,
        *,
        is_measured: bool,
        due: bool,
    ) -> bool:
        """Measures a batch, keeps it and makes of it the parameters that follow, in one call.

        Args:
            batch: the tensor; or the extremes that :meth:`measure` found, if ``is_measured``.
            axis: of the channels, non-negative, or None.
            scale, zero_point: changed in place, if ``due`` or :meth:`due`.
            scheme: the grid.

        Returns:
            Whether it was done; otherwise nothing has changed.
        """
        if type(self) is not MovingAverageObserver or (kernels.is_traced() and self.update_every != 1):
            return False
        before = self._count()
        kernels.update_moving_average(
            batch,
            is_measured,
            axis,
            *self.state,
            scale,
            zero_point,
            self.statistics.momentum,
            scheme,
            due or before % self.update_every == 0,
        )
        self._count_one_more_than(before)
        return True

    def _update(self, statistics: BatchStatistics) -> None:
        self.statistics.update(-statistics.extremes[0], statistics.extremes[1])

    def range(self, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
        return arithmetic.finite_range(self.statistics.minimum, self.statistics.maximum)

    def reset(self) -> None:
        super().reset()
        self.statistics.reset()


def extremes_faults(state: Mapping[str, Any], key: str, own: Tensor) -> Iterator[str]:
    """Of what only ever grows: from infinity it would never come back. (NaN is an average of states without data.)"""
    return faults_where(state, key, own, lambda ends: ends != torch.inf, "not be infinite")


def batch_extremes(input: Tensor, channel_axis: int | None, num_channels: int) -> Tensor:
    """``[-minimum, maximum]`` of a tensor, shape (2, C), float32; minus infinity where an end is not finite."""
    if channel_axis is not None and (
        not -input.dim() <= channel_axis < input.dim() or input.shape[channel_axis] != num_channels
    ):
        raise ValueError(
            f"input must have {num_channels} channels along axis {channel_axis}, got shape {tuple(input.shape)}"
        )
    return kernels.extremes(input, None if channel_axis is None else channel_axis % input.dim())
