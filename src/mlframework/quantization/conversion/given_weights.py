"""Weights that a model's graph computes or reads by name: integer layers hold them, and the graph no longer does."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from ..graph.fixed_values import computing_nodes, evaluated
from ..qat.given_weight import GivenWeightWrapper


def take_weights_in(root: nn.Module, graph: fx.Graph) -> list[Tensor]:
    """Evaluates the weights and biases that wrappers are called with, hands them over, and erases what computed them.

    Returns:
        The parameters and buffers that were read for this, to be given to :func:`drop_unread`.
    """
    modules = dict(root.named_modules())
    computing: dict[fx.Node, None] = {}
    for node in graph.nodes:
        wrapper = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(wrapper, GivenWeightWrapper):
            continue
        nodes = dict.fromkeys(step for given in node.args[1:] for step in computing_nodes(given))
        values = evaluated(sorted(nodes), modules)
        wrapper.keep(*(values[given] for given in node.args[1:]))
        node.args = node.args[:1]
        computing.update(nodes)
    read = []
    for node in reversed(list(graph.nodes)):
        if node in computing and not node.users:
            if node.op == "get_attr":
                read.append(evaluated([node], modules)[node])
            graph.erase_node(node)
    return read


def drop_unread(root: nn.Module, graph: fx.Graph, tensors: Iterable[Tensor]) -> None:
    """Takes those of the tensors out of the model that no node of the graph and no module that it calls reads."""
    modules = dict(root.named_modules())
    kept = {id(value) for node in graph.nodes if node.op == "get_attr" for value in evaluated([node], modules).values()}
    for name in {str(node.target) for node in graph.nodes if node.op == "call_module"}:
        called = root.get_submodule(name)
        kept |= {id(tensor) for tensor in (*called.parameters(), *called.buffers())}
    dropped = {id(tensor) for tensor in tensors} - kept
    for module in modules.values():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if id(tensor) in dropped:
                    registry[name] = None
