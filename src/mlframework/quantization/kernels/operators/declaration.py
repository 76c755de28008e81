"""How an operator is declared: its schema, what it computes in PyTorch's own operations, and its form on fake tensors.

Operators are PyTorch's: ``torch.ops.mlframework_quantization_kernels.<name>``. The compiled library registers
implementations for the CPU under the same names (``csrc/operators.cpp``), and :mod:`..triton_gpu` those for a GPU, so
``torch.compile`` and ``torch.export`` see a call in the graph. Outputs have no history; gradients belong to the
functions of :mod:`..differentiable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

from .. import devices
from ..devices import Kernels

NAMESPACE = "mlframework_quantization_kernels"

_LIBRARY = Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]

CODES = (torch.uint8, torch.int8)
FLOATS = (torch.float32, torch.bfloat16)
FLOATS_ON_GPU = (*FLOATS, torch.float16)

# By name, for the tests, which check every one of them.
DECLARED: dict[str, Operator] = {}


class Operator:
    """An operator that chooses its implementation by its first argument.

    Args:
        schema: without the namespace.
        reference: the same in PyTorch's operations; None for what only compiled kernels can read.
        dtypes: of the first argument, that the compiled kernels take.

    Attributes:
        dtypes: of the first argument, that each kind of kernels takes.
        mutated: the places of the arguments that change.
    """

    empty_outputs: Callable[..., Any]

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any] | None,
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        self.__doc__ = None if reference is None else reference.__doc__
        self.name = schema.partition("(")[0]
        self.dtypes: dict[Kernels, tuple[torch.dtype, ...]] = {"compiled": dtypes, "triton": ()}
        _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        if reference is not None:
            _LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        for key in ("Autograd", "ADInplaceOrView"):
            _LIBRARY.impl(self.name, fallthrough_kernel, key)  # type: ignore[no-untyped-call]
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.reference: Any = self.overload if reference is None else reference
        self.on_gpu: Callable[..., Any] | None = None
        self.mutated = tuple(
            index
            for index, argument in enumerate(self.overload._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        DECLARED[self.name] = self

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Registers the operator's form on fake tensors: shapes, strides and dtypes of the outputs alone. On real ones
        it allocates them (:attr:`empty_outputs`)."""

        def form(*arguments: Any) -> Any:
            # Of a real tensor and one on the meta device, PyTorch calls this form, whose results have no values.
            devices = {each.device.type for each in arguments if isinstance(each, Tensor)}
            if len(devices) > 1 and "meta" in devices:
                raise RuntimeError(
                    f"{self.name} must have all tensors on one device, got {' and '.join(sorted(devices))}"
                )
            return function(*arguments)

        register_fake(f"{NAMESPACE}::{self.name}", form, lib=_LIBRARY)
        self.empty_outputs = function
        return function

    def implement_on_gpu(self, function: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> None:
        """Registers the kernels for a GPU, which takes a first argument of these dtypes."""
        _LIBRARY.impl(self.name, function, "CUDA")  # type: ignore[no-untyped-call]
        self.dtypes["triton"] = dtypes
        self.on_gpu = function

    def has_kernel(self, tensor: Tensor) -> bool:
        """Whether a call with this first argument runs kernels, and not the reference."""
        kernels = devices.kernels_for(tensor)
        return kernels is not None and tensor.dtype in self.dtypes[kernels]

    def run(self, *arguments: Any) -> Any:
        """The kernels; callers have asked :meth:`has_kernel`."""
        if torch.compiler.is_exporting():
            arguments = tuple(_finite(each) if type(each) is float else each for each in arguments)
        if devices.interprets():
            assert self.on_gpu is not None
            return self.on_gpu(*arguments)
        return self.overload(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        if not self.has_kernel(arguments[0]):
            return self.reference(*arguments)
        result = self.run(*arguments)
        if self.mutated and not devices.is_traced():
            # Which is how others see that these have changed.
            changed = [arguments[index] for index in self.mutated if arguments[index] is not None]
            torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
        return result


def _finite(number: float) -> float:
    """A number for a program of ``torch.export``: AOTInductor writes infinite ones in a way that it cannot read. An end
    of a clip at the largest float32 changes no value but an infinite one."""
    largest = torch.finfo(torch.float32).max
    return min(max(number, -largest), largest)


def operator(schema: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[Callable[..., Any]], Operator]:
    """Declares the operator whose reference is the decorated function."""
    return lambda reference: Operator(schema, reference, dtypes)


def records_gradients() -> bool:
    """Whether autograd records, where anybody can ask for the gradients: a program of ``torch.export`` has none of the
    functions of :mod:`..differentiable`, whether gradients were enabled or not while it was made."""
    return torch.is_grad_enabled() and not torch.compiler.is_exporting()


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed of these: then the reference does it, whose operations it knows."""
    return records_gradients() and any(tensor.requires_grad for tensor in tensors)
