"""Regions of a graph that are functions of one tensor, element by element: on codes, each is a table."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import operations

# Continuous (a rounding before must not decide what comes out), and finite for every finite argument, or infinite with
# a sign, which saturates.
_MODULES = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
_FUNCTIONS: set[Any] = {
    F.celu,
    F.elu,
    F.gelu,
    F.hardsigmoid,
    F.hardswish,
    F.hardtanh,
    F.leaky_relu,
    F.logsigmoid,
    F.mish,
    F.relu,
    F.relu6,
    F.selu,
    F.sigmoid,
    F.silu,
    F.softplus,
    F.softshrink,
    F.softsign,
    F.tanh,
    F.tanhshrink,
    abs,
    operator.abs,
    operator.neg,
    operator.pos,
    torch.abs,
    torch.clamp,
    torch.clip,
    torch.cos,
    torch.erf,
    torch.exp,
    torch.neg,
    torch.relu,
    torch.sigmoid,
    torch.sin,
    torch.square,
    torch.tanh,
    "abs",
    "clamp",
    "clip",
    "cos",
    "erf",
    "exp",
    "neg",
    "relu",
    "sigmoid",
    "sin",
    "square",
    "tanh",
}
_ARITHMETIC: set[Any] = {
    operator.add,
    operator.mul,
    operator.sub,
    torch.add,
    torch.mul,
    torch.multiply,
    torch.sub,
    "add",
    "mul",
    "sub",
}
_DIVISIONS: set[Any] = {operator.truediv, torch.div, torch.true_divide, "div", "true_divide"}
_POWERS: set[Any] = {operator.pow, torch.pow, "pow"}


class PointwiseRegion(NamedTuple):
    """Nodes in the order of their graph, the last of them the region's value; all is computed from ``source``."""

    nodes: tuple[fx.Node, ...]
    source: fx.Node


def pointwise_region(
    end: fx.Node, modules: Mapping[str, nn.Module], is_source: Callable[[fx.Node], bool]
) -> PointwiseRegion | None:
    """The region that ends at a node and begins at one value for which ``is_source`` holds; None where ``end`` is
    computed from several, or in other ways than element by element."""
    region: dict[fx.Node, None] = {}
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node in region or node in found:
            continue
        if node is not end and is_source(node):
            found.add(node)
            continue
        if not _is_pointwise(node, modules):
            return None
        region[node] = None
        pending.extend(node.all_input_nodes)
    if len(found) != 1:
        return None
    (source,) = found
    return PointwiseRegion(tuple(node for node in end.graph.nodes if node in region), source)


def _is_pointwise(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether each element of the node's value is a finite function of one element of what it reads."""
    if not operations.is_float_tensor(node) or not node.all_input_nodes:
        return False
    shape = node.meta["tensor"].shape
    if not all(
        operations.is_float_tensor(read) and read.meta["tensor"].shape == shape for read in node.all_input_nodes
    ):
        return False
    if node.op == "call_module":
        return type(modules[str(node.target)]) in _MODULES
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _FUNCTIONS:
        return len(node.all_input_nodes) == 1
    if node.target in _ARITHMETIC:
        return _are_operands(node.args, node.kwargs)
    if node.target in _DIVISIONS:
        return _are_operands(node.args, node.kwargs) and _is_number(node.args[1]) and bool(node.args[1])
    if node.target in _POWERS:
        return len(node.args) == 2 and isinstance(node.args[1], int | float) and node.args[1] in (2, 3, 4)
    return False


def _are_operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 2 and not kwargs and all(isinstance(arg, fx.Node) or _is_number(arg) for arg in args)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool) and math.isfinite(argument)
