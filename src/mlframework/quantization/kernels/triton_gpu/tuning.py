"""Which of a few configurations of a kernel is the fastest on a shape: measured once, then remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from .availability import is_interpreter

INTERPRETS = is_interpreter()

Choice = TypeVar("Choice")

_fastest: dict[Hashable, Any] = {}

# Milliseconds for each of them.
_WARM_UP, _MEASUREMENT = 2, 10


# Of a kernel that goes over an image, arguments that it is not compiled anew for: it would be no faster.
WINDOW = (
    "height",
    "width",
    "output_height",
    "output_width",
    "kernel_width",
    "step_down",
    "step_right",
    "top",
    "left",
    "dilation_down",
    "dilation_right",
)


def fastest(key: Hashable, choices: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The choice with which ``run`` takes the least time; the first one where nothing can be measured.

    Args:
        key: of the shapes and whatever else the answer depends on.
        choices: each gives the same results.
        run: may be called any number of times.
    """
    if key in _fastest:
        return _fastest[key]  # type: ignore[no-any-return]
    if len(choices) == 1 or INTERPRETS or _is_capturing():
        return choices[0]
    measure = triton.runtime.driver.active.get_benchmarker()
    times = [_time_of(measure, run, choice) for choice in choices]
    if min(times) == math.inf:
        run(choices[0])  # which raises what is the matter
    _fastest[key] = choices[min(range(len(choices)), key=times.__getitem__)]
    return _fastest[key]  # type: ignore[no-any-return]


def _time_of(measure: Callable[..., float], run: Callable[[Choice], object], choice: Choice) -> float:
    try:
        return measure(lambda: run(choice), warmup=_WARM_UP, rep=_MEASUREMENT)
    except torch.AcceleratorError:  # after which nothing runs on this GPU
        raise
    except (TritonError, RuntimeError):  # too large for this GPU, or a shape that its library does not have
        return math.inf


def _is_capturing() -> bool:
    """Whether launches are recorded into a CUDA graph, where nothing may be measured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def loop_bound(count: int) -> Any:
    """The number of rounds of a loop, as an argument of a kernel: one that the kernel is not compiled anew for.

    The interpreter takes only constants for it.
    """
    return tl.constexpr(count) if INTERPRETS else count
