"""The network of ``examples/digits.py`` on scikit-learn's digits, with a split and a float model for every seed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from .float_training import trained_once
from .metrics import accuracy, divergence
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import digits
from digits_report import TrainingMonitor


@cache
def _data(seed: int) -> digits.DigitsData:
    return digits.load_data(seed)


class Digits(Study):
    """Three convolutions, small enough that widths of two and three bits mean something.

    As in the demo, statistics come from the images that it trains on; what it is tested on is apart.
    """

    name: ClassVar = "digits"
    title: ClassVar = "digits"
    metrics: ClassVar = ("accuracy", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = digits.LEARNING_RATE
    training_seconds: ClassVar = 15
    trained_widths: ClassVar = ("W4A4", "W3A3", "W2A2")

    def model(self) -> nn.Module:
        return trained_once(f"digits-{self.seed}", digits.DigitsNet, self._train_float)

    def _train_float(self, model: nn.Module) -> None:
        trained = digits.train_float(_data(self.seed), self.seed, TrainingMonitor(Console(quiet=True)))
        model.load_state_dict(trained.state_dict())

    def calibration_batches(self) -> list[Inputs]:
        batches = _data(self.seed).train_images.split(digits.BATCH_SIZE)
        return [(images,) for images in batches if len(images) == digits.BATCH_SIZE]  # some libraries stack them

    def train_batches(self, seed: int) -> Iterator[Batch]:
        data, generator = _data(self.seed), torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(data.train_labels), generator=generator).split(digits.BATCH_SIZE):
                yield Batch((data.train_images[rows],), data.train_labels[rows])

    def test_batches(self) -> list[Batch]:
        data = _data(self.seed)
        return [Batch((data.test_images,), data.test_labels)]

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        assert batch.targets is not None
        loss = F.cross_entropy(outputs, batch.targets)
        return loss if teacher_outputs is None else loss + divergence(outputs, teacher_outputs)

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        labels = [batch.targets for batch in self.test_batches() if batch.targets is not None]
        return {"accuracy": accuracy(outputs, labels)}
