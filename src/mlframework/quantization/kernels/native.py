"""The compiled kernels: where they are, whether they are loaded, and which tensors they take.

They stand beside this file as a library that speaks to PyTorch through its stable ABI (``csrc/``, built by the
project's ``setup.py``), and implement for the CPU the operators of :mod:`.operators`. Without it the references run:
bit for bit the same and slower.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

LIBRARY = Path(__file__).with_name("_compiled.abi3.so")

PLAIN = (Tensor, nn.Parameter)

# Whether ``torch.compile`` is tracing.
is_traced = torch.compiler.is_compiling


class _State:
    """Whether the library is loaded (None: nobody has asked), and whether references are forced."""

    is_loaded: bool | None = None
    reference_is_forced = False


def is_available() -> bool:
    """Whether the compiled kernels are there; loads them at the first call, and warns if they cannot be loaded.

    Raises:
        RuntimeError: ``MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET`` names no instruction set of this processor.
    """
    if _State.is_loaded is None:
        _State.is_loaded = _load()
    return _State.is_loaded


def _load() -> bool:
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        library().instruction_sets  # noqa: B018 - which an older one lacks
    except (OSError, AttributeError, RuntimeError) as error:
        warnings.warn(
            "the compiled kernels of mlframework.quantization could not be loaded, so that training and integer layers "
            "run several times slower (with the same results). To build them, have a C++ compiler and torch installed "
            f"and run `pip install --no-build-isolation` on the project's source. The reason: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    library().instruction_set()  # if the environment names an unknown one, this raises before any kernel does
    return True


def library() -> Any:
    """What the library has besides operators, which are declared elsewhere (:mod:`.operators`)."""
    return torch.ops.mlframework_quantization_kernels


def reference_is_forced() -> bool:
    """Whether :func:`reference_kernels` is in force."""
    return _State.reference_is_forced


def takes(tensor: Tensor) -> bool:
    """Whether the compiled kernels run on this tensor: one on the CPU that stands for nothing but itself."""
    return (
        not _State.reference_is_forced
        and (type(tensor) in PLAIN or (is_traced() and type(tensor) is FakeTensor))  # no distributed tensor
        and tensor.is_cpu
        and (_State.is_loaded or is_available())
        and not torch._C._are_functorch_transforms_active()  # nor for a batch, or a gradient, of vmap and its kind
    )


def instruction_set() -> str:
    """The row of the table of microkernels that is in use; ``"none"`` without compiled kernels.

    It is the first of :func:`instruction_sets`, or the one that the environment variable
    ``MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET`` names, with whose instructions all kernels then make do.
    """
    return str(library().instruction_set()) if is_available() else "none"


def instruction_sets() -> tuple[str, ...]:
    """The rows of the table of microkernels that this processor can run, the best first; none without compiled kernels.

    Of ``"avx512_vnni"``, ``"avx_vnni"``, ``"avx512"`` (AVX2's integer layers, AVX-512 elsewhere), ``"avx2"``,
    ``"sse2"``; ``"neon_i8mm"``, ``"neon_dot"``; and ``"portable"``.
    """
    return tuple(library().instruction_sets().split()) if is_available() else ()


def active_path() -> Literal["native", "reference"]:
    """What computes on the CPU: the compiled kernels, or PyTorch's operations as ``arithmetic`` writes them.

    Example:
        >>> with reference_kernels():
        ...     active_path()
        'reference'
    """
    return "native" if not _State.reference_is_forced and is_available() else "reference"


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Computes on codes with PyTorch's operations alone, in the whole process, for as long as the context lasts."""
    before = _State.reference_is_forced
    _State.reference_is_forced = True
    try:
        yield
    finally:
        _State.reference_is_forced = before
