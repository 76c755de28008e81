"""Modules that return their input untouched in evaluation, and not in training: dropouts of any name."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..graph.clone import copy_of
from ..graph.example_run import random_state_kept

# What may be asked of the input without touching its values.
_FORM = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_floating_point", "is_cuda", "requires_grad"}

_known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def returns_its_input(module: nn.Module) -> bool:
    """Whether a module without tensors of its own returns the very tensor that it is called with, and computes nothing
    of it, in evaluation but not in training: stochastic depth, for one. Found out by trial on a copy, and remembered.
    """
    if type(module).__module__.startswith("torch.nn.modules.") or _holds_tensors(module):
        return False
    if module not in _known:
        _known[module] = _try(module)
    return _known[module]


def _holds_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


class _Touches(TorchFunctionMode):
    """Notes whether anything is computed of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        name = getattr(func, "__self__", None).__name__ if name == "__get__" else name  # type: ignore[union-attr]
        if name not in _FORM and any(each is self.tensor for each in (*args, *(kwargs or {}).values())):
            self.found = True
        return func(*args, **(kwargs or {}))


def _try(module: nn.Module) -> bool:
    probe = copy_of(module)
    for shape in ((2, 3, 4, 4), (2, 3, 4), (2, 3)):
        try:
            with random_state_kept(), torch.no_grad():
                if not _returns_input(probe.eval(), torch.ones(shape)):
                    return False
                # A draw may leave everything as it is.
                return not all(_returns_input(probe.train(), torch.ones(shape)) for _ in range(8))
        except Exception:  # a module may refuse such an input in any way
            continue
    return False


def _returns_input(module: nn.Module, input: Tensor) -> bool:
    touches = _Touches(input)
    with touches:
        output = module(input)
    return output is input and not touches.found
