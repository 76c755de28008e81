"""A small network, its student, and what their tests compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, prepare


def float_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).eval()


def data(count: int = 4) -> list[Tensor]:
    return [torch.randn(16, 2, 4, 4) for _ in range(count)]


def student_and_teacher(bits: int = 3, **fields: Any) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    model, batches = float_model(), data()
    teacher = copy.deepcopy(model)
    prepared = prepare(model, QATConfig(weight_bits=bits, activation_bits=bits, **fields), (batches[0],))
    calibrate(prepared, batches)
    return prepared, teacher, batches


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module, batches: list[Tensor]) -> float:
    student.eval()
    error = sum((student(batch) - teacher(batch)).square().sum() for batch in batches)
    return (error / sum(teacher(batch).square().sum() for batch in batches)).item()


def expected_pace(steps: int, warmup: int) -> Iterator[float]:
    for step in range(steps):
        if step < warmup:
            yield (step + 1) / (warmup + 1)
        else:
            yield 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
