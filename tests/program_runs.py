"""Whether a converted model runs programs, and what it gives where it runs none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from example_models import results
from mlframework.quantization.int8.program import Program


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_runs() -> Iterator[list[Program]]:
    """The programs that run."""
    ran: list[Program] = []
    run = Program.run

    def counting(self: Program, *inputs: Tensor) -> Any:
        ran.append(self)
        return run(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "run", counting)
        yield ran


def runs_programs(model: nn.Module, *inputs: Any) -> bool:
    with counted_runs() as ran, torch.no_grad():
        model(*inputs)
    return bool(ran)


def module_by_module(model: nn.Module, *inputs: Any) -> list[Tensor]:
    """What the model gives where every module is called, since somebody is there to see all operators."""
    with Operators(), torch.no_grad():
        return results(model, *inputs)
