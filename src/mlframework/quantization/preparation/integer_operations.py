"""Which operations of a graph have an integer form of their own, and on which operands."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..int8.average_pooling import Mean
from ..int8.integer_operation import IntegerOperation
from ..int8.pooling_windows import ADAPTIVE_POOLS, FIXED_POOLS
from ..targets import Operations
from . import operations

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLIES = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}
_CONCATS = {torch.cat, torch.concat, torch.concatenate}
_MEANS = {torch.mean, "mean"}

# Average poolings called as functions, as the modules that they stand for.
_POOLS: dict[Any, type[nn.Module]] = {
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
}

Call = tuple[IntegerOperation, tuple[fx.Node, ...]]


def integer_operation(node: fx.Node, modules: Mapping[str, nn.Module], forms: Operations) -> Call | None:
    """The integer form of a node, of those that the engine has, and its operands; None where there is none."""
    if not operations.is_float_tensor(node):
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) not in (*ADAPTIVE_POOLS, *FIXED_POOLS) or len(node.args) != 1:
            return None
        return forms.average_pooling(module), (node.args[0],)  # type: ignore[arg-type, return-value]
    if node.op not in ("call_function", "call_method"):
        return None
    call: Call | None = None
    args: tuple[Any, ...] = node.args
    kwargs: dict[str, Any] = node.kwargs
    if node.target in _ADDS | _MULTIPLIES and len(args) == 2 and not kwargs:
        call = forms.addition() if node.target in _ADDS else forms.multiplication(), args
    elif node.target in _CONCATS and args:
        call = _concatenation(forms, *args, **kwargs)
    elif node.target in _POOLS:
        call = _pooling(forms, node)
    elif node.target in _MEANS and args:
        call = _mean(forms, *args, **kwargs)
    if call is None or not all(
        isinstance(operand, fx.Node) and operations.is_float_tensor(operand) for operand in call[1]
    ):
        return None
    return call


def _concatenation(forms: Operations, tensors: Any, dim: int = 0, **others: Any) -> Call | None:
    if others or not isinstance(dim, int) or not isinstance(tensors, (tuple, list)):
        return None
    return forms.concatenation(dim), tuple(tensors)


def _pooling(forms: Operations, node: fx.Node) -> Call | None:
    first, *rest = node.args or (node.kwargs.get("input"),)
    settings = {name: value for name, value in node.kwargs.items() if name != "input"}
    if node.all_input_nodes != [first]:  # its settings are computed
        return None
    return forms.average_pooling(_POOLS[node.target](*rest, **settings)), (first,)  # type: ignore[arg-type, return-value]


def _mean(forms: Operations, input: Any, dim: Any = None, keepdim: Any = False, **others: Any) -> Call | None:
    dims = (dim,) if isinstance(dim, int) else dim
    if others or not isinstance(keepdim, bool) or not isinstance(dims, (tuple, list)):
        return None
    if not dims or not all(isinstance(entry, int) for entry in dims):
        return None
    return forms.average_pooling(Mean(tuple(dims), keepdim)), (input,)
