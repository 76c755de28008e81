"""A character GPT, trained here on the source of Python's standard library."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo

from .float_training import fit, trained_once
from .metrics import divergence
from .pictures import Split
from .protocol import SIGNAL_TO_NOISE, Batch, Inputs, Study

CONTEXT = 128
CHARACTERS = 128  # ASCII; any other character becomes 0
BATCH_SIZE = 16
STEPS = 1500
TEST_BATCHES = 16

# By the name of the file: one of every eight for calibration, one for tests.
_REMAINDERS: dict[Split, tuple[int, ...]] = {"train": tuple(range(6)), "calibration": (6,), "test": (7,)}


@cache
def text(split: Split) -> Tensor:
    """The files of a split, one after the other, as characters (length,)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [file for index, file in enumerate(files) if index % 8 in _REMAINDERS[split]]
    source = "".join(file.read_text(encoding="utf-8") for file in chosen)
    codes = torch.tensor([ord(character) for character in source])
    return torch.where(codes < CHARACTERS, codes, 0)


def passages(split: Split, count: int, generator: torch.Generator) -> Batch:
    """Characters (count, CONTEXT) from random places, and the characters that follow each of them."""
    source = text(split)
    starts = torch.randint(len(source) - CONTEXT, (count, 1), generator=generator)
    window = source[starts + torch.arange(CONTEXT + 1)]
    return Batch((window[:, :-1].contiguous(),), window[:, 1:].contiguous())


def _seeded(split: Split, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield passages(split, BATCH_SIZE, generator)


class CharacterGPT(Study):
    """Embeddings, attention, LayerNorms and a head over 128 characters, every position a prediction."""

    name: ClassVar = "gpt"
    title: ClassVar = "character GPT"
    metrics: ClassVar = ("minus bits per character", SIGNAL_TO_NOISE)
    learning_rate: ClassVar = 1e-4
    training_seconds: ClassVar = 40

    def model(self) -> nn.Module:
        return trained_once(
            "gpt", lambda: zoo.GPT(CHARACTERS, CONTEXT, width=128, layers=4, heads=4), self._train_float
        )

    def _train_float(self, model: nn.Module) -> None:
        fit(model, _seeded("train", 999), self.loss, STEPS, 2e-3, "character GPT, in float")

    def calibration_batches(self) -> list[Inputs]:
        batches = _seeded("calibration", 1)
        return [next(batches).inputs for _ in range(4)]

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return _seeded("train", 1000 + seed)

    def test_batches(self) -> list[Batch]:
        batches = _seeded("test", 2)
        return [next(batches) for _ in range(TEST_BATCHES)]

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        if teacher_outputs is not None:
            return divergence(outputs, teacher_outputs)
        assert batch.targets is not None
        return F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten())

    def score(self, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        losses = [self.loss(o, batch).item() for o, batch in zip(outputs, self.test_batches(), strict=True)]
        return {"minus bits per character": -sum(losses) / len(losses) / math.log(2)}
