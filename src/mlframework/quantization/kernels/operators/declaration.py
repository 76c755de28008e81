"""How an operator is declared: its schema, what it computes in PyTorch's own operations, and its form on fake tensors.

Operators are PyTorch's: ``torch.ops.mlframework_quantization_kernels.<name>``. The compiled library registers
implementations for the CPU under the same names (``csrc/operators.cpp``), so ``torch.compile`` and ``torch.export`` see
a call in the graph. Outputs have no history; gradients belong to the functions of :mod:`..differentiable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

from .. import native

NAMESPACE = "mlframework_quantization_kernels"

_LIBRARY = Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]

CODES = (torch.uint8, torch.int8)
FLOATS = (torch.float32, torch.bfloat16)

# By name, for the tests, which check every one of them.
DECLARED: dict[str, Operator] = {}


class Operator:
    """An operator that chooses its implementation by its first argument.

    Args:
        schema: without the namespace.
        reference: the same in PyTorch's operations; None for what only compiled kernels can read.
        dtypes: of the first argument, that the compiled kernels take.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any] | None,
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        self.__doc__ = None if reference is None else reference.__doc__
        self.name = schema.partition("(")[0]
        self.dtypes = dtypes
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        if reference is not None:
            _LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        for key in ("Autograd", "ADInplaceOrView"):
            _LIBRARY.impl(self.name, fallthrough_kernel, key)  # type: ignore[no-untyped-call]
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.reference: Any = self.overload if reference is None else reference
        self.mutated = tuple(
            index
            for index, argument in enumerate(self.overload._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        DECLARED[self.name] = self

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers the operator's form on fake tensors: shapes, strides and dtypes of the outputs alone."""
        register_fake(f"{NAMESPACE}::{self.name}", function, lib=_LIBRARY)
        return function

    def runs_compiled(self, tensor: Tensor) -> bool:
        """Whether a call with this first argument runs the compiled kernels."""
        return tensor.dtype in self.dtypes and native.takes(tensor)

    def __call__(self, *arguments: Any) -> Any:
        if not self.runs_compiled(arguments[0]):
            return self.reference(*arguments)
        result = self.overload(*arguments)
        if self.mutated and not native.is_traced():
            # Which is how others see that these have changed.
            changed = [arguments[index] for index in self.mutated if arguments[index] is not None]
            torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
        return result


def operator(schema: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[Callable[..., Any]], Operator]:
    """Declares the operator whose reference is the decorated function."""
    return lambda reference: Operator(schema, reference, dtypes)


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of these: then the reference does it, whose operations it knows."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
