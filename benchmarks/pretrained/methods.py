"""What the study compares: a method makes a quantized network from a float one, and from nothing but the study's data.

A method of this library is a function from a :class:`Task` to a prepared model, and a line in ``recipes.RECIPES``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from .protocol import Model, Study

OURS = "ours"


class Width(NamedTuple):
    """Bits of weights and of activations."""

    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"


@dataclass(frozen=True)
class Task:
    """What a method is asked for.

    Attributes:
        study: the network and its data.
        width: how many bits it gets.
        seed: of all that is drawn.
        seconds: how long it may train, of processor time.
        notes: what the method wants recorded beside its metrics, such as the number of steps.
    """

    study: Study
    width: Width
    seed: int
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to quantize.

    Attributes:
        package: whose, ``OURS`` or a peer's name; every library runs in a process of its own.
        quantize: makes a callable that takes the network's arguments; of this library, a prepared model.
        trains: whether it uses the budget, and comes out otherwise from another seed.
        distribution: the installed package whose version is recorded.
    """

    package: str
    quantize: Callable[[Task], Model]
    trains: bool = False
    distribution: str = "torch"

    @property
    def file(self) -> Path:
        """Where ``quantize`` is defined."""
        function = self.quantize.func if isinstance(self.quantize, partial) else self.quantize
        return Path(inspect.getfile(function))

    @property
    def version(self) -> str | None:
        """Of the library; None where it is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None


class Unsupported(Exception):
    """The library does not offer what was asked for; the message says what."""
