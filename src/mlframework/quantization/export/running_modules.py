"""Which module of a model is running, for an error that comes from its inside to say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class RunningModules:
    """The modules that were entered and not left, outermost first, by qualified name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def innermost(self) -> str:
        """The innermost one, in words."""
        return next((name for name in reversed(self.names) if name), "the model itself")


@contextmanager
def running_modules(model: nn.Module) -> Iterator[RunningModules]:
    """Keeps track while the model runs; after an exception from inside, of where it came from."""
    running = RunningModules()

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            running.names.append(name)

        return hook

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        running.names.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
