"""The parts of what a module takes or returns: where each lies, and how to reach it."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, fx

# How to get from a value to one of its parts: items of sequences and dictionaries, fields of dataclasses.
Step = tuple[str, Any]
Path = tuple[Step, ...]


def parts_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What tuples, lists, dictionaries and dataclasses hold, with the path to each; a value of another kind itself."""
    for step, part in children_of(value) or ():
        yield from parts_of(part, (*path, step))
    if children_of(value) is None:
        yield path, value


def children_of(value: Any) -> list[tuple[Step, Any]] | None:
    """The immediate parts of a value, with the step to each; None where it is a part itself."""
    if isinstance(value, (tuple, list)):
        return [(("item", index), part) for index, part in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(("field", field.name), getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, dict):
        return [(("item", key), part) for key, part in value.items()]
    return None


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors among the parts of a value, in order."""
    return [part for _, part in parts_of(value) if isinstance(part, Tensor)]


def with_tensors(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """The same structure with what ``replace`` makes of every tensor."""
    return with_parts(value, lambda path, part: replace(part) if isinstance(part, Tensor) else part)


def node_at(graph: fx.Graph, node: fx.Node, path: Path) -> fx.Node:
    """Calls in ``graph`` that get the part of a node's value."""
    for kind, name in path:
        node = graph.call_function(operator.getitem if kind == "item" else getattr, (node, name))
    return node


def with_parts(value: Any, replace: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same structure with other parts, in lists and dictionaries of its own."""
    children = children_of(value)
    if children is None:
        return replace(path, value)
    parts = [(step, with_parts(part, replace, (*path, step))) for step, part in children]
    if isinstance(value, (tuple, list)):
        items = [part for _, part in parts]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    names = {step[1]: part for step, part in parts}
    if is_dataclass(value):
        kind: Any = type(value)
        return kind(**names)
    return OrderedDict(names) if isinstance(value, OrderedDict) else dict(names)


def built(graph: fx.Graph, value: Any) -> Any:
    """A value that holds nodes as an argument for a node: calls in ``graph`` make what fx has no form for."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return graph.call_function(type(value), tuple(built(graph, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(built(graph, part) for part in value)
    children = children_of(value)
    if children is None:
        return value
    parts = {name: built(graph, part) for (_, name), part in children}
    if is_dataclass(value):
        return graph.call_function(type(value), (), parts)
    return graph.call_function(OrderedDict, (list(parts.items()),)) if isinstance(value, OrderedDict) else parts


def create_argument(tracer: fx.Tracer, a: Any) -> Any:
    """``Tracer.create_arg``, which takes dictionaries of other classes (an ``OrderedDict``, a result of Hugging Face's
    ``transformers``) for plain ones."""
    if isinstance(a, dict) and is_dataclass(a):
        values = {field.name: tracer.create_arg(getattr(a, field.name)) for field in fields(a)}
        return tracer.create_node("call_function", type(a), (), values)
    if isinstance(a, OrderedDict):
        return tracer.create_node("call_function", OrderedDict, (tracer.create_arg(list(a.items())),), {})
    return fx.Tracer.create_arg(tracer, a)
