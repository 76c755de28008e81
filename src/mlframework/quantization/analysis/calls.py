"""Calls of a model: batches as its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..graph.example_run import copies
from ..preparation.batches import arguments_of

Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = list[Call]


def calls_of(model: nn.Module, batches: Iterable[Any], inputs: Callable[[Any], Any] | None = None) -> Calls:
    """Positional and keyword arguments of every batch, or of what ``inputs`` takes of it.

    Raises:
        TypeError: one does not fit the model's forward.
    """
    return [arguments_of(model, batch if inputs is None else inputs(batch)) for batch in batches]


def run(model: nn.Module, call: Call) -> Any:
    """What the model returns. It is given copies: a forward may change its arguments in place."""
    args, kwargs = call
    return model(*copies(args), **copies(kwargs))
