"""What the tests of kernels share: both ways to compute, and a process with more threads than one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from mlframework.quantization import kernels


@pytest.fixture
def _threads() -> Iterator[None]:
    """Three threads, so that shares are uneven."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "reference"])
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test on what this process computes with, and again without compiled kernels."""
    with kernels.reference_kernels() if request.param == "reference" else nullcontext():
        yield
