"""Programs of the compiled kernels: many operators on codes in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import native
from .devices import PLAIN, is_traced, kernels_for


def make_program(inputs: int, instructions: Sequence[tuple[Any, Sequence[int]]], outputs: Sequence[int]) -> int:
    """Makes a program, to be run by its number, and kept until that is given to :func:`release_program`.

    Args:
        inputs: how many tensors it is given, which are its first values.
        instructions: of each the name, the tensors and the numbers, and which values it reads. It computes the next.
        outputs: the values that the program returns.
    """
    code: list[int] = []
    tensors: list[Tensor] = []
    for (name, constants, numbers), reads in instructions:
        letters = name.encode()
        code += [len(letters), *letters, len(reads), *reads, len(constants), len(numbers), *map(int, numbers)]
        tensors += constants
    return int(native.library().make_program.default(inputs, code, tensors, outputs))


def run_program(inputs: Sequence[Tensor], program: int) -> list[Tensor]:
    """The outputs of a program. Its inputs are on the CPU, of the dtypes that its instructions read."""
    outputs: list[Tensor] = native.library().run_program.default(inputs, program)
    return outputs


def release_program(program: int) -> None:
    """Forgets a program; calls under way finish."""
    # Garbage is collected at any time: in the middle of a trace, which would otherwise have the call in its graph.
    with _disable_current_modes():
        native.library().release_program.default(program)


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor in the CPU's memory, and not something that only stands for one."""
    return type(tensor) in PLAIN and tensor.is_cpu


def run_programs() -> bool:
    """Whether programs may run now: there are compiled kernels, and nobody traces."""
    return not is_traced() and kernels_for(_PROBE) == "compiled"


_PROBE = torch.empty(0)
