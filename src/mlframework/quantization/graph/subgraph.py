"""A few nodes of a graph as a module of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from torch import fx, nn

from .generated_forward import set_forward


def module_of_nodes(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module that takes the values of ``inputs`` and computes the last of ``nodes``.

    In a module of several nodes, what they do in place they do out of place: others may read what they would change.

    Args:
        nodes: in the order of their graph; they read ``inputs`` and one another.
        inputs: nodes whose values become arguments.
        modules: what the nodes call, by target; a lone call of a module on the inputs is that module itself.
    """
    if len(nodes) == 1 and nodes[0].op == "call_module" and nodes[0].args == tuple(inputs) and not nodes[0].kwargs:
        return modules[str(nodes[0].target)]
    root, graph = nn.Module(), fx.Graph()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
    for node in nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        own = {}
        if getattr(module, "inplace", False):  # the user's module itself is called, for its hooks: on a copy
            own = {read: graph.call_method("clone", (copies[read],)) for read in node.all_input_nodes}
        copies[node] = graph.node_copy(node, {**copies, **own}.__getitem__)
        if module is not None:
            name = f"module_{len(root._modules)}"
            root.add_module(name, module)
            copies[node].target = name
        elif node.op == "call_function":
            _change_nothing(copies[node])
    graph.output(copies[nodes[-1]])
    set_forward(root, graph)
    return root


def _change_nothing(node: fx.Node) -> None:
    """Has a function that can work in place work out of place."""
    try:
        call = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return  # a built-in function, which has no such argument
    if "inplace" in call.arguments:
        call.arguments["inplace"] = False
        node.args, node.kwargs = call.args, call.kwargs
