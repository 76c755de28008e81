"""Small questions about the nodes of a graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

# What asks a tensor for its form alone, as a method or as an attribute.
SHAPE_QUERIES = frozenset({"size", "dim", "numel", "shape", "ndim"})


# How the names begin that torch.fx gives to tensors made while tracing.
CONSTANT = "_tensor_constant"


def is_constant(node: fx.Node) -> bool:
    """Whether the node is a tensor that was made while tracing."""
    return node.op == "get_attr" and str(node.target).startswith(CONSTANT)


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


# An attribute of containers: the names of the modules that were added to them.
ADDED = "_modules_added"


def label_of(node: fx.Node) -> str:
    """What a node is called among what its module calls."""
    if node.op == "call_module":
        return str(node.target).rpartition(".")[2]
    return node.name if node.op == "placeholder" else re.sub(r"_\d+$", "", node.name)


def add_module(root: nn.Module, owner: str, wanted: str, module: nn.Module) -> str:
    """Adds a module to a container of ``root``, under the name that is wanted or one like it; returns the name that it
    has in ``root``."""
    container = root.get_submodule(owner)
    name = unused_name(container, wanted)
    put_module(container, name, module)
    return f"{owner}.{name}" if owner else name


def put_module(container: nn.Module, name: str, module: nn.Module) -> None:
    """Adds a module to a container under that name, and notes that it is not the user's."""
    container.add_module(name, module)
    vars(container).setdefault(ADDED, []).append(name)


@contextmanager
def without_added(root: nn.Module) -> Iterator[None]:
    """The modules of a model as its own code knows them: without those that were added."""
    removed = []
    for module in list(root.modules()):
        for name in vars(module).get(ADDED, ()):
            removed.append((module, dict(module._modules)))
            del module._modules[name]
    try:
        yield
    finally:
        for module, modules in reversed(removed):
            module._modules.clear()
            module._modules.update(modules)


def replace_module(root: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    """Puts a module in the place of another, under all the names that this has."""
    for name, present in list(root.named_modules(remove_duplicate=False)):
        if present is module:
            root.set_submodule(name, replacement)


def unused_name(model: nn.Module, wanted: str) -> str:
    """``wanted``, or with a number behind it where the model has an attribute of that name."""
    name, number = wanted, 0
    while hasattr(model, name):
        number += 1
        name = f"{wanted}_{number}"
    return name
