"""Operations that change a tensor in place, in a graph where values pass from node to node only."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from .containers import readers
from .example_run import StorageRecorder, copies, failure, placeholder_values, state_kept
from .nodes import owners_of

_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def change_through_view(model: nn.Module, graph: fx.Graph, arguments: dict[str, Any]) -> tuple[str, str] | None:
    """The module whose code changes a tensor of which another node is a view that is read later, and the reason that
    it cannot be traced: in a graph, values pass from node to node only."""
    if not any(is_in_place(model, node) for node in graph.nodes):
        return None
    recorder = StorageRecorder(model, graph)
    try:
        with state_kept(model):
            recorder.run(*copies(placeholder_values(graph, arguments)))
    except Exception as error:
        return failure(recorder, error)
    storages = recorder.storages
    order = {node: index for index, node in enumerate(graph.nodes)}
    # A change's result stands for the node it changes, and is what later readers of either will read.
    stands_for: dict[fx.Node, fx.Node] = {}
    for change in graph.nodes:
        changed = _changed_by(model, change)
        if changed is None or not storages[changed]:
            continue
        stands_for[change] = stands_for.get(changed, changed)
        aliases = {
            node: [user for user in readers(node) if order[user] > order[change]]
            for node in graph.nodes
            if order[node] < order[change] and storages[node] & storages[changed]
        }
        if any(readers for node, readers in aliases.items() if stands_for.get(node, node) is not stands_for[change]):
            for owner in reversed(owners_of(change)):
                # Outside of the module that is kept whole, no one may hold what it changes.
                if all(
                    owner in owners_of(node) or all(owner in owners_of(reader) for reader in readers)
                    for node, readers in aliases.items()
                ):
                    return owner, "it changes a tensor in place through a view"
    return None


def route_through_in_place_operations(model: nn.Module, graph: fx.Graph) -> None:
    """Whoever reads a tensor after an operation changed it in place reads that operation's result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = _changed_by(model, node)
        if changed is not None and "tensor" in changed.meta:
            changed.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023


def _changed_by(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose value an operation changes in place; None where it changes nothing."""
    changed = node.args[0] if node.args else node.kwargs.get("input")
    return changed if isinstance(changed, fx.Node) and is_in_place(model, node) else None


def is_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node says of itself that it changes its first operand."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    return (
        node.target in _IN_PLACE_OPERATORS
        or bool(node.kwargs.get("inplace"))
        or getattr(node.target, "__name__", "").endswith("_")
    )
