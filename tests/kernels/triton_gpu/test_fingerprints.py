"""Hashes on a GPU tell tensors apart, and every change of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mlframework.quantization import kernels

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with kernels.interpreted_kernels():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_change_of_one_element_is_seen(dtype: torch.dtype) -> None:
    values = torch.randn(5, 700).to(dtype)
    seen = {kernels.fingerprints([values])[0]}
    for place in (0, 1, 2047, 2048, 3499):
        changed = values.clone()
        changed.view(-1)[place] += 1
        seen.add(kernels.fingerprints([changed])[0])
    assert len(seen) == 6
    assert kernels.fingerprints([values.clone()])[0] in seen


def test_signs_and_places_count() -> None:
    values = torch.randn(3000)
    others = [values, -values, values.flip(0), values.view(50, 60), values[:2999]]
    assert len(set(kernels.fingerprints(others))) == len(others)


def test_one_reading_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self) or [0] * self.numel())
    kernels.fingerprints([torch.ones(3), torch.zeros(0), torch.ones(())])
    assert len(reads) == 1
