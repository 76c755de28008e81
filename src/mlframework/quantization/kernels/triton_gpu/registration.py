"""Which operators have kernels in Triton, and their registration with PyTorch's dispatcher.

The module of an operator's kernels is imported at its first call: until then nobody pays for Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..operators.declaration import CODES, DECLARED
from ..operators.declaration import FLOATS_ON_GPU as FLOATS
from . import availability

# By module of this package, the operators that it implements, each as the function of its name, and the dtypes of the
# first argument that they take.
IMPLEMENTED: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "addition": {"add": CODES},
    "codes": {
        "quantize": FLOATS,
        "dequantize": CODES,
        "lookup": CODES,
        "lookup_gradient": FLOATS,
        "occurring": CODES,
        "requantize": (torch.float32, torch.int32),
    },
    "pooling": {"max_pool2d": CODES, "sum_positions": CODES, "average_positions": CODES},
    "fake_quantization": {"fake_quantize": FLOATS, "mask_gradient": FLOATS},
    "fingerprints": {"fingerprints": ()},
    "gradients": {"fake_quantize_backward": FLOATS},
    "layers": {"folded_layer": CODES, "integer_layer": CODES, "train_layer": CODES, "weighted_product": CODES},
    "batch_statistics": {"batch_statistics": FLOATS},
    "normalization": {"normalize": FLOATS},
    "normalization_backward": {"normalize_backward": FLOATS},
    "statistics": {"extremes": FLOATS, "update_moving_average": FLOATS},
}


def register() -> None:
    """Registers all of them for CUDA tensors; without Triton none, so that PyTorch's operations run there."""
    if not availability.is_installed():
        return
    for module, operators in IMPLEMENTED.items():
        for name, dtypes in operators.items():
            DECLARED[name].implement_on_gpu(_implementation(module, name), dtypes)


def _implementation(module: str, name: str) -> Callable[..., Any]:
    operator = DECLARED[name]

    def run(*arguments: Any) -> Any:
        first = arguments[0]
        device = first.device if isinstance(first, Tensor) else first[0].device  # of a list
        if any(isinstance(each, Tensor) and each.device != device for each in arguments):
            return operator.reference(*arguments)  # which raises PyTorch's own error
        with _on_device(device):
            return function_of(module, name)(*arguments)

    return run


@functools.cache
def function_of(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f".{module}", __package__), name)
    return function


def _on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
