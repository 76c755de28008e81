"""What usually helps a layer that quantization spoils, by rules over what was measured of it."""

from __future__ import annotations

from typing import NamedTuple

from ..scheme import QuantizationScheme
from .local_errors import ErrorSplit

_OUTLIERS = 20.0  # a largest value of so many root mean squares leaves most codes unused
_WIDE = 6.0  # beyond what a uniform or a normal distribution shows in a batch
_UNEVEN = 8.0  # a channel of so many times the median's range leaves the others 3 bits less
_MOSTLY = 0.5


class Evidence(NamedTuple):
    """What was measured of a module.

    Attributes:
        split: its own error, by cause.
        weight: the grid of its weight; None where it has none.
        activation: the grid that the error arises on: its output's, or its input's; None without one.
        channel_ratio: the largest range of a channel of its output, as a multiple of the median.
        peak: the largest magnitude of its output, as a multiple of its root mean square.
        mean_share: the share of its error that a constant for each channel makes up.
    """

    split: ErrorSplit
    weight: QuantizationScheme | None
    activation: QuantizationScheme | None
    channel_ratio: float
    peak: float
    mean_share: float


def advice_for(evidence: Evidence) -> str:
    """A sentence: what makes up most of the error, and what usually helps against that.

    The first of these rules that applies:

    - of an error of the weight: a scale per channel where there is one for all; more bits, or better rounding, below 8;
      bias correction, where most of the error is a constant; else the layer is left float.
    - of values that the range clips: a wider range.
    - of rounding an activation: more bits below 8; equalization, where ranges of channels are uneven; a percentile's
      range, where single values are far out; one of least squared error, where its tails are long; else the layers
      that read it are left float.
    """
    cause = evidence.split.cause
    if cause == "weight":
        return f"{_of_weight(evidence)}{_bias(evidence)}"
    if cause == "clipped":
        return (
            f"its range clips {evidence.split.clipped_share:.2%} of the values, and that is most of its error: a wider "
            "range (MinMaxObserver, a higher percentile) or more and more typical batches to calibrate with"
        )
    if cause == "rounded":
        return f"{_of_rounding(evidence)}{_bias(evidence)}"
    return "it adds no error of its own"


def _of_weight(evidence: Evidence) -> str:
    start = "rounding its weight is most of its error: "
    assert evidence.weight is not None
    if evidence.weight.channel_axis is None:
        return f"{start}a scale per channel (per_channel_weights=True)"
    if evidence.weight.bits < 8:
        return f"{start}more bits for it (weight_bits={min(8, 2 * evidence.weight.bits)}), or AdaRound"
    return f"{start}equalization with the layer before it, or leave it float (skip)"


def _of_rounding(evidence: Evidence) -> str:
    start = "rounding an activation is most of its error: "
    scheme = evidence.activation
    if scheme is not None and scheme.bits < 8:
        return f"{start}more bits for it (activation_bits={min(8, 2 * scheme.bits)})"
    if evidence.channel_ratio >= _UNEVEN:
        return (
            f"{start}one channel spans {evidence.channel_ratio:.0f} times the range of a usual one, so equalization "
            "(in a transformer, smoothing)"
        )
    if evidence.peak >= _OUTLIERS:
        return (
            f"{start}its largest value is {evidence.peak:.0f} times its root mean square, so a range that lets the "
            "rarest saturate (PercentileObserver, HistogramObserver)"
        )
    if evidence.peak >= _WIDE:
        return (
            f"{start}a range of least squared error (HistogramObserver), or leave the layers that read it float (skip)"
        )
    return f"{start}leave the layers that read it float (skip)"


def _bias(evidence: Evidence) -> str:
    if evidence.mean_share < _MOSTLY:
        return ""
    return "; most of it is a constant for each channel, which bias correction takes out"
