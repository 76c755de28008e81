"""The compiled kernels: where they are, whether they run here, and when they are asked.

They stand beside this file as a library that speaks to PyTorch through its stable ABI (``csrc/``, built by the
project's ``setup.py``). What evaluation computes with them, :mod:`.operations` and :mod:`.integer_products` compute
without them, bit for bit the same and slower. So does :mod:`.fake_quantization`, but for the last bits of its sums over
elements. Where a training step without them takes other steps (:mod:`.normalization`), its file says so.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

LIBRARY = Path(__file__).with_name("_native.abi3.so")

_OPERATORS = (
    "quantize",
    "dequantize",
    "fake_quantize",
    "mask_gradient",
    "fake_quantize_backward",
    "update_moving_average",
    "extremes",
    "fingerprints",
    "lookup",
    "lookup_gradient",
    "occurring",
    "add",
    "requantize",
    "max_pool2d",
    "sum_positions",
    "pack_layer",
    "convolution",
    "linear",
    "train_weight",
    "batch_statistics",
    "normalize",
    "normalize_backward",
    "has_integer_layers",
    "instruction_set",
)

PLAIN = (Tensor, nn.Parameter)

# The operators by name, once they are loaded: overloads, which are called without a search by argument types.
operators: dict[str, Any] = {}

_reference_is_forced = False


@functools.cache
def native_is_available() -> bool:
    """Whether the compiled kernels are there; loads them at the first call, and warns if they cannot be loaded.

    Raises:
        RuntimeError: ``MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET`` names no instruction set.
    """
    namespace: Any = torch.ops.mlframework_quantization_kernels
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        operators.update({name: getattr(namespace, name).default for name in _OPERATORS})
    except (OSError, AttributeError, RuntimeError) as error:
        warnings.warn(
            "the compiled kernels of mlframework.quantization could not be loaded, so that training and integer layers "
            "run several times slower (with the same results). To build them, have a C++ compiler and torch installed "
            f"and run `pip install --no-build-isolation` on the project's source. The reason: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    operators["instruction_set"]()  # if the environment names an unknown one, this raises before any kernel does
    return True


def use_native(tensor: Tensor) -> bool:
    """Whether the compiled kernels take this tensor: on the CPU, and not while PyTorch traces (it fuses on its own)."""
    return (
        not torch.compiler.is_compiling()
        and not _reference_is_forced
        and type(tensor) in PLAIN  # not a tensor that only stands for one, as tracers have
        and tensor.is_cpu
        and not torch._C._are_functorch_transforms_active()  # nor for a batch, or a gradient, of vmap and its kind
        and native_is_available()
    )


@functools.cache
def has_integer_layers() -> bool:
    """Whether the compiled kernels run whole integer layers on this machine's CPU (AVX2, or AVX-512 VNNI)."""
    return native_is_available() and bool(operators["has_integer_layers"]())


def instruction_set() -> str:
    """What the compiled kernels use of this processor, or may: ``"avx512_vnni"``, ``"avx512"``, ``"avx2"``,
    ``"baseline"``; ``"none"`` without compiled kernels.

    The environment variable ``MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET`` names the most that a process may use.
    """
    return str(operators["instruction_set"]()) if native_is_available() else "none"


def active_path() -> Literal["native", "reference"]:
    """What computes on the CPU: the compiled kernels, or PyTorch's operations as ``arithmetic`` writes them.

    Example:
        >>> with reference_kernels():
        ...     active_path()
        'reference'
    """
    return "native" if not _reference_is_forced and native_is_available() else "reference"


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Computes on codes with PyTorch's operations alone, in the whole process, for as long as the context lasts."""
    global _reference_is_forced
    before = _reference_is_forced
    _reference_is_forced = True
    try:
        yield
    finally:
        _reference_is_forced = before
