"""A denoiser of photographs, a small U-Net with batch norm that predicts the noise, trained here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo

from .float_training import fit, trained_once
from .pictures import Split, crops
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study

SIZE = 64
NOISE = 25 / 255  # deviation, of values from 0 to 1
BATCH_SIZE = 16
STEPS = 1000
TEST_BATCHES = 8


class Denoiser(nn.Module):
    """Takes the noise that a U-Net finds from the picture (Zhang et al. 2017, arXiv:1608.03981)."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = zoo.UNet(width=16, depth=2, classes=3)

    def forward(self, pictures: Tensor) -> Tensor:
        """Noisy pictures (N, 3, H, W) to clean ones."""
        return pictures - self.noise(pictures)


def noisy(split: Split, count: int, generator: torch.Generator) -> Batch:
    """Crops with white noise, and without, of values from 0 to 1."""
    clean = crops(split, count, SIZE, generator, smallest=SIZE) / 255
    return Batch((clean + NOISE * torch.randn(clean.shape, generator=generator),), clean)


def _seeded(split: Split, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield noisy(split, BATCH_SIZE, generator)


@cache
def _batches(split: Split, count: int, seed: int) -> list[Batch]:
    batches = _seeded(split, seed)
    return [next(batches) for _ in range(count)]


class PhotographDenoiser(Study):
    """Skip connections, transposed convolutions, and a picture at the end, of which every value counts."""

    name: ClassVar = "denoiser"
    title: ClassVar = "denoiser"
    metrics: ClassVar = ("peak signal to noise, dB", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = 3e-4
    training_seconds: ClassVar = 40

    def model(self) -> nn.Module:
        return trained_once("denoiser", Denoiser, self._train_float)

    def _train_float(self, model: nn.Module) -> None:
        fit(model, _seeded("train", 999), self.loss, STEPS, 3e-3, "denoiser, in float")

    def calibration_batches(self) -> list[Inputs]:
        return [batch.inputs for batch in _batches("calibration", 4, 1)]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return _seeded("train", 1000 + seed)

    def test_batches(self) -> list[Batch]:
        return _batches("test", TEST_BATCHES, 2)

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        goal = batch.targets if teacher_outputs is None else teacher_outputs
        return F.mse_loss(outputs, goal)

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        errors = [self.loss(o, batch).item() for o, batch in zip(outputs, self.test_batches(), strict=True)]
        return {"peak signal to noise, dB": -10 * math.log10(sum(errors) / len(errors))}
