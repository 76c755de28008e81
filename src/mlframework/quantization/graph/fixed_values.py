"""What a graph computes from a model's own tensors alone, whatever its inputs: computed weights, and shapes."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .example_run import random_state_kept
from .nodes import SHAPE_QUERIES

# What shapes are computed with.
_ON_NUMBERS: set[Any] = {
    getattr, len, max, min, int, sum, tuple, math.ceil, math.floor, math.prod,
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
    operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.not_,
}  # fmt: skip


def computing_nodes(node: fx.Node) -> list[fx.Node]:
    """The node and everything that it is computed from, in the order of the graph."""
    found, pending = {node}, [node]
    while pending:
        operands = set(pending.pop().all_input_nodes) - found
        found |= operands
        pending.extend(operands)
    return sorted(found)


def is_fixed(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the node's value is a tensor computed from parameters and buffers alone, by operations that draw no
    random numbers in evaluation and change nothing in place."""
    nodes = computing_nodes(node)
    if not all(_is_fixed_step(step, modules) for step in nodes):
        return False
    if node.op == "get_attr":
        return True
    values = []
    for seed in (0, 1):
        with random_state_kept():
            torch.manual_seed(seed)
            values.append(evaluated(nodes, modules)[node])
    return all(isinstance(value, Tensor) for value in values) and torch.equal(*values)


def _is_fixed_step(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "get_attr":
        return True
    if not node.all_input_nodes:  # an input of the model, or a tensor made anew
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        return next(module.parameters(), None) is None and next(module.buffers(), None) is None
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    in_place = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
    return node.target not in in_place and not getattr(node.target, "__name__", "").endswith("_")


@torch.no_grad()
def evaluated(nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> dict[fx.Node, Any]:
    """The values of nodes in the order of their graph, which read no others; modules run as in evaluation."""
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            values[node] = getattr(modules[owner], name)
        elif node.op == "call_module":
            module = modules[str(node.target)]
            mode = module.training
            values[node] = module.eval()(*args, **kwargs)
            module.train(mode)
        elif node.op == "call_method":
            first, *rest = args
            values[node] = getattr(first, str(node.target))(*rest, **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def put_shapes_in(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Puts the shapes of parameters and buffers, and what is computed from them, into the graph as numbers: a question
    for a weight's shape must not keep the weight."""
    values: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if _asks_for_own_shape(node):
            values[node] = _plain(evaluated([node.all_input_nodes[0], node], modules)[node])
        elif _is_on_numbers(node, values):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = _plain(node.target(*args, **kwargs))
    for node in graph.nodes:
        if node not in values:
            node.args, node.kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda read: values.get(read, read))
    for node in reversed(list(graph.nodes)):
        if node in values:
            graph.erase_node(node)


def _asks_for_own_shape(node: fx.Node) -> bool:
    operands = node.all_input_nodes
    if len(operands) != 1 or operands[0].op != "get_attr":
        return False
    if node.op == "call_method":
        return node.target in SHAPE_QUERIES
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_QUERIES


def _is_on_numbers(node: fx.Node, known: Collection[fx.Node]) -> bool:
    operands = node.all_input_nodes
    return (
        node.op == "call_function"
        and node.target in _ON_NUMBERS
        and bool(operands)
        and all(operand in known for operand in operands)
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value
