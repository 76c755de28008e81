"""What an integer module is to the compiled kernels, as a step of a program."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Numbers for the dtypes of values, as the instructions know them.
FLOATS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class Instruction(NamedTuple):
    """An operation of ``kernels/csrc/instructions.cpp``, which says for each name which tensors and numbers it takes.

    Attributes:
        tensors: constants that it reads at every call.
        numbers: settings.
    """

    name: str
    tensors: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()


class Settings(NamedTuple):
    """Attributes that an instruction is made of, of an object that tells nobody when they are set."""

    owner: Any
    names: tuple[str, ...]
