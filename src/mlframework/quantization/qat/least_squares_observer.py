"""The range whose grid has the least squared error on a weight: of few bits, and where learned scales start."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..scheme import QuantizationScheme
from .activation_observer import BatchStatistics, MovingAverageObserver

# Of the largest magnitude: the ends that are tried first. The best of them is then improved on.
_SMALLEST_SHARE, _SHARES, _IMPROVEMENTS = 0.2, 24, 4
_LARGEST_SHARE = 2.0  # which no search comes to: statistics with a larger one are of another observer


def rows_of_channels(weight: Tensor, channel_axis: int | None) -> Tensor:
    """A weight as float32 (C, N): a row for each channel, or one for all."""
    rows = weight.float()
    return rows.reshape(1, -1) if channel_axis is None else rows.movedim(channel_axis, 0).flatten(1)


def least_squares_scale(rows: Tensor, scheme: QuantizationScheme) -> Tensor:
    r"""The scale of a symmetric grid with the least squared error on each row.

    .. math:: \arg\min_s \sum_i \big(w_i - s\,\mathrm{clamp}(\mathrm{rne}(w_i / s),\ q_{min},\ q_{max})\big)^2

    From the best of several shares of the largest magnitude, in turns: the codes for a scale, and the scale that has
    the least error for these codes, :math:`s = \sum w q / \sum q^2`. Neither step can raise the error.

    Sums are of float64, so that another order of summing changes no float32 scale but by the rarest chance.

    Args:
        rows: float32 (C, N), finite.
        scheme: symmetric and signed.

    Returns:
        float32 (C,); 1 where a row is all zeros.
    """
    rows = rows.double()
    largest = rows.abs().amax(dim=1)
    best = torch.where(largest > 0, largest / scheme.quant_max, 1.0)
    error = _squared_error(rows, best, scheme)
    for share in torch.linspace(_SMALLEST_SHARE, 1.0, _SHARES).tolist():
        best, error = _better(rows, largest * share / scheme.quant_max, best, error, scheme)
    for _ in range(_IMPROVEMENTS):
        codes = _codes(rows, best, scheme)
        scale = (rows * codes).sum(dim=1) / codes.square().sum(dim=1)
        best, error = _better(rows, scale, best, error, scheme)
    return best.float()


def _codes(rows: Tensor, scale: Tensor, scheme: QuantizationScheme) -> Tensor:
    return (rows / scale[:, None]).round_().clamp_(scheme.quant_min, scheme.quant_max)


def _squared_error(rows: Tensor, scale: Tensor, scheme: QuantizationScheme) -> Tensor:
    return (_codes(rows, scale, scheme).mul_(scale[:, None]) - rows).square_().sum(dim=1)


def _better(
    rows: Tensor, scale: Tensor, best: Tensor, error: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    usable = torch.isfinite(scale) & (scale > 0)
    other = _squared_error(rows, torch.where(usable, scale, best), scheme)
    improves = usable & (other < error)
    return torch.where(improves, scale, best), torch.where(improves, other, error)


class LeastSquaresObserver(MovingAverageObserver):
    """Sees of a weight not its extremes but the range that :func:`least_squares_scale` gives its grid; of the newest
    weight alone.

    It searches where it is told to: when a model is prepared, calibrated or given a float checkpoint. Otherwise, in
    training as in evaluation, the range is the share of the largest magnitude that the last search found: searching
    again for an evaluation would round weights otherwise than they were trained. Of its statistics, ``minimum`` is
    minus the largest magnitude and ``maximum`` the end of the range.

    Args:
        scheme: the weight's grid, symmetric and signed.
        num_channels: along the scheme's channel axis.

    Attributes:
        searches: whether the next weight is searched for its range.
    """

    def __init__(self, scheme: QuantizationScheme, *, num_channels: int = 1) -> None:
        super().__init__(momentum=1.0, channel_axis=scheme.channel_axis, num_channels=num_channels)
        self.scheme = scheme
        self.searches = False
        self._known: tuple[int, BatchStatistics] | None = None

    def range(self, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
        _, end = super().range(scheme)
        return -end, end

    def _measure(self, input: Tensor) -> BatchStatistics:
        if not self.searches:
            largest = super()._measure(input).extremes.amax(0)
            largest_then, end_then = -self.statistics.minimum, self.statistics.maximum
            share = end_then / largest_then
            end = largest * torch.where((share > 0) & (share < _LARGEST_SHARE), share, 1.0)  # if it is one at all
            end = torch.where((largest == largest_then) & (end_then > 0), end_then, end)  # the quotient is rounded
            return BatchStatistics(torch.stack([largest, end]))
        fingerprint = None
        if not (kernels.is_traced() or input.is_meta):
            (fingerprint,) = kernels.fingerprints([input])
            if self._known is not None and self._known[0] == fingerprint:  # calibration shows it with every batch
                return self._known[1]
        rows = rows_of_channels(input, self.channel_axis)
        is_finite = torch.isfinite(rows).all(dim=1)
        end = least_squares_scale(rows, self.scheme) * self.scheme.quant_max
        both = torch.stack([rows.abs().amax(dim=1), end])
        statistics = BatchStatistics(torch.where(is_finite, both, -torch.inf))
        if fingerprint is not None:
            self._known = fingerprint, statistics
        return statistics
