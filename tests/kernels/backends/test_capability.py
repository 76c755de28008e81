"""The probes: believed only if the largest products come out right, and refusing quietly otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mlframework.quantization.kernels.backends import capability
from mlframework.quantization.kernels.backends.capability import int_mm_is_best, int_mm_is_exact, onednn_is_exact


@pytest.fixture(autouse=True)
def _forget_answers() -> Iterator[None]:
    """The answers are kept for the life of the process."""
    for probe in (onednn_is_exact, int_mm_is_exact, int_mm_is_best):
        probe.cache_clear()
    yield
    for probe in (onednn_is_exact, int_mm_is_exact, int_mm_is_best):
        probe.cache_clear()


def test_answers_are_kept() -> None:
    assert onednn_is_exact() is onednn_is_exact()
    assert int_mm_is_exact("cpu") is int_mm_is_exact("cpu")
    assert onednn_is_exact.cache_info().misses == int_mm_is_exact.cache_info().misses == 1


def saturating(left: Tensor, right: Tensor) -> Tensor:
    return (left.int() @ right.int()).clamp(-(2**15), 2**15 - 1)


def failing(*arguments: Any) -> Tensor:
    raise RuntimeError("not on this machine")


@pytest.mark.parametrize("kernel", [saturating, failing])
def test_int_mm_that_is_wrong_or_missing_is_refused(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr(torch, "_int_mm", kernel)
    assert not int_mm_is_exact("cpu")


def test_onednn_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "OnednnConvolution", failing)
    assert not onednn_is_exact()


def test_onednn_that_is_wrong_in_one_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = torch.full((1, 64, 2, 2), 255.0 * 127 * 64 * 9)
    monkeypatch.setattr(capability, "OnednnConvolution", lambda *arguments: lambda codes: sums)
    assert onednn_is_exact()
    onednn_is_exact.cache_clear()
    sums[0, 3, 1, 0] -= 2
    assert not onednn_is_exact()


@pytest.mark.parametrize(("exact", "onednn", "best"), [(1, 1, True), (1, 0, False), (0, 1, False)])
def test_int_mm_is_a_slow_loop_where_onednn_is_not_exact(
    monkeypatch: pytest.MonkeyPatch, exact: int, onednn: int, best: bool
) -> None:
    monkeypatch.setattr(capability, "int_mm_is_exact", lambda device_type: bool(exact))
    monkeypatch.setattr(capability, "onednn_is_exact", lambda: bool(onednn))
    assert int_mm_is_best("cpu") is best
    assert int_mm_is_best("cuda") is bool(exact)
