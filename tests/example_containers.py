"""A network of containers, one of which is called twice, and what is prepared of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlframework.quantization import FakeQuantizeLayer, QATConfig, calibrate, prepare

IMAGES = torch.randn(4, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Network(nn.Module):
    """A block called once, one called twice, and another method that calls a container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.twice = Residual(8)
        self.head = nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.blocks(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def disabled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = module.observer.enabled = False
    return model


def prepared(model: nn.Module | None = None) -> nn.Module:
    return prepare(Network() if model is None else model, QATConfig(), (IMAGES,))


def calibrated(model: nn.Module | None = None) -> nn.Module:
    result = prepared(model)
    calibrate(result, [torch.randn_like(IMAGES) for _ in range(3)])
    return result.eval()
