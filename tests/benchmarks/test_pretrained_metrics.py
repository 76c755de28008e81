"""Metrics of the study against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.pretrained import metrics


def tensors(*shape: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two lists of two batches."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(*shape, generator=generator) for _ in range(2)]
    return first, [batch + 0.5 * torch.randn(*shape, generator=generator) for batch in first]


def test_signal_to_noise() -> None:
    references, outputs = tensors(7, 5)
    r, o = (
        np.concatenate([batch.numpy().astype(np.float64) for batch in batches]) for batches in (references, outputs)
    )
    expected = 10 * math.log10((r**2).sum() / ((r - o) ** 2).sum())
    assert metrics.signal_to_noise(references, outputs) == pytest.approx(expected, abs=1e-9)
    assert metrics.signal_to_noise(references, references) == math.inf


def test_agreement_and_overlap() -> None:
    references, outputs = tensors(20, 9)
    pairs = [
        (r.tolist(), o.tolist()) for a, b in zip(references, outputs, strict=True) for r, o in zip(a, b, strict=True)
    ]

    def first(values: list[float], count: int) -> set[int]:
        return set(sorted(range(len(values)), key=lambda index: -values[index])[:count])

    same = sum(first(r, 1) == first(o, 1) for r, o in pairs) / len(pairs)
    overlap = sum(len(first(r, 5) & first(o, 5)) / 5 for r, o in pairs) / len(pairs)
    assert metrics.agreement(references, outputs) == pytest.approx(same)
    assert metrics.top_overlap(references, outputs) == pytest.approx(overlap)
    assert metrics.agreement(references, references) == metrics.top_overlap(references, references) == 1


def test_f1() -> None:
    found, other = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert metrics.f1([found], [other]) == 2 * 1 / (2 + 2)
    assert metrics.f1([found], [found]) == 1
    assert metrics.f1([found & False], [found & False]) == 1


def test_divergence() -> None:
    (logits, _), (teacher, _) = tensors(6, 4)
    p = np.exp(teacher.double().numpy())
    q = np.exp(logits.double().numpy())
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = (p * np.log(p / q)).sum(1).mean()
    assert metrics.divergence(logits, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert metrics.divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)
