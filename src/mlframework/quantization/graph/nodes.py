"""Small questions about the nodes of a graph."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx, nn


def create_argument(tracer: fx.Tracer, a: Any) -> Any:
    """``Tracer.create_arg``, which takes a dictionary that is a dataclass as well (a result of Hugging Face's
    ``transformers``) for a plain one."""
    if isinstance(a, dict) and is_dataclass(a):
        values = {field.name: tracer.create_arg(getattr(a, field.name)) for field in fields(a)}
        return tracer.create_node("call_function", type(a), (), values)
    return fx.Tracer.create_arg(tracer, a)


# What asks a tensor for its form alone, as a method or as an attribute.
SHAPE_QUERIES = frozenset({"size", "dim", "numel", "shape", "ndim"})


def is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith("_tensor_constant")


def owner_of(node: fx.Node) -> str:
    """The innermost module whose code made the node."""
    return owners_of(node)[-1]


def owners_of(node: fx.Node) -> list[str]:
    """The modules whose code led to the node, from the model itself (the empty name) to the innermost."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()]
    if node.op == "call_module":  # the module called is on the stack as well
        names = [name for name in names if name != node.target]
    return ["", *names]


def unused_name(model: nn.Module, wanted: str) -> str:
    """``wanted``, or with a number behind it where the model has an attribute of that name."""
    name, number = wanted, 0
    while hasattr(model, name):
        number += 1
        name = f"{wanted}_{number}"
    return name
