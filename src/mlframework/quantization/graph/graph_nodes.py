"""Graphs as plain data: what a generated forward is made of, kept beside it so that it can be written down."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket


class NodeValue(int):
    """In the arguments of a node, the value of the node of that number."""


class PlainNode(NamedTuple):
    """A node of a graph: numbers are references to earlier ones where they are a :class:`NodeValue`."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class GraphNodes:
    """The graphs of a forward, as plain data.

    Args:
        graphs: of each variant, the nodes.
        flat: of the form in which containers are not called.
        given_first: see :class:`.FlatForm`.
        guard: returns what the forward calls in the place of a function; None where it calls each as it is.
    """

    __slots__ = ("__weakref__", "flat", "given_first", "graphs", "guard")

    def __init__(
        self,
        graphs: tuple[tuple[PlainNode, ...], ...],
        flat: tuple[PlainNode, ...] | None = None,
        given_first: Callable[[nn.Module], tuple[Any, ...] | None] | None = None,
        guard: Callable[[Any], Any] | None = None,
    ) -> None:
        self.graphs, self.flat, self.given_first, self.guard = graphs, flat, given_first, guard

    def __deepcopy__(self, memo: Any) -> GraphNodes:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        graphs = tuple(map(_without_operators, self.graphs))
        return _rebuilt, (graphs, self.flat and _without_operators(self.flat), self.given_first, self.guard)


class _OperatorName(str):
    """Stands for one of ``torch.ops``, which do not pickle."""


def _without_operators(nodes: tuple[PlainNode, ...]) -> tuple[PlainNode, ...]:
    def named(node: PlainNode) -> PlainNode:
        is_operator = isinstance(node.target, (OpOverload, OpOverloadPacket))
        return node._replace(target=_OperatorName(node.target)) if is_operator else node

    return tuple(map(named, nodes))


def _rebuilt(
    graphs: tuple[tuple[PlainNode, ...], ...], flat: tuple[PlainNode, ...] | None, given: Any, guard: Any = None
) -> GraphNodes:
    def found(node: PlainNode) -> PlainNode:
        if not isinstance(node.target, _OperatorName):
            return node
        return node._replace(target=operator.attrgetter(node.target)(torch.ops))

    def with_operators(nodes: tuple[PlainNode, ...]) -> tuple[PlainNode, ...]:
        return tuple(map(found, nodes))

    return GraphNodes(tuple(map(with_operators, graphs)), flat and with_operators(flat), given, guard)


def plain(graph: fx.Graph) -> tuple[PlainNode, ...]:
    """The nodes of a graph, whose arguments hold :class:`NodeValue` for nodes."""
    number = {node: NodeValue(index) for index, node in enumerate(graph.nodes)}

    def stated(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return number[value]
        if isinstance(value, tuple):
            parts = [stated(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, list):
            return [stated(part) for part in value]
        if isinstance(value, dict):
            return {key: stated(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(stated(value.start), stated(value.stop), stated(value.step))
        return value

    return tuple(PlainNode(node.op, node.target, stated(node.args), stated(node.kwargs)) for node in graph.nodes)


def graph_from(nodes: tuple[PlainNode, ...], guard: Callable[[Any], Any] | None = None) -> fx.Graph:
    """The graph of plain nodes. Values get names of their own, placeholders those of their arguments.

    Args:
        guard: returns what is called in the place of a function.
    """
    graph = fx.Graph()
    graph._graph_namespace.create_name("self", None)  # which an argument of a submodule's may be called
    made: list[fx.Node] = []

    def built(value: Any) -> Any:
        if isinstance(value, NodeValue):
            return made[value]
        if isinstance(value, tuple):
            parts = [built(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, list):
            return [built(part) for part in value]
        if isinstance(value, dict):
            return {key: built(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(built(value.start), built(value.stop), built(value.step))
        return value

    for index, node in enumerate(nodes):
        name = node.target if node.op == "placeholder" else f"v{index}"
        target = guard(node.target) if guard is not None and node.op == "call_function" else node.target
        made.append(graph.create_node(node.op, target, built(node.args), built(node.kwargs), name=name))
    return graph


def placeholders_of(nodes: tuple[PlainNode, ...]) -> list[str]:
    """The names of a graph's arguments, in order."""
    return [node.target for node in nodes if node.op == "placeholder"]


def modules_called(nodes: tuple[PlainNode, ...]) -> Iterator[str]:
    """The names of the modules that a graph calls."""
    return (node.target for node in nodes if node.op == "call_module")
