"""Counts, ranges and clipped shares, against the tensors themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlframework.quantization import MinMaxObserver, QATConfig, QuantizationScheme, calibrate, prepare
from mlframework.quantization.analysis.calls import calls_of
from mlframework.quantization.analysis.report.histograms import TensorHistogram, histograms_of
from mlframework.quantization.analysis.switching import in_analysis
from mlframework.quantization.qat.least_squares_observer import least_squares_scale


def histograms(batches: list[torch.Tensor], calibration: torch.Tensor) -> tuple[dict[str, TensorHistogram], nn.Module]:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prepared = prepare(model, QATConfig(weight_bits=4, activation_observer=MinMaxObserver), (calibration,))
    calibrate(prepared, [calibration])
    with in_analysis(prepared):
        found = histograms_of(prepared, calls_of(prepared, batches))
    return {tensor.label: tensor for tensor in found}, model


def test_all_values_of_all_batches_are_counted() -> None:
    batches = [torch.randn(32, 8), 2 * torch.randn(16, 8)]
    found, model = histograms(batches, batches[0])
    assert list(found) == ["input_1: output", "0: output", "0: weight", "2: weight"]
    values = torch.cat(batches)
    tensor = found["input_1: output"]
    assert sum(tensor.counts) == values.numel()
    assert (tensor.lowest, tensor.highest) == (float(values.min()), float(values.max()))
    assert list(tensor.counts) == torch.histc(values, len(tensor.counts), tensor.lowest, tensor.highest).tolist()
    hidden = torch.relu(model[0](values)).detach()  # after the activation that runs with the layer
    assert found["0: output"].highest == pytest.approx(float(hidden.max()), rel=1e-6)
    assert found["0: output"].range_low == 0


def test_what_lies_outside_is_clipped() -> None:
    calibration = torch.randn(64, 8)
    wide = calibration * 3
    found, _ = histograms([wide], calibration)
    tensor = found["input_1: output"]
    step = (tensor.range_high - tensor.range_low) / 255
    outside = (wide < tensor.range_low - step / 2) | (wide > tensor.range_high + step / 2)
    assert tensor.clipped_share == pytest.approx(float(outside.double().mean()))
    assert tensor.clipped_share > 0.01


def test_a_weight_is_counted_in_steps_of_its_channel() -> None:
    inputs = torch.randn(32, 8)
    found, model = histograms([inputs], inputs)
    tensor = found["0: weight"]
    assert (tensor.range_low, tensor.range_high) == (-7, 7)
    weight = model[0].weight.detach()
    steps = weight / least_squares_scale(weight, QuantizationScheme(bits=4, narrow_range=True))[:, None]
    assert tensor.lowest == pytest.approx(float(steps.min()), rel=1e-5)
    assert sum(tensor.counts) == model[0].weight.numel()
    assert tensor.clipped_share == pytest.approx(float((steps.abs() > 7.5).double().mean()))
