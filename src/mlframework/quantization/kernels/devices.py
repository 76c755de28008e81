"""Which kernels run on a tensor: the compiled ones on a CPU, those in Triton on a GPU, or PyTorch's operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from . import native
from .triton_gpu import availability

Kernels = Literal["compiled", "triton"]

PLAIN = (Tensor, nn.Parameter)

# Whether ``torch.compile`` is tracing.
is_traced = torch.compiler.is_compiling


class _State:
    reference_is_forced = False
    interprets = False


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The kernels that run on this tensor: one that stands for nothing but itself, on a device that has some."""
    if not (type(tensor) in PLAIN or (is_traced() and type(tensor) is FakeTensor)):  # no distributed tensor
        return None
    if torch._C._are_functorch_transforms_active():  # nor for a batch, or a gradient, of vmap and its kind
        return None
    if tensor.is_cpu:
        return kernels_on("cpu")
    return kernels_on("cuda", tensor.get_device()) if tensor.is_cuda else None


def kernels_on(device_type: str, index: int = -1) -> Kernels | None:
    """The kernels of a device; ``index`` is that of a GPU, or -1 for the current one."""
    if _State.reference_is_forced:
        return None
    if device_type == "cpu":
        if _State.interprets:
            return "triton"
        return "compiled" if native.is_available() else None
    return "triton" if device_type == "cuda" and availability.runs_on(index) else None


def interprets() -> bool:
    """Whether :func:`interpreted_kernels` is in force."""
    return _State.interprets


def active_path(device: torch.device | str = "cpu") -> Literal["native", "triton", "reference"]:
    """What computes on a device: compiled kernels, those in Triton, or PyTorch's operations as ``arithmetic`` has them.

    Example:
        >>> with reference_kernels():
        ...     active_path()
        'reference'
    """
    device = torch.device(device)
    kernels = kernels_on(device.type, -1 if device.index is None else device.index)
    return "reference" if kernels is None else "native" if kernels == "compiled" else "triton"


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Computes on codes with PyTorch's operations alone, in the whole process, for as long as the context lasts."""
    before = _State.reference_is_forced
    _State.reference_is_forced = True
    try:
        yield
    finally:
        _State.reference_is_forced = before


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Runs the kernels for GPUs on tensors of the CPU, in Triton's interpreter: for tests where there is no GPU.

    Raises:
        RuntimeError: Triton was not imported with ``TRITON_INTERPRET=1`` in the environment, or is not installed.
    """
    if not availability.is_interpreter():
        raise RuntimeError("needs Triton's interpreter: install triton, and set TRITON_INTERPRET=1 before it is used")
    before = _State.interprets
    _State.interprets = True
    try:
        yield
    finally:
        _State.interprets = before
