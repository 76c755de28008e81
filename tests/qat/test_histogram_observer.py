"""Percentiles against numpy, and the range of least squared error against a search over a grid of ranges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlframework.quantization import (
    HistogramObserver,
    PercentileObserver,
    QuantizationParameters,
    QuantizationScheme,
    fake_quantize,
)
from mlframework.quantization.qat import histogram_observer

SCHEME = QuantizationScheme()
# A bin is 1/64 of its value wide at most, and the true percentile and the one found lie in the same bin.
BIN = 1 / 64


def draw(name: str, size: int) -> Tensor:
    if name == "gaussian":
        return torch.randn(size)
    if name == "laplace":
        return torch.distributions.Laplace(0.3, 1.0).sample((size,))
    if name == "relu":
        return torch.randn(size).relu()
    if name == "uniform":
        return torch.rand(size) * 3 - 1
    values = torch.randn(size)  # outliers: a few values far away, on either side
    values[:3] = torch.tensor([40.0, -25.0, 60.0])
    return values


DISTRIBUTIONS = ["gaussian", "laplace", "relu", "uniform", "outliers"]


def assert_between_percentiles(end: float, values: np.ndarray[Any, Any], percentile: float, slack: float) -> None:
    """``slack``, in percent, is what ranks may be off; the width of a bin comes on top (of zero's: subnormal)."""
    low, high = np.percentile(values, [max(percentile - slack, 0), min(percentile + slack, 100)])
    tiny = torch.finfo(torch.float32).tiny
    assert low - BIN * abs(low) - tiny <= end <= high + BIN * abs(high) + tiny


@pytest.mark.parametrize("percentile", [50, 50.0, 100.1, -1, math.nan, "99", True, None])
def test_percentile_must_lie_in_its_range(percentile: Any) -> None:
    with pytest.raises(ValueError, match=r"percentile must be a number in \(50, 100\], got"):
        PercentileObserver(percentile)


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentiles_agree_with_numpy(name: str, percentile: float) -> None:
    values = draw(name, 50_000)
    observer = PercentileObserver(percentile)
    for batch in values.split(9_000):
        observer(batch)
    low, high = (end.item() for end in observer.range(SCHEME))
    # numpy interpolates between the ranks (n - 1) p, the observer within bins at n p: one rank apart.
    for end, place in ((low, 100 - percentile), (high, percentile)):
        assert_between_percentiles(end, values.double().numpy(), place, slack=100 / 50_000)


def test_percentiles_of_a_sample() -> None:
    values = torch.randn(2_000_000)
    observer = PercentileObserver(99.0)
    observer(values)
    low, high = (end.item() for end in observer.range(SCHEME))
    # At least 2**16 values are drawn: five standard deviations of a rank are 5 * sqrt(0.01 * 0.99 / 2**16).
    slack = 100 * 5 * math.sqrt(0.01 * 0.99 / 2**16)
    assert_between_percentiles(low, values.double().numpy(), 1, slack)
    assert_between_percentiles(high, values.double().numpy(), 99, slack)


def test_the_hundredth_percentile_is_the_exact_extreme_also_of_a_sample() -> None:
    values = torch.randn(1_000_001)
    values[12_345], values[54_321] = -77.7, 88.8
    observer = PercentileObserver(100.0)
    observer(values)
    assert [end.item() for end in observer.range(SCHEME)] == [values.min(), values.max()]


@pytest.mark.parametrize("value", [-3.0, 0.0, 5.5])
@pytest.mark.parametrize("make", [PercentileObserver, HistogramObserver])
def test_a_constant_tensor(make: Any, value: float) -> None:
    observer = make()
    observer(torch.full((100,), value))
    low, high = (end.item() for end in observer.range(QuantizationScheme(symmetric=False)))
    assert min(value, 0) <= low <= high <= max(value, 0) or (low, high) == (value, value)
    assert value == 0 or max(-low, high) == pytest.approx(abs(value), rel=BIN)  # somewhere in the value's bin


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [PercentileObserver, HistogramObserver])
def test_counts_of_other_dtypes_are_those_of_float32(make: Any, dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    observer, expected = make(), make()
    observer(values)
    expected(values.float())
    assert torch.equal(observer.counts, expected.counts)


def test_counts_agree_with_numpy() -> None:
    values = torch.cat([torch.randn(5000) * torch.exp2(torch.randn(5000) * 20), torch.tensor([0.0, 1.0, -1.0, 2.0])])
    observer = HistogramObserver()
    observer(values)
    # 64 bins an octave, below 2**-126 evenly spaced.
    bits = values.abs().numpy().view(np.int32) >> 17
    middle = len(observer.counts) // 2
    places = np.where(np.signbit(values.numpy()), middle - 1 - bits, middle + bits)
    assert np.array_equal(observer.counts.numpy(), np.bincount(places, minlength=2 * middle))


def test_values_that_are_not_finite_are_not_counted() -> None:
    observer = HistogramObserver()
    observer(torch.tensor([math.nan, math.inf, -math.inf, -math.nan, 1.0, torch.finfo().max]))
    assert observer.counts.sum() == 2


def test_the_order_in_memory_does_not_matter() -> None:
    image = torch.randn(8, 6, 10, 10)
    views = [image, image.to(memory_format=torch.channels_last), image.transpose(0, 3), image[::1, :, :, :]]
    counts = []
    for view in views:
        observer = HistogramObserver()
        observer(view)
        counts.append(observer.counts)
    assert all(torch.equal(count, counts[0]) for count in counts)


@pytest.mark.parametrize("channels", [2, 3, 8, 12, 30, 64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sample_takes_every_channel_alike(channels: int, channels_last: bool) -> None:
    """Only one channel holds values: a stride in common with the channels would see it always or never."""
    pixels = 600_000 // channels
    image = torch.zeros(1, channels, pixels, 1)
    image[:, channels // 2] = 1.0
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    observer = HistogramObserver()
    observer(image)
    total = observer.counts.sum().item()
    ones = observer.counts[len(observer.counts) // 2 + (127 << 6)].item()
    assert 2**16 < total <= 2**17
    # A stride without a common factor visits alternating channels in turn, and blocks of equal size equally often.
    assert abs(ones - total / channels) <= 1


def squared_errors(values: Tensor, lows: Tensor, highs: Tensor, scheme: QuantizationScheme) -> Tensor:
    """The mean squared error of each range, by its definition: no prefix sums, no histogram."""
    bits_low, bits_high = scheme.quant_min, scheme.quant_max
    if scheme.symmetric:
        zero = torch.full_like(lows, max(bits_low, 0))
        scale = highs / (bits_high - zero)
        if bits_low < 0:
            scale = torch.maximum(scale, lows / bits_low)
    else:
        scale = (highs - lows) / (bits_high - bits_low)
        zero = torch.round(bits_low - lows / scale).clamp(bits_low, bits_high)
    errors = []
    for step, offset in zip(scale, zero, strict=True):
        codes = (torch.round(values / step) + offset).clamp_(bits_low, bits_high)
        errors.append((values - (codes - offset) * step).square().mean(dtype=torch.float64))
    return torch.stack(errors)


def least_error(values: Tensor, scheme: QuantizationScheme) -> float:
    """The least error over a grid of ranges: 3 % apart with one end, 12 % with two, and then 2 % about the best."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    both = not scheme.symmetric and bool(low < 0)
    shares = torch.exp2(-torch.arange(0, 6, 1 / 6 if both else 1 / 24))
    near = torch.linspace(0.92, 1.08, 9)
    best = (low, high)
    for factors in (shares, near):
        one, other = torch.meshgrid(factors, factors, indexing="ij") if both else (factors, factors)
        lows, highs = best[0] * one.flatten(), best[1] * other.flatten()
        errors = squared_errors(values, lows, highs, scheme)
        best = (lows[errors.argmin()], highs[errors.argmin()])
    return float(errors.min())


SYMMETRIC = QuantizationScheme(narrow_range=True)
AFFINE = QuantizationScheme(signed=False, symmetric=False)
NON_NEGATIVE = QuantizationScheme(signed=False)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "grid"),
    [*((name, grid) for name in DISTRIBUTIONS for grid in (SYMMETRIC, AFFINE)), ("relu", NON_NEGATIVE)],
    ids=str,
)
def test_its_range_has_the_least_squared_error(name: str, grid: QuantizationScheme, bits: int) -> None:
    scheme = replace(grid, bits=bits)
    values = draw(name, 2048)
    observer = HistogramObserver()
    observer(values)
    parameters = QuantizationParameters.from_range(*observer.range(scheme), scheme)
    error = (fake_quantize(values, parameters) - values).square().mean(dtype=torch.float64).item()
    # Values are known to within a bin, and the two searches place their candidates differently.
    assert error <= 1.03 * least_error(values, scheme)


def test_its_range_from_a_sample() -> None:
    values = draw("laplace", 300_000)
    scheme = QuantizationScheme(bits=4)
    observer = HistogramObserver()
    observer(values)
    parameters = QuantizationParameters.from_range(*observer.range(scheme), scheme)
    error = (fake_quantize(values, parameters) - values).square().mean(dtype=torch.float64).item()
    # As above; the error is flat about its least, so that a sample of 2**16 values or more adds next to nothing.
    assert error <= 1.03 * least_error(values, scheme)


def test_batches_add_up() -> None:
    values = draw("laplace", 10_000)
    at_once, in_parts = HistogramObserver(), HistogramObserver()
    at_once(values)
    for part in values.split(777):
        in_parts(part)
    assert torch.equal(at_once.counts, in_parts.counts)
    assert at_once.range(SCHEME) == in_parts.range(SCHEME)


@pytest.mark.parametrize("make", [PercentileObserver, HistogramObserver])
def test_the_range_stays_within_the_extremes(make: Any) -> None:
    for scale in (1e-30, 1e-3, 1.0, 1e30):
        values = torch.randn(500) * scale
        observer = make()
        observer(values)
        low, high = observer.range(QuantizationScheme(symmetric=False))
        assert values.min() <= low <= high <= values.max()


def test_bits_tell_the_bin() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (10_000,), generator=generator).to(torch.int32).view(torch.float32)
    values = torch.cat([values[torch.isfinite(values)], torch.tensor([0.0, 1.0, -1.0 - 2**-7, 3e38, -3e38])])
    # A value on an edge belongs to the bin that it is the smaller end of, in magnitude.
    edges = histogram_observer._bin_edges(values.device)
    edges = edges[len(edges) // 2 :]
    bins = histogram_observer._magnitude(values)
    magnitudes = values.abs().double()
    assert ((edges[bins] <= magnitudes) & (magnitudes < edges[bins + 1])).all()
