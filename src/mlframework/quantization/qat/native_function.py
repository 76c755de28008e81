"""How an autograd function of compiled kernels is called."""

from __future__ import annotations

from typing import Any

import torch


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without what it asks, at the cost of a small kernel, about functorch's transforms: whoever
    calls compiled kernels has asked already (:func:`.kernels.use_native`)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def refuse_gradient_of_gradient() -> None:
    """For the backward of a function whose own derivative is not known.

    Raises:
        RuntimeError: the backward is being recorded.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph must be False: a gradient of a gradient does not pass through the integer training forward. "
            "Run forward and backward under mlframework.quantization.kernels.reference_kernels()"
        )
