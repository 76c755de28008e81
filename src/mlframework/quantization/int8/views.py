"""Views of codes, and what moves codes without computing any, with fixed numbers: as steps of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .instruction import Instruction, Settings

# As the instructions of these names take their numbers.
_CALLS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda codes: codes,
    "contiguous": lambda codes: codes.contiguous(),
    "flatten": lambda codes, first, last: codes.flatten(first, last),
    "transpose": lambda codes, one, other: codes.transpose(one, other),
    "permute": lambda codes, *axes: codes.permute(axes),
    "reshape": lambda codes, *sizes: codes.reshape(sizes),
    "unflatten": lambda codes, axis, *sizes: codes.unflatten(axis, sizes),
    "select": lambda codes, axis, index: codes.select(axis, index),
    "part": lambda codes, index, count, axis: codes.chunk(count, axis)[index],
}


# The modules that only view codes, with what they do when they run.
_FORWARDS = {nn.Flatten: nn.Flatten.forward, nn.Identity: nn.Identity.forward}


class View(NamedTuple):
    """What is done with codes: the name of an instruction, and its numbers."""

    name: str
    numbers: tuple[int, ...] = ()

    def __call__(self, codes: Tensor) -> Tensor:
        return _CALLS[self.name](codes, *self.numbers)

    def instruction(self) -> Instruction:
        return Instruction(self.name, numbers=self.numbers)


def view_of_module(module: nn.Module) -> View | None:
    """What a module is that does nothing else."""
    kind: type[nn.Module] = type(module)
    if kind.forward is not _FORWARDS.get(kind):
        return None
    return View("flatten", (module.start_dim, module.end_dim)) if isinstance(module, nn.Flatten) else View("identity")


def settings_of_module(module: nn.Module) -> tuple[Settings, ...]:
    """The attributes that its view is made of."""
    return (Settings(module, ("start_dim", "end_dim")),) if isinstance(module, nn.Flatten) else ()
