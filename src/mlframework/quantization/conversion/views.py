"""Which nodes of a graph are views with fixed numbers, which programs know."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph.containers import readers
from ..int8.views import View

_FUNCTIONS: dict[Any, str] = {
    torch.flatten: "flatten",
    torch.transpose: "transpose",
    torch.permute: "permute",
    torch.reshape: "reshape",
    torch.chunk: "chunk",
}
# The names of the arguments besides the tensor, and what they are where they are left out.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "flatten": {"start_dim": 0, "end_dim": -1},
    "transpose": {"dim0": None, "dim1": None},
    "unflatten": {"dim": None, "sizes": None},
    "chunk": {"chunks": None, "dim": 0},
}


def view_of_call(node: fx.Node) -> View | None:
    """What a call of a function or a method of a tensor is that does nothing else.

    A division into parts is the tensor that it divides, where all that read it take one part each; they do the rest.
    """
    if node.target is operator.getitem:
        return _item(node)
    name, numbers = _name_and_numbers(node)
    if name == "chunk":
        takes_parts = all(reader.target is operator.getitem and _item(reader) is not None for reader in readers(node))
        return View("identity") if numbers is not None and takes_parts else None
    return None if numbers is None else View(name, numbers)


def _name_and_numbers(node: fx.Node) -> tuple[str, tuple[int, ...] | None]:
    """A view's name, and its arguments one after the other; None for these where they are no fixed numbers."""
    name = str(node.target) if node.op == "call_method" else _FUNCTIONS.get(node.target, "")
    if name in ("permute", "reshape") and not node.kwargs:
        given = list(node.args[1:])
    elif name in _ARGUMENTS:
        defaults = _ARGUMENTS[name]
        if not set(node.kwargs) <= set(defaults) or len(node.args) - 1 > len(defaults):
            return name, None
        given = list({**defaults, **dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}.values())
    else:
        return name, None
    flat = [number for each in given for number in (each if isinstance(each, (tuple, list)) else (each,))]
    return name, tuple(flat) if all(type(number) is int for number in flat) else None


def _item(node: fx.Node) -> View | None:
    """One part of a division, or one index along one axis."""
    source, index = node.args
    if isinstance(source, fx.Node) and source.op in ("call_function", "call_method"):
        name, numbers = _name_and_numbers(source)
        if name == "chunk":
            return (
                View("part", (index, *numbers)) if numbers is not None and type(index) is int and index >= 0 else None
            )
    places = index if isinstance(index, tuple) else (index,)
    axes = [axis for axis, place in enumerate(places) if place != slice(None)]
    if len(axes) != 1 or type(places[axes[0]]) is not int:
        return None
    return View("select", (axes[0], places[axes[0]]))  # type: ignore[arg-type]
