"""Observers that know the distribution: percentiles, and the range of least squared error.

The histogram's bins are float32 bit patterns: sign, exponent and the first six bits of the mantissa. Their edges
never depend on the data, so nothing is rescaled when the range grows, histograms of batches and ranks simply add,
and the bin of a value is a shift of its bits. A bin is at most 1/64 of its value wide; within a bin, values are taken
to be spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arithmetic, kernels
from ..scheme import QuantizationScheme
from ..state_check import faults_where
from .activation_observer import ActivationObserver, BatchStatistics, extremes_faults

_SHIFT = 17  # a float32 without its last 17 mantissa bits: 14 bits of magnitude
_MAGNITUDES = 2**14
_FINITE = 255 << 6  # magnitudes below this are finite numbers; above are infinity and NaN
_BINS = 2 * _FINITE

# Counting is the slow part of a histogram. A sample of this many values, spread evenly over the tensor, places a
# percentile of a batch to about 1 in 100,000 and costs about as much as the minimum and maximum, which stay exact.
_SAMPLE = 2**17

# Ends of a range that HistogramObserver tries: of the extremes, down to 1/4096; then about the best of those.
_SHRUNK = torch.exp2(-torch.arange(37, dtype=torch.float64) / 3)
_NEARBY = torch.exp2(torch.linspace(-1 / 3, 1 / 3, 17, dtype=torch.float64))
# The bins that those need, from the largest magnitude counted: half a step of the finest grid is 2**-22 of the larger
# extreme, and extremes that are averages may be less than what is counted.
_NEEDED = 40 << 6


class _DistributionObserver(ActivationObserver):
    """Keeps the histogram and the exact extremes of everything seen. Per tensor only."""

    extremes: Tensor
    counts: Tensor

    def __init__(self, *, update_every: int = 1) -> None:
        super().__init__(update_every=update_every)
        self.register_buffer("extremes", torch.full((2, 1), -torch.inf))
        self.register_buffer("counts", torch.zeros(_BINS))

    def _measure(self, input: Tensor) -> BatchStatistics:
        return super()._measure(input)._replace(counts=_histogram(input))

    def nothing(self) -> BatchStatistics:
        return super().nothing()._replace(counts=torch.zeros_like(self.counts))

    def _update(self, statistics: BatchStatistics) -> None:
        assert statistics.counts is not None
        self.extremes.copy_(torch.fmax(self.extremes, statistics.extremes))  # NaN is an average of nothing
        self.counts.add_(statistics.counts)

    def state_faults(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield from super().state_faults(state, prefix)
        yield from extremes_faults(state, f"{prefix}extremes", self.extremes)
        yield from faults_where(
            state,
            f"{prefix}counts",
            self.counts,
            lambda counts: torch.isfinite(counts) & (counts >= 0),
            "be finite and not negative",
        )

    def reset(self) -> None:
        super().reset()
        self.extremes.fill_(-torch.inf)
        self.counts.zero_()


class PercentileObserver(_DistributionObserver):
    """The range between two percentiles of everything seen: the rarest values saturate.

    Args:
        percentile: the upper percentile, in (50, 100]; the lower one is ``100 - percentile``. 100 keeps the extremes.
        update_every: see :class:`ActivationObserver`.

    Raises:
        ValueError: ``percentile`` is outside (50, 100].

    Example:
        >>> observer = PercentileObserver(90.0)
        >>> _ = observer(torch.linspace(0, 100, 1001))
        >>> [round(end.item()) for end in observer.range(QuantizationScheme())]
        [10, 90]
    """

    def __init__(self, percentile: float = 99.99, *, update_every: int = 1) -> None:
        super().__init__(update_every=update_every)
        if isinstance(percentile, bool) or not isinstance(percentile, (int, float)) or not 50 < percentile <= 100:
            raise ValueError(f"percentile must be a number in (50, 100], got {percentile!r}")
        self.percentile = float(percentile)

    def range(self, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
        minimum, maximum = arithmetic.finite_range(-self.extremes[0], self.extremes[1])
        if self.percentile == 100:
            return minimum, maximum
        edges = _bin_edges(self.counts.device)
        cumulative = _prefix_sums(self.counts.double())
        ends = []
        for fraction in (1 - self.percentile / 100, self.percentile / 100):
            target = (cumulative[-1:] * fraction).clamp(min=0)
            bin = (torch.searchsorted(cumulative, target) - 1).clamp(0, _BINS - 1)
            count = self.counts[bin].double()
            inside = torch.where(count > 0, (target - cumulative[bin]) / count.clamp(min=1), 0.0)
            ends.append((edges[bin] + inside * (edges[bin + 1] - edges[bin])).float())
        return ends[0].clamp(minimum, maximum), ends[1].clamp(minimum, maximum)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"percentile={self.percentile}", super().extra_repr())))


class HistogramObserver(_DistributionObserver):
    r"""The range whose grid has the least squared error over everything seen.

    Minimizes :math:`\sum_i (x_i - \hat x_i)^2`, clipping and rounding together, over ranges inside the extremes: both
    ends shrunk together, then (on affine grids) each on its own, then refined. The error of a candidate is exact for
    the histogram: sums over its bins, formed once, give what each level of the grid takes from it in constant time.

    Example:
        >>> observer = HistogramObserver()
        >>> _ = observer(torch.cat([torch.linspace(-1, 1, 10001), torch.tensor([4.0])]))
        >>> observer.range(QuantizationScheme(bits=2))[1] < 2
        tensor([True])
    """

    def range(self, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
        minimum, maximum = arithmetic.finite_range(-self.extremes[0], self.extremes[1])
        minimum, maximum = minimum.clamp(max=0).double(), maximum.clamp(min=0).double()
        excesses = _Excesses(self.counts)
        shrunk, nearby = (shares.to(minimum.device) for shares in (_SHRUNK, _NEARBY))

        def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
            lows, highs = lows.clamp(min=minimum), highs.clamp(max=maximum)
            lows, highs = lows + 0 * highs, highs + 0 * lows  # to one shape
            index = torch.argmax(excesses.error_avoided(lows, highs, scheme)).reshape(1)
            return lows[index], highs[index]

        low, high = best(minimum * shrunk, maximum * shrunk)
        if not scheme.symmetric:
            for _ in range(2):
                low, high = best(low, maximum * shrunk)
                low, high = best(minimum * shrunk, high)
            low, high = best(low, high * nearby)
            low, high = best(low * nearby, high)
        low, high = best(low * nearby, high * nearby)
        return low.float(), high.float()


def _histogram(input: Tensor) -> Tensor:
    """Counts per bin in ascending order of value, float32, of an even sample of the tensor's finite values."""
    values = kernels.memory_order(input)
    step = max(1, math.ceil(values.numel() / _SAMPLE))
    # A step that shares a factor with a dimension would visit the same few channels over and over.
    while math.gcd(step, values.numel()) > 1:
        step += 1
    bits = values[::step].to(torch.float32).contiguous().view(torch.int32)
    # (torch.bincount would wait for a GPU, to know how many bins there are.)
    signed = bits.new_zeros(2 * _MAGNITUDES).index_add_(0, (bits >> _SHIFT) + _MAGNITUDES, torch.ones_like(bits))
    negative, positive = signed[:_FINITE], signed[_MAGNITUDES : _MAGNITUDES + _FINITE]
    return torch.cat([negative.flip(0), positive]).to(torch.float32)


def _bin_edges(device: torch.device) -> Tensor:
    """The _BINS + 1 ascending edges, float64."""
    magnitudes = (torch.arange(_FINITE, dtype=torch.int32, device=device) << _SHIFT).view(torch.float32).double()
    top = magnitudes.new_full((1,), 2.0**128)
    positive = torch.cat([magnitudes, top])
    return torch.cat([-positive.flip(0), positive[1:]])


def _magnitude(values: Tensor) -> Tensor:
    """The bin, counted from zero outwards, that a float32 lies in; of infinity the last."""
    return (values.abs().view(torch.int32) >> _SHIFT).clamp_(max=_FINITE - 1)


def _prefix_sums(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


class _Excesses:
    r"""By how much, in sum, values lie beyond a limit, seen from zero: :math:`\sum_{|x| > t} (|x| - t)` on each side.

    Within a bin that is a parabola in the distance of :math:`t` from the bin's end that is nearer to zero. Bins lie
    here from the outside inwards, those of negative values first; the first on each side lies beyond all values.
    """

    def __init__(self, counts: Tensor) -> None:
        sides = torch.stack([counts[:_FINITE], counts[_FINITE:].flip(0)])
        places = torch.arange(_FINITE - 1, -1, -1, device=counts.device)
        self.outermost = torch.where(sides.sum(0) > 0, places, 0).amax().reshape(1)
        bins = (self.outermost - torch.arange(_NEEDED, device=counts.device)).clamp_(min=0)
        edges = _bin_edges(counts.device)[_FINITE:]
        inner = edges[bins]
        width = edges[bins + 1] - inner
        count = sides[:, _FINITE - 1 - bins].double()
        number = count.cumsum(1)
        beyond = (width * (number - count / 2)).cumsum(1)
        self.coefficients = [
            F.pad(each, (1, 0)).flatten() for each in (inner.expand(2, -1), beyond, number, count / (2 * width))
        ]

    def error_avoided(self, lows: Tensor, highs: Tensor, scheme: QuantizationScheme) -> Tensor:
        r"""How much less the squared error of quantizing the histogram with each candidate range is than it would be
        with all values at zero, shape of ``lows``.

        From a level to the next one outwards, a step :math:`s` away, the squared error of a value changes by
        :math:`-2 s (|x| - t)`, where :math:`t` is the limit between them; those beyond it take the step.
        """
        scale, zero_point = arithmetic.range_to_scale_and_zero_point(lows.float(), highs.float(), scheme)
        step = scale.double()[:, None]
        codes = torch.arange(scheme.quant_min, scheme.quant_max, device=lows.device) + 0.5
        limits = ((codes - zero_point[:, None]) * step).flatten()
        place = (self.outermost + 1 - _magnitude(limits.float())).clamp_(0, _NEEDED)
        place = torch.where(limits > 0, place + (_NEEDED + 1), place)
        inner, beyond, number, curvature = (each.index_select(0, place) for each in self.coefficients)
        distance = limits.abs_().sub_(inner)
        excess = beyond.addcmul_(distance, curvature.mul_(distance).sub_(number))
        return (2 * step * excess.view(len(lows), -1)).sum(dim=1)
