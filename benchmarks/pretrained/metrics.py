"""How close outputs come to those of the float network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def signal_to_noise(references: Iterable[Tensor], outputs: Iterable[Tensor]) -> float:
    """``10 log10(sum r^2 / sum (r - o)^2)`` in decibels, over all elements; infinite for equal outputs."""
    signal = noise = 0.0
    for reference, output in zip(references, outputs, strict=True):
        signal += reference.double().square().sum().item()
        noise += (reference.double() - output.double()).square().sum().item()
    return 10 * math.log10(signal / noise) if noise else math.inf


def agreement(references: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Share of the samples (N, classes) where both have the same first class."""
    return _mean([(r.argmax(1) == o.argmax(1)).double() for r, o in zip(references, outputs, strict=True)])


def top_overlap(references: Sequence[Tensor], outputs: Sequence[Tensor], count: int = 5) -> float:
    """Share of the reference's ``count`` first classes that are among the other's, over samples (N, classes)."""
    shares = []
    for reference, output in zip(references, outputs, strict=True):
        first, other = reference.topk(count, 1).indices, output.topk(count, 1).indices
        shares.append((first[:, :, None] == other[:, None, :]).any(2).double().mean(1))
    return _mean(shares)


def accuracy(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """Share of the samples (N, classes) whose first class is the label (N,)."""
    return _mean([(o.argmax(1) == label).double() for o, label in zip(logits, labels, strict=True)])


def f1(references: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """``2 |R and O| / (|R| + |O|)`` of two sets, each given as booleans."""
    both = sum(int((r & o).sum()) for r, o in zip(references, outputs, strict=True))
    total = sum(int(r.sum()) + int(o.sum()) for r, o in zip(references, outputs, strict=True))
    return 2 * both / total if total else 1.0


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the softmax over the last axis from the teacher's."""
    log_probabilities = F.log_softmax(logits, -1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits, -1).flatten(0, -2)
    return F.kl_div(log_probabilities, teacher, reduction="batchmean", log_target=True)


def _mean(values: Sequence[Tensor]) -> float:
    return torch.cat(list(values)).mean().item()
