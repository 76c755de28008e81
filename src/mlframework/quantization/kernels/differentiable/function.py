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


def refuse_export_with_gradients() -> None:
    """For what trains.

    Raises:
        RuntimeError: ``torch.export`` traces it with gradients enabled. Its programs have no gradient of what the
            functions of this package compute, and one that trained would learn from what is left of them.
    """
    if torch.compiler.is_exporting() and torch.is_grad_enabled():
        raise RuntimeError(
            "torch.export keeps no gradients of quantized training: call model.eval() before it, or, for a program "
            "that observes but does not learn, export in training mode under torch.no_grad()"
        )


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
