"""Work on an ``onnx_ir`` graph: names of values that are told apart by them, and what a file is written without.

What reads and what makes a value, the values themselves tell; nodes that nothing reads are ``onnx_ir``'s own pass.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_values_after_modules(model: ir.Model, modules: Iterable[str]) -> None:
    """Gives the value that a module returns the module's qualified name: the codes of a layer are found by its name.

    Of a module that is called several times, the last call's value gets the name. Inputs and outputs of the model keep
    theirs.
    """
    graph = model.graph
    wanted = set(modules) - {""}
    returned: dict[str, ir.Value] = {}
    for node in graph:
        for scope in scopes_of(node):
            if scope in wanted:
                returned[scope] = node.outputs[0]
    fixed = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    names: dict[ir.Value, str] = {}
    for module, value in returned.items():
        if module not in fixed and not value.is_graph_output():
            names.setdefault(value, module)  # of a module and one inside it, the outer, which was entered first
    _rename(graph, names)


def remove_notes(model: ir.Model) -> None:
    """Takes out what torch.onnx notes for debugging (stack traces among it), often more bytes than small weights."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)  # of the graph and its nodes
    graph = model.graph
    values = [value for node in graph for value in node.outputs]
    model.metadata_props.clear()
    model.doc_string = None
    for value in (*graph.inputs, *graph.initializers.values(), *values):
        value.metadata_props.clear()
        value.doc_string = None
    forget_types(model)


def forget_types(model: ir.Model) -> None:
    """Takes out types and shapes of inner values, which every engine works out by itself."""
    values = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.initializers.values(), *values):
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None


def remove_unread(model: ir.Model) -> None:
    """Takes out nodes and initializers whose values nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def scopes_of(node: ir.Node) -> list[str]:
    """The modules that a node was made in, from the outermost."""
    # The last is the node itself.
    return list(ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")))[:-1]


def input_of(node: ir.Node, position: int = 0) -> ir.Value:
    """What a node reads, which is none of the inputs that may be left out."""
    value = node.inputs[position]
    assert value is not None
    return value


def array_of(value: ir.Value) -> Any:
    """The values of an initializer."""
    assert value.const_value is not None
    return value.const_value.numpy()


def add_initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """A constant of a graph, of a name that it does not have yet."""
    from onnx_ir import Value, tensor

    value = Value(name=name, const_value=tensor(array, name=name))
    graph.initializers.add(value)
    return value


def maker_of(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that makes a value, where it is of that kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each as often as it does."""
    return [reader for reader, _ in value.uses()]


def copy_after(node: ir.Node, last: ir.Node, names: UnusedNames) -> ir.Node:
    """A node that computes the same, under another name and behind ``last``."""
    from onnx_ir import Node, Value

    made = Value(name=names.unused(str(node.outputs[0].name)))
    copy = Node(node.domain, node.op_type, node.inputs, node.attributes, outputs=[made])
    last.append(copy)
    return copy


def _rename(graph: ir.Graph, names: Mapping[ir.Value, str]) -> None:
    """Gives values new names; what bears one of them by chance makes way.

    (``NameFixPass`` would leave the name to whichever of two comes first.)
    """
    wanted = set(names.values())
    unused = UnusedNames(graph, wanted)
    for node in graph:
        for value in node.outputs:
            if value in names:
                value.name = names[value]
            elif value.name in wanted:
                value.name = unused.unused(value.name)


class UnusedNames:
    """Names that no value of a graph bears.

    Args:
        graph: the graph.
        reserved: further names that are not to be given.
    """

    def __init__(self, graph: ir.Graph, reserved: Iterable[str] = ()) -> None:
        from onnx_ir.convenience import create_value_mapping

        self._taken = {*reserved, *create_value_mapping(graph)}

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
