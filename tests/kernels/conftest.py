"""What the tests of kernels share: codes of any dtype and layout, and a process with more threads than one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def _threads() -> Iterator[None]:
    """Three threads, so that shares are uneven."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
