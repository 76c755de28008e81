"""Automatic mixed precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlframework.quantization import FakeQuantizeLayer, QATConfig, convert, prepare


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


@pytest.mark.parametrize("learnable", [False, True])
def test_bfloat16_autocast_trains_and_evaluates_on_the_same_integers(learnable: bool) -> None:
    prepared = prepare(_model(), QATConfig(learnable=learnable), (torch.randn(1, 1, 8, 8),))
    optimizer = torch.optim.Adam(prepared.parameters(), lr=0.01)
    inputs = torch.randn(64, 1, 8, 8)
    inputs[32:, :, :, :4] += 2
    labels = torch.arange(64) // 32
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(prepared(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        module.scale.dtype is torch.float32 for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)
    )

    converted = convert(prepared)
    prepared.eval()
    with torch.no_grad():
        plain = prepared(inputs)
        assert torch.equal(converted(inputs), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prepared(inputs), plain)
            assert torch.equal(converted(inputs), plain)
