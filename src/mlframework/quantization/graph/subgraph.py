"""A few nodes of a graph as a module of their own."""

from __future__ import annotations

import copy
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
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            name = f"module_{len(root._modules)}"
            root.add_module(name, _out_of_place(modules[str(node.target)]))
            copies[node].target = name
        elif node.op == "call_function":
            copies[node].args = tuple(False if argument is True else argument for argument in copies[node].args)
            copies[node].kwargs = {name: value for name, value in copies[node].kwargs.items() if name != "inplace"}
    graph.output(copies[nodes[-1]])
    set_forward(root, graph)
    return root


def _out_of_place(module: nn.Module) -> nn.Module:
    """The module, or one that has its hooks and settings and changes nothing in place."""
    if not getattr(module, "inplace", False):
        return module
    twin = copy.copy(module)
    twin.inplace = False  # type: ignore[assignment]
    return twin
