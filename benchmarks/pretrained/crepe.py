"""CREPE tiny (Kim et al. 2018, arXiv:1802.06182), a pitch tracker, on synthesized notes of known pitch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .package_files import folder_of, import_alone
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study

SAMPLE_RATE = 16_000
FRAME = 1024
PITCH_BINS = 360
CENTS_PER_BIN = 20
FIRST_BIN_CENTS = 1997.3794084376191  # above 10 Hz, as in torchcrepe's convert.py
BATCH_SIZE = 64
TEST_BATCHES = 24
HARMONICS = 16


def notes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames (count, 1024) of mean 0 and deviation 1, and the pitch (count,) in cents above 10 Hz at their middle.

    Each note has a pitch from 50 to 1000 Hz, a timbre (harmonics that fall off at their own rate, under a formant, even
    ones weaker), a vibrato, and white noise 5 to 40 dB below it.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    pitch = 50 * 20 ** uniform(0, 1)
    time = (torch.arange(FRAME) - FRAME / 2) / SAMPLE_RATE
    rate, depth, start = uniform(4, 7), uniform(0, 0.004), uniform(0, 2 * math.pi)
    cycles = pitch * (
        time + depth * (torch.cos(start) - torch.cos(2 * math.pi * rate * time + start)) / (2 * math.pi * rate)
    )
    pitch = pitch * (1 + depth * torch.sin(start))
    number = torch.arange(1, HARMONICS + 1)
    frequency = pitch * number
    strength = number ** -uniform(0.3, 2)
    strength = strength * (1 + uniform(0, 4) * torch.exp(-(((frequency - uniform(200, 3000)) / 300) ** 2)))
    strength = torch.where(number % 2 == 0, strength * uniform(0.1, 1), strength)
    strength = torch.where(frequency < SAMPLE_RATE / 2, strength, torch.zeros(()))
    phases = 2 * math.pi * torch.rand(count, HARMONICS, generator=generator)
    tone = torch.zeros(count, FRAME)
    for harmonic in range(HARMONICS):
        angle = 2 * math.pi * (harmonic + 1) * cycles + phases[:, harmonic, None]
        tone += strength[:, harmonic, None] * torch.sin(angle)
    noise = torch.randn(count, FRAME, generator=generator) * tone.std(1, keepdim=True)
    frames = tone + noise * 10 ** (-uniform(5, 40) / 20)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames / frames.std(1, keepdim=True)
    return frames, 1200 * torch.log2(pitch[:, 0] / 10)


@cache
def _batches(count: int, seed: int) -> list[Batch]:
    frames, cents = notes(count * BATCH_SIZE, torch.Generator().manual_seed(seed))
    return list(map(Batch, zip(frames.split(BATCH_SIZE)), cents.split(BATCH_SIZE)))


def cents_of(activations: Tensor) -> Tensor:
    """The pitch (N,) in cents above 10 Hz from activations (N, 360): the weighted mean of the bins near the first."""
    first = activations.argmax(1, keepdim=True)
    bins = torch.arange(PITCH_BINS)
    near = (bins - first).abs() <= 4
    weights = torch.where(near, activations, torch.zeros(()))
    return FIRST_BIN_CENTS + CENTS_PER_BIN * (weights * bins).sum(1) / weights.sum(1)


class CrepeTiny(Study):
    """Convolutions along time, each followed by ReLU, then batch norm, then max-pooling: nothing folds."""

    name: ClassVar = "crepe"
    title: ClassVar = "CREPE tiny"
    metrics: ClassVar = ("raw pitch accuracy", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = 3e-4
    training_seconds: ClassVar = 40

    def model(self) -> nn.Module:
        module = import_alone("torchcrepe.model", {"torchcrepe": {"PITCH_BINS": PITCH_BINS}})
        model: nn.Module = module.Crepe("tiny")
        weights = torch.load(folder_of(module) / "assets" / "tiny.pth", map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        return model.eval()

    def calibration_batches(self) -> list[Inputs]:
        return [batch.inputs for batch in _batches(4, 1)]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            frames, cents = notes(BATCH_SIZE, generator)
            yield Batch((frames,), cents)

    def test_batches(self) -> list[Batch]:
        return _batches(TEST_BATCHES, 2)

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        if teacher_outputs is None:
            raise ValueError("teacher_outputs must be given: the network is not trained from its task here")
        return F.binary_cross_entropy(outputs, teacher_outputs)

    def logits(self, outputs: Any) -> Tensor:
        """Before the sigmoid that the network ends with."""
        return outputs.logit(eps=1e-7)

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        right = 0
        for output, batch in zip(outputs, self.test_batches(), strict=True):
            right += int(((cents_of(output) - batch.targets).abs() <= 50).sum())
        return {"raw pitch accuracy": right / sum(map(len, outputs))}
