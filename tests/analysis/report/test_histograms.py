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


def test_infinite_values_are_clipped_and_in_no_bin() -> None:
    inputs = torch.randn(32, 8)
    infinite = inputs.clone()
    infinite[0, :2] = torch.tensor([float("inf"), float("-inf")])
    found, _ = histograms([infinite], inputs)
    tensor = found["input_1: output"]
    finite = infinite[infinite.isfinite()]
    assert (tensor.lowest, tensor.highest) == (float(finite.min()), float(finite.max()))
    assert sum(tensor.counts) == finite.numel()
    assert tensor.clipped_share == 2 / inputs.numel()


class Computing(nn.Module):
    """Layers whose weights are computed, handed to a function, and (once the test has it so) left float."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.plain = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(nn.functional.linear(torch.relu(self.normalized(x)), self.weight))


def test_weights_that_are_computed_or_given_are_counted_and_those_without_a_node_are_not() -> None:
    model, inputs = Computing(), torch.randn(16, 8)
    weight = model.weight.detach().clone()
    prepared = prepare(model, QATConfig(activation_observer=MinMaxObserver), (inputs,))
    calibrate(prepared, [inputs])
    prepared.plain.weight_fake_quantize = None
    with in_analysis(prepared):
        found = {tensor.label: tensor for tensor in histograms_of(prepared, calls_of(prepared, [inputs]))}
    weights = {label: tensor for label, tensor in found.items() if tensor.role == "weight"}
    assert list(weights) == ["normalized: weight", "linear: weight"]
    steps = weight / (weight.abs().amax(1, keepdim=True) / 127)
    assert weights["linear: weight"].lowest == pytest.approx(float(steps.min()), rel=1e-5)
    assert all(sum(tensor.counts) == 64 for tensor in weights.values())
