"""Parameters of a prepared model's own, and the way back where a method fails.

A prepared model shares its Parameters with the float model that it was made of. What changes weights first puts copies
in their place, so that the float model stays what it was; and so the present Parameters are what to go back to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from .runs import nodes_of

_SWITCHES = ("fake_quantize_enabled", "calibrating", "range_of")


def own_parameters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Puts copies in the place of Parameters, wherever the model has these; returns the copy of each.

    A Parameter that several modules share is one copy in all of them. (A wrapper and its layer have one registry.)
    """
    own: dict[int, nn.Parameter] = {}
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in parameters:
        if id(parameter) not in own:
            copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            own[id(parameter)] = copies[parameter] = copy
    for module in model.modules():
        registry: dict[str, Any] = module._parameters
        for name, parameter in registry.items():
            if id(parameter) in own:
                registry[name] = own[id(parameter)]
    return copies


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """On an error or an interruption, gives the model back the Parameters, buffers and switches that it had."""
    registries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (module._parameters, dict(module._parameters)) for module in model.modules()
    ]
    nodes = nodes_of(model)
    switches = [(node, {name: getattr(node, name) for name in _SWITCHES}, node.observer.enabled) for node in nodes]
    tensors = [(tensor, tensor.detach().clone()) for tensor in _changed_in_place(model, nodes)]
    try:
        yield
    except BaseException:  # an interruption is no reason for half a calibration either
        for registry, before in registries:
            registry.update(before)
        for node, values, enabled in switches:
            vars(node).update(values)
            node.observer.enabled = enabled
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        raise


def _changed_in_place(model: nn.Module, nodes: list[FakeQuantizeLayer]) -> list[Tensor]:
    grids: list[Tensor] = [parameter for node in nodes for parameter in node.parameters()]
    return [*model.buffers(), *grids]
