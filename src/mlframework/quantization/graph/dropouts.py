"""Dropout called as a function: its probability and its flag are those of the moment it was traced."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .nodes import add_module, owner_of

_MODULES: dict[Any, type[nn.Module]] = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d}

_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AttentionWithDropout(nn.Module):
    """``scaled_dot_product_attention`` whose dropout follows the mode.

    Args:
        p: the probability in training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, **options)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def arguments_besides_dropout(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments without what may differ between the modes because the node drops out."""
    if node.target in _MODULES:
        return node.args[:1], {name: value for name, value in node.kwargs.items() if name == "input"}
    if node.target is F.scaled_dot_product_attention:
        return (), _without(_attention_arguments(node), "dropout_p")
    return node.args, dict(node.kwargs)


def modules_for_dropouts(model: nn.Module, graph: fx.Graph, training: fx.Graph) -> list[str]:
    """Puts modules, which follow the mode, wherever ``graph`` calls a dropout as a function that does; returns their
    names.

    Args:
        training: the graph of training mode, node for node: code often passes a probability of 0 in evaluation.
    """
    names = []
    for node, twin in zip(list(graph.nodes), list(training.nodes), strict=True):
        if node.op != "call_function" or _drops_out(node):
            continue
        module: nn.Module
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        if node.target in _MODULES:
            module = _MODULES[node.target](twin.kwargs.get("p", twin.args[1] if len(twin.args) > 1 else 0.5))
            args, kwargs = (node.args[0] if node.args else node.kwargs["input"],), {}
        elif node.target is F.scaled_dot_product_attention and _attention_arguments(twin).get("dropout_p", 0) != 0:
            module = AttentionWithDropout(_attention_arguments(twin)["dropout_p"])
            args, kwargs = (), _without(_attention_arguments(node), "dropout_p")
        else:
            continue
        name = add_module(model, owner_of(node), node.name, module)
        names.append(name)
        with graph.inserting_after(node):
            call = graph.call_module(name, args, kwargs)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return names


def _drops_out(node: fx.Node) -> bool:
    """Whether the node drops out although its graph is that of evaluation."""
    return node.target in _MODULES and bool(node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True))


def _attention_arguments(node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_ATTENTION_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _without(arguments: dict[str, Any], left_out: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != left_out}
