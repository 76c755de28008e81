"""How the autograd functions of this package are called."""

from __future__ import annotations

from typing import Any

import torch

from ..devices import is_traced


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Calls ``function.apply``, outside of a trace without its check for functorch's transforms, which costs as much as
    a small kernel; callers must have made sure that there are none (:func:`.devices.kernels_for`)."""
    if is_traced():
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def refuse_gradient_of_gradient() -> None:
    """For the backward of a function whose own derivative is not known.

    Raises:
        RuntimeError: the backward is being recorded.
    """
    if torch.is_grad_enabled() and not is_traced():
        raise RuntimeError(
            "create_graph must be False: a gradient of a gradient does not pass through the integer training forward. "
            "Run forward and backward under mlframework.quantization.kernels.reference_kernels()"
        )
