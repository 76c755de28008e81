"""From a flat graph with marks to forwards: one for the model, and one for every container that it calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from torch import fx, nn

from .containers import Call, calls_in, nodes_of
from .generated_forward import Edge, FlatForm, Variant, set_forward
from .nodes import add_module, label_of
from .signatures import VARIANT, Given, given_arguments
from .values import built, node_at, parts_of, with_parts


class Edges(Protocol):
    """What stands at the edges of a container between integer codes and the floats that they stand for."""

    def quantize(self, node: fx.Node) -> nn.Module | None:
        """A module that makes a node's codes of floats; None where the node's value is no codes."""

    def dequantize(self, node: fx.Node) -> nn.Module:
        """A module that makes floats of a node's codes."""


def set_forwards(
    root: nn.Module,
    graph: fx.Graph,
    given: Sequence[Given],
    *,
    edges: Edges | None = None,
    runs_own_code: bool = True,
    reads: Mapping[str, Collection[str]] | None = None,
    flat: FlatForm | None = None,
) -> None:
    """Gives ``root`` and the containers called in its graph the forwards that the graph describes.

    A container is called as a module with the arguments that its marks say, which its hooks see. One that shares more
    with its surroundings than arguments and results runs as part of them, without being called.

    Args:
        root: the model; its containers get their forwards in place.
        graph: of calls with marks, which it loses. Targets are names in ``root``.
        given: what the model itself is called with.
        edges: where the graph passes codes: a container takes and returns floats when it is called by anyone else, or
            has hooks.
        runs_own_code: see :func:`.generated_forward.set_forward`.
        reads: the plain attributes that the code of each container has read, by the container's name.
        flat: another form of the graph.
    """
    tree = calls_in(graph)
    while _dissolve(root, tree):
        pass
    emitter = _Emitter(root, edges)
    emitter.emit(tree, given)
    read_of = {root.get_submodule(name): names for name, names in (reads or {}).items()}
    for module, variants in emitter.variants.items():
        set_forward(
            module,
            variants,
            runs_own_code=runs_own_code,
            is_part=module is root,
            reads=read_of.get(module, ()),
            flat=flat if module is root else None,
        )


def _dissolve(root: nn.Module, call: Call) -> bool:
    """Has what cannot be called as a module run as part of what calls it; whether there was any."""
    items: list[fx.Node | Call] = []
    changed = False
    for item in call.items:
        if isinstance(item, Call):
            changed = _dissolve(root, item) or changed
            if not _stands_alone(root, item):
                items.extend(item.items)
                for mark in (item.first, item.last):
                    if mark is not None:
                        mark.graph.erase_node(mark)
                changed = True
                continue
        items.append(item)
    call.items = items
    return changed


def _stands_alone(root: nn.Module, call: Call) -> bool:
    """Whether a call exchanges with its surroundings what it is given and what it returns, and nothing else."""
    module = root.get_submodule(call.name)
    try:
        arguments = call.arguments(module)
    except TypeError:  # what a signature was bound to while tracing is not what the class has
        return False
    nodes = dict.fromkeys(nodes_of(call))
    given = {part for value in arguments.values() for _, part in parts_of(value) if isinstance(part, fx.Node)}
    returned = {part for _, part in call.parts_returned}
    for node in nodes:
        if any(read not in nodes and read not in given for read in node.all_input_nodes):
            return False
        if node not in returned and any(user not in nodes for user in node.users):
            return False
        if node.op in ("call_module", "get_attr") and _name_inside(root, call.name, str(node.target)) is None:
            return False
    return True


def _name_inside(root: nn.Module, container: str, target: str) -> str | None:
    """The name that something in ``root`` has in one of its containers; None where it has none."""
    if not container:
        return target
    if target.startswith(f"{container}."):
        return target[len(container) + 1 :]
    inner = root.get_submodule(container)
    owner, _, last = target.rpartition(".")
    wanted = getattr(root.get_submodule(owner), last)
    if isinstance(wanted, nn.Module):
        named: Iterator[tuple[str, Any]] = inner.named_modules()
    else:
        named = chain(inner.named_parameters(remove_duplicate=False), inner.named_buffers(remove_duplicate=False))
    return next((name for name, other in named if other is wanted and name), None)


@dataclass
class _Emitter:
    """Makes graphs: for each container the variants in which it is called.

    Attributes:
        variants: by module, in the order of their numbers; number 0 is for anyone to call.
        numbers: of the variants that calls use.
    """

    root: nn.Module
    edges: Edges | None
    variants: dict[nn.Module, list[Variant]] = field(default_factory=dict)
    numbers: dict[Call, int] = field(default_factory=dict)

    def emit(self, call: Call, given: Sequence[Given]) -> None:
        """Makes the graphs of a call, after those of the calls in it."""
        for item in call.items:
            if isinstance(item, Call):
                self.emit(item, ())
        if call.first is None:
            self._add(call, Variant(self._graph(call, floats=False)[0], tuple(given)))
            return
        arguments = call.arguments(self.root.get_submodule(call.name))
        given = given_arguments(arguments, lambda part: isinstance(part, fx.Node))
        floats, modules = self._graph(call, floats=True)
        number = self._add(call, Variant(floats, given))
        if modules:
            entries = self._edges(call.given, modules, "quantize")
            exits = self._edges(call.returned, modules, "dequantize")
            self._add(call, Variant(self._graph(call, floats=False)[0], given, number, entries, exits))

    def _add(self, call: Call, variant: Variant) -> int:
        variants = self.variants.setdefault(self.root.get_submodule(call.name), [])
        alike = (number for number, other in enumerate(variants) if other.alike(variant))
        number = self.numbers[call] = next(alike, len(variants))
        if number == len(variants):
            variants.append(variant)
        return number

    def _graph(self, call: Call, floats: bool) -> tuple[fx.Graph, dict[tuple[str, fx.Node], str]]:
        """The graph of a call; and with ``floats``, in which codes have no part in what it is given and returns, the
        modules at its edges, by what they do and of which node."""
        graph = fx.Graph()
        graph._graph_namespace.create_name("self", None)  # which a submodule may be called
        env: dict[fx.Node, fx.Node] = {}
        edges: dict[tuple[str, fx.Node], str] = {}
        if call.first is not None:
            self._add_placeholders(call, graph, env)
            for node in list(env) if floats else ():
                name = self._edge(call, "quantize", node)
                if name is not None:
                    edges["quantize", node] = name
                    env[node] = graph.call_module(name, (env[node],))
        for item in call.items:
            if isinstance(item, Call):
                self._call(call, item, graph, env)
                continue
            copied = env[item] = graph.node_copy(item, env.__getitem__)
            if item.op in ("call_module", "get_attr"):
                copied.target = self._inside(call, str(item.target))
        if call.last is not None:
            result = dict(env)
            for _, node in call.parts_returned if floats else ():
                name = self._edge(call, "dequantize", node)
                if name is not None:
                    edges["dequantize", node] = name
                    result[node] = graph.call_module(name, (env[node],))
            graph.output(built(graph, _mapped(call.returned, result)))
        return graph, edges

    def _add_placeholders(self, call: Call, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
        arguments = call.arguments(self.root.get_submodule(call.name))
        read = {node for each in nodes_of(call) for node in each.all_input_nodes}
        parts = [(name, path, part) for name, value in arguments.items() for path, part in parts_of(value)]
        parts = [(name, path, part) for name, path, part in parts if isinstance(part, fx.Node) and part in read]
        used = {name for name, _, _ in parts}
        placeholders = {name: graph.placeholder(name) for name in arguments if name in used}
        for name, path, part in parts:
            if part not in env:
                env[part] = node_at(graph, placeholders[name], path)

    def _call(self, outer: Call, call: Call, graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
        """Calls a container in the graph of the one around it."""
        args, kwargs = call.given
        kwargs.pop(VARIANT, None)
        if self.numbers[call]:
            kwargs[VARIANT] = self.numbers[call]
        values = [built(graph, _mapped(value, env)) for value in args]
        named = {key: built(graph, _mapped(value, env)) for key, value in kwargs.items()}
        result = graph.call_module(self._inside(outer, call.name), tuple(values), named)
        inside = set(nodes_of(call))
        for path, part in call.parts_returned:
            if part in inside and part not in env and any(user not in inside for user in part.users):
                env[part] = node_at(graph, result, path)

    def _inside(self, call: Call, target: str) -> str:
        name = _name_inside(self.root, call.name, target)
        assert name is not None
        return name

    def _edge(self, call: Call, kind: str, node: fx.Node) -> str | None:
        """Adds a module to a container; returns its name there, or None where the node's value is no codes."""
        module = None if self.edges is None else self.edges.quantize(node)
        if module is None or self.edges is None:
            return None
        module = module if kind == "quantize" else self.edges.dequantize(node)
        return add_module(self.root.get_submodule(call.name), "", f"{label_of(node)}_{kind}", module)

    def _edges(self, value: Any, modules: Mapping[tuple[str, fx.Node], str], kind: str) -> tuple[Edge, ...]:
        parts = [(path, part) for path, part in parts_of(value) if isinstance(part, fx.Node)]
        return tuple(Edge(path, modules[kind, part]) for path, part in parts if (kind, part) in modules)


def _mapped(value: Any, env: Mapping[fx.Node, fx.Node]) -> Any:
    return with_parts(value, lambda path, part: env[part] if isinstance(part, fx.Node) else part)
