"""Work on an ``onnx.GraphProto``: what reads what, names, nodes put in and taken out."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_values_after_modules(graph: Any, modules: Iterable[str]) -> None:
    """Gives the value that a module returns the module's qualified name: the codes of a layer are found by its name.

    Of a module that is called several times, the last call's value gets the name. Inputs and outputs of the model keep
    theirs.
    """
    wanted = set(modules) - {""}
    returned: dict[str, str] = {}
    for node in graph.node:
        for scope in scopes_of(node):
            if scope in wanted:
                returned[scope] = node.output[0]
    fixed = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    names: dict[str, str] = {}
    for module, value in returned.items():
        if module not in fixed and value not in fixed:
            names.setdefault(value, module)  # of a module and one inside it, the outer, which was entered first
    _rename(graph, names)


def remove_notes(model: Any) -> None:
    """Takes out what torch.onnx notes for debugging (stack traces among it), often more bytes than small weights."""
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
        value.ClearField("doc_string")
    del model.graph.value_info[:]  # shapes of inner values, which every engine works out by itself


def scopes_of(node: Any) -> list[str]:
    """The modules that a node was made in, from the outermost."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return list(ast.literal_eval(entry.value))[:-1]  # the last is the node itself
    return []


def consumers_of(graph: Any) -> dict[str, list[tuple[Any, int]]]:
    """For each value, the nodes that read it, with the positions."""
    found: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in graph.node:
        for position, name in enumerate(node.input):
            found[name].append((node, position))
    return found


def remove_unread(graph: Any) -> None:
    """Takes out nodes and initializers whose values nothing reads."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            read.update(node.input)
            nodes.append(node)
    replace_nodes(graph, nodes[::-1])
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Gives values new names; what bears one of them by chance makes way."""
    wanted = set(names.values())
    unused = UnusedNames(graph, wanted)
    taken = {value for node in graph.node for value in node.output if value in wanted and value not in names}
    mapping = {value: unused.unused(value) for value in taken} | dict(names)
    for node in graph.node:
        for values in (node.input, node.output):
            for position, value in enumerate(values):
                values[position] = mapping.get(value, value)


def copy_of_node(node: Any, names: UnusedNames) -> Any:
    """A node that computes the same under another name."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.name = names.unused(node.name)
    copy.output[0] = names.unused(node.output[0])
    return copy


def replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Makes these, in their order, the graph's nodes."""
    copies = [type(node)() for node in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


class UnusedNames:
    """Names that no node and no value of a graph bears.

    Args:
        graph: the graph.
        reserved: further names that are not to be given.
    """

    def __init__(self, graph: Any, reserved: Iterable[str] = ()) -> None:
        self._taken = {*reserved, *(value.name for value in (*graph.input, *graph.output, *graph.initializer))}
        for node in graph.node:
            self._taken.update((node.name, *node.output))

    def like(self, wanted: str) -> str:
        """This name, or where it is taken one like it; taken from now on."""
        if wanted in self._taken:
            return self.unused(wanted)
        self._taken.add(wanted)
        return wanted

    def unused(self, wanted: str) -> str:
        """A name like this one with a number, taken from now on."""
        number = 1
        while f"{wanted}_{number}" in self._taken:
            number += 1
        self._taken.add(f"{wanted}_{number}")
        return f"{wanted}_{number}"
