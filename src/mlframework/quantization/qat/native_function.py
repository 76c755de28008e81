"""How an autograd function of compiled kernels is called."""

from __future__ import annotations

from typing import Any

import torch


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without what it asks, at the cost of a small kernel, about functorch's transforms: whoever
    calls compiled kernels has asked already (:func:`.kernels.use_native`)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
