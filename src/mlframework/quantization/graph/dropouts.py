"""Functions that are told the mode, dropout above all: in a trace, their flag is that of the moment it was taken."""

from __future__ import annotations

import functools
import inspect
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


class CalledByMode(nn.Module):
    """A function that takes ``training``, which follows the mode."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs, training=self.training)

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))


def arguments_besides_dropout(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments without what may differ between the modes because the node drops out."""
    if node.target in _MODULES:
        return node.args[:1], {name: value for name, value in node.kwargs.items() if name == "input"}
    if node.target is F.scaled_dot_product_attention:
        return (), _without(_attention_arguments(node), "dropout_p")
    if isinstance(_flag_of(node), bool):
        return (), _without(_bound(node), "training")
    return node.args, dict(node.kwargs)


def modules_for_dropouts(model: nn.Module, graph: fx.Graph, training: fx.Graph) -> list[str]:
    """Puts modules, which follow the mode, wherever ``graph`` calls a dropout as a function that does; returns their
    names.

    Args:
        training: the graph of training mode, node for node: code often passes a probability of 0 in evaluation.
    """
    names = []
    for node, twin in zip(list(graph.nodes), list(training.nodes), strict=True):
        if node.op != "call_function":
            continue
        module: nn.Module
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        follows = _flag_of(twin) is True and _flag_of(node) is False
        if node.target in _MODULES and follows:
            module = _MODULES[node.target](twin.kwargs.get("p", twin.args[1] if len(twin.args) > 1 else 0.5))
            args, kwargs = (node.args[0] if node.args else node.kwargs["input"],), {}
        elif node.target is F.scaled_dot_product_attention and _attention_arguments(twin).get("dropout_p", 0) != 0:
            module = AttentionWithDropout(_attention_arguments(twin)["dropout_p"])
            args, kwargs = (), _without(_attention_arguments(node), "dropout_p")
        elif follows:
            module, args, kwargs = CalledByMode(node.target), (), _without(_bound(node), "training")
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


def _flag_of(node: fx.Node) -> Any:
    """What a called function is told of the mode; None where it takes no such argument."""
    return _bound(node).get("training")


def _bound(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name; none where the function does not tell their names."""
    parameters = _parameters(node.target) if node.op == "call_function" else None
    if parameters is None or "training" not in parameters.parameters:
        return {}
    call = parameters.bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return dict(call.arguments)


@functools.cache
def _parameters(function: Any) -> inspect.Signature | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function
        return None
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return signature if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY} else None


def _attention_arguments(node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_ATTENTION_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _without(arguments: dict[str, Any], left_out: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != left_out}
