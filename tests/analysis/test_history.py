"""Ranges and integers as they were at each step, against weights that are moved by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mlframework.quantization import OscillationFreezer, QATConfig, QuantizationHistory, calibrate, prepare


def prepared_layer() -> nn.Module:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[7.0, 1.0, 2.0, 3.0]]))  # a scale of one on four bits
    prepared = prepare(layer, QATConfig(weight_bits=4), (torch.randn(2, 4),))
    calibrate(prepared, [torch.tensor([[-1.0, 0.0, 1.0, 4.1]])])
    return prepared


def test_flips_and_oscillations_are_counted() -> None:
    prepared = prepared_layer()
    history = QuantizationHistory(prepared)
    weight = prepared.weight
    for second, third in ((1.0, 2.0), (1.6, 2.0), (1.4, 2.6), (1.6, 3.4), (1.6, 3.0)):
        with torch.no_grad():
            weight[0, 1], weight[0, 2] = second, third  # type: ignore[index,operator]
        history.step()
    assert history.steps == [1, 2, 3, 4, 5]
    assert history.flips == {"": [0, 0.25, 0.5, 0.25, 0]}
    assert history.oscillating == {"": [0, 0, 0.25, 0.25, 0.25]}  # the third only ever rose
    assert history.oscillation == {"": 0.25}


def test_oscillations_are_those_that_a_freezer_counts() -> None:
    inputs = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prepared = prepare(model, QATConfig(weight_bits=3), (inputs,))
    calibrate(prepared, [inputs])
    history = QuantizationHistory(prepared)
    freezer = OscillationFreezer(prepared, steps=60, threshold=(2.0, 2.0))  # counts, and freezes nothing
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.3)
    shares = []
    for _ in range(60):
        optimizer.zero_grad()
        (prepared(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()
        history.step()
        freezer.step()
        shares.append(freezer.oscillating())
    assert all(0 < share < 1 for share in history.oscillation.values())
    assert history.oscillating == {name: [each[name] for each in shares] for name in ("0", "2")}


def test_ranges_and_scales_are_recorded_every_so_often() -> None:
    prepared = prepared_layer()
    history = QuantizationHistory(prepared, every=2)
    for factor in (1.0, 1.0, 2.0, 2.0):
        prepared.get_submodule("input_fake_quantize").scale.fill_(0.02 * factor)  # type: ignore[operator,union-attr]
        history.step()
    assert history.steps == [1, 3]
    assert history.scales["input_fake_quantize"] == pytest.approx([0.02, 0.04])
    low, high = history.ranges["input_fake_quantize"][1]
    assert high - low == pytest.approx(255 * 0.04, rel=1e-5)
    assert "weight_fake_quantize" not in history.ranges
    assert json.loads(json.dumps(history.to_dict()))["steps"] == [1, 3]


def test_before_data_nothing_has_flipped() -> None:
    prepared = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), None, (torch.randn(2, 4),))
    history = QuantizationHistory(prepared)
    history.step()
    assert history.flips == {"0": [0.0], "2": [0.0]}


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="every must be a positive number of steps, got 0"):
        QuantizationHistory(prepared_layer(), every=0)
    with pytest.raises(ValueError, match="model must be a prepared model"):
        QuantizationHistory(nn.Linear(2, 2))
