"""The compiled kernels: where they are, and whether they are loaded.

They stand beside this file as a library that speaks to PyTorch through its stable ABI (``csrc/``, built by the
project's ``setup.py``), and implement for the CPU the operators of :mod:`.operators`. Without it the references run:
bit for bit the same and slower.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_compiled.abi3.so")


class _State:
    """Whether the library is loaded; None where nobody has asked."""

    is_loaded: bool | None = None


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
