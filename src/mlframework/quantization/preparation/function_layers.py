"""Calls of functions that are layers: ``F.conv2d`` and the like, with weights that do not depend on the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..graph.fixed_values import computing_nodes, evaluated, is_fixed
from ..graph.nodes import owner_of
from ..qat.config import QATConfig
from ..qat.given_weight import FUNCTIONS, arguments_of_call, layer_of_call
from ..qat.layer_types import obstacle_of
from . import operations


class FunctionLayer(NamedTuple):
    """A call that is a layer.

    Attributes:
        layer: the layer that the call amounts to, without parameters.
        owner: the name of the module whose code makes the call.
        input, weight, bias: what it is called with.
    """

    layer: nn.Module
    owner: str
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def given(self) -> tuple[fx.Node, ...]:
        """The nodes of the weight and the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def values(self, modules: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias as they are now."""
        weight = evaluated(computing_nodes(self.weight), modules)[self.weight]
        bias = None if self.bias is None else evaluated(computing_nodes(self.bias), modules)[self.bias]
        return weight, bias

    def config(self, config: QATConfig, modules: Mapping[str, nn.Module], prefix: str = "") -> QATConfig | None:
        """The configuration of the layer: selected by the name or the type of the module whose code it is, or by the
        type of the layer that it amounts to."""
        name = f"{prefix}{self.owner}".removesuffix(".")
        own = config.for_layer(name, modules[self.owner])
        return own if own is not config else config.for_layer(name, self.layer)


def take_casts_out(graph: fx.Graph) -> None:
    """Hands functions that are layers the parameter itself where it was cast to the dtype that it has anyway: mostly
    the input's, which must not make the weight depend on the input. In place."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONS:
            for cast in filter(_is_idle_cast, node.all_input_nodes):
                node.replace_input_with(cast, cast.all_input_nodes[0])
                if not cast.users:
                    graph.erase_node(cast)


def _is_idle_cast(node: fx.Node) -> bool:
    if node.op != "call_method" or node.target not in ("to", "type_as"):
        return False
    source = node.all_input_nodes[0]
    if source.op != "get_attr" or not (operations.is_float_tensor(source) and operations.is_float_tensor(node)):
        return False
    return bool(source.meta["tensor"].dtype == node.meta["tensor"].dtype)


def function_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> FunctionLayer | str | None:
    """The layer that a call amounts to; why it cannot be quantized, or None where the node is another operation."""
    function: Any = node.target
    if node.op != "call_function" or function not in FUNCTIONS or not operations.is_float_tensor(node):
        return None
    settings = arguments_of_call(function, node.args, node.kwargs)
    input, weight, bias = settings.pop("input"), settings.pop("weight"), settings.pop("bias", None)
    if not isinstance(input, fx.Node) or not operations.is_float_tensor(input) or not isinstance(weight, fx.Node):
        return None
    if not is_fixed(weight, modules):
        return "its weight depends on the input, or is random"
    shape = weight.meta["tensor"].shape
    if len(shape) < 2:
        return "its weight is a vector"
    if bias is not None and not is_fixed(bias, modules):
        return "its bias depends on the input"
    if any(isinstance(each, fx.Node) for value in settings.values() for each in _items(value)):
        return "its geometry depends on the input"
    layer = layer_of_call(function, shape, bias is not None, settings)
    obstacle = obstacle_of(layer)
    return obstacle or FunctionLayer(layer, owner_of(node), input, weight, bias)


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
