"""Errors of outputs, against the formula."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mlframework.quantization.analysis.measures import Comparison, Measure, decibels, logits_of, relative


def test_batches_add_up_before_the_ratio() -> None:
    comparison = Comparison()
    ones, others = torch.randn(6, 3), torch.randn(6, 3)
    for start in (0, 4):
        rows = slice(start, 4 + 2 * (start // 4))
        comparison.add(ones[rows], others[rows], None)
    expected = (ones - others).double().square().sum() / others.double().square().sum()
    assert comparison.result().relative_error == pytest.approx(float(expected))


def test_silent_references() -> None:
    zeros = torch.zeros(2, 3)
    comparison = Comparison()
    comparison.add(zeros, zeros, None)
    assert comparison.result().snr == math.inf
    assert relative(1.0, 0.0) == math.inf
    assert decibels(math.inf) == -math.inf
    assert math.isnan(decibels(math.nan))


def test_outputs_that_look_like_logits() -> None:
    tensor = torch.zeros(4, 3)
    assert logits_of(tensor) is tensor
    assert logits_of({"logits": torch.zeros(2, 5, 7), "loss": torch.tensor(1.0)}).shape == (2, 5, 7)  # type: ignore[union-attr]
    assert logits_of(SimpleNamespace(logits=tensor)) is tensor
    assert logits_of(torch.zeros(4, 1)) is None
    assert logits_of(torch.zeros(4, 3, 8, 8)) is None
    assert logits_of((tensor, tensor)) is None


def test_plain_data_and_back() -> None:
    measure = Measure(0.01, 0.5, None)
    assert measure.to_dict()["snr"] == 20
    assert Measure.from_dict(measure.to_dict()) == measure


def test_the_same_infinity_is_no_error_and_another_one_is_infinite() -> None:
    infinity = float("inf")
    expected = torch.tensor([[1.0, -infinity, 2.0]])
    same, other = Comparison(), Comparison()
    same.add(torch.tensor([[1.5, -infinity, 2.0]]), expected, None)
    assert same.result().relative_error == 0.25 / 5
    other.add(torch.tensor([[1.0, 0.0, 2.0]]), expected, None)
    assert other.result().relative_error == infinity
