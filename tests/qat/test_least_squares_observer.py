"""The scale of least squared error: against a fine search in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, QuantizationScheme, calibrate, prepare
from mlframework.quantization.qat.least_squares_observer import LeastSquaresObserver, least_squares_scale


def squared_error(row: Tensor, scale: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Of float64 values, for each of several scales."""
    codes = (row / scale[:, None]).round().clamp(scheme.quant_min, scheme.quant_max)
    return (codes * scale[:, None] - row).square().sum(1)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "outlier"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_next_to_the_least_that_there_is(bits: int, distribution: str) -> None:
    scheme = QuantizationScheme(bits=bits, narrow_range=True, channel_axis=0)
    rows = torch.rand(5, 90) - 0.5 if distribution == "uniform" else torch.randn(5, 90)
    if distribution == "outlier":
        rows[:, 0] *= 6
    scales = least_squares_scale(rows, scheme)
    for row, scale in zip(rows.double(), scales.double(), strict=True):
        fine = torch.linspace(0.02, 1.1, 4000, dtype=torch.float64) * row.abs().max() / scheme.quant_max
        least = squared_error(row, fine, scheme).min()
        # With many bits the error jumps about with where the few largest values round to, by chance.
        assert squared_error(row, scale[None], scheme).item() <= (1.5 if bits == 8 else 1.02) * least.item()


def test_a_row_of_zeros_and_one_without_numbers() -> None:
    scheme = QuantizationScheme(bits=3, narrow_range=True, channel_axis=0)
    rows = torch.stack([torch.zeros(4), torch.tensor([1.0, torch.nan, 2.0, 3.0])])
    observer = LeastSquaresObserver(scheme, num_channels=2)
    observer.searches = True
    assert least_squares_scale(rows[:1], scheme).tolist() == [1.0]
    assert observer.measure(rows).extremes[:, 1].tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("per_channel", [False, True])
def test_learned_scales_of_weights_start_there_and_stay_there_through_calibration(per_channel: bool) -> None:
    inputs = torch.randn(8, 30)
    layer = nn.Linear(30, 4)
    config = QATConfig(weight_bits=2, learnable=True, per_channel_weights=per_channel)
    model = prepare(layer, config, (inputs,))
    rows = layer.weight.detach() if per_channel else layer.weight.detach().reshape(1, -1)
    expected = least_squares_scale(rows, model.weight_fake_quantize.scheme)
    torch.testing.assert_close(model.weight_fake_quantize.scale.detach(), expected)
    calibrate(model, [inputs, inputs])
    torch.testing.assert_close(model.weight_fake_quantize.scale.detach(), expected)


def test_a_weight_that_changed_is_measured_anew() -> None:
    scheme = QuantizationScheme(bits=3, narrow_range=True)
    observer, weight = LeastSquaresObserver(scheme), torch.randn(3, 4)
    observer.searches = True
    before = observer.measure(weight).extremes
    assert observer.measure(weight).extremes is before
    weight.mul_(2)
    torch.testing.assert_close(observer.measure(weight).extremes, 2 * before)
    copy.deepcopy(observer)


def test_it_is_saved_as_the_observer_of_a_scale_that_is_not_learned() -> None:
    inputs, layer = torch.randn(2, 5), nn.Linear(5, 3)
    learned, observed = (prepare(layer, QATConfig(learnable=each), (inputs,)) for each in (True, False))
    assert learned.state_dict().keys() == observed.state_dict().keys()
    observed.load_state_dict(learned.state_dict())
