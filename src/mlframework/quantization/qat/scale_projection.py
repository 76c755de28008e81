"""Keeps learned scales positive and zero points on the grid, whatever step an optimizer takes.

A step of any size may carry a scale through zero, and from there on its grid is upside down; or to next to nothing,
where everything saturates. So a step changes a scale by a factor of two at the most, and one that is not finite leaves
it as it was. This happens when the step is taken, and not at the next forward: no checkpoint, conversion or printout
sees anything else.

An optimizer that evaluates a closure within its step (LBFGS along its line search) does so at the same projected
values. Otherwise it would choose a step by the losses of scales that the projection then takes away.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..arithmetic import LARGEST_SCALE, SMALLEST_SCALE
from ..scheme import QuantizationScheme


class LearnedGrid(Protocol):
    """A layer whose scale and zero point an optimizer may train."""

    scale: Tensor
    zero_point: Tensor
    scheme: QuantizationScheme

    @property
    def is_initialized(self) -> bool:
        """Whether data has set scale and zero point."""


_LARGEST_CHANGE = 2.0

_learnable_layers: weakref.WeakSet[LearnedGrid] = weakref.WeakSet()
_before_step: weakref.WeakKeyDictionary[LearnedGrid, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_hooks_registered = False


def project_optimizer_steps(layer: LearnedGrid) -> None:
    """From now on, every ``step()`` of an optimizer that trains that layer's parameters leaves them in their ranges."""
    global _hooks_registered
    _learnable_layers.add(layer)
    if not _hooks_registered:
        register_optimizer_step_pre_hook(_begin_step)
        register_optimizer_step_post_hook(_end_step)
        _hooks_registered = True


def _trained_by(optimizer: torch.optim.Optimizer) -> list[LearnedGrid]:
    """Of other optimizers' parameters nothing is touched: a graph that waits for its backward may have saved them."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [layer for layer in _learnable_layers if not trained.isdisjoint((id(layer.scale), id(layer.zero_point)))]


def _begin_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    layers = _trained_by(optimizer)
    if not layers:
        return None
    _remember(layers)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": _at_projected_values(kwargs["closure"], layers)}
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], _at_projected_values(args[1], layers), *args[2:]), kwargs
    return None


def _end_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _trained_by(optimizer):
        if layer in _before_step:
            _project(layer)
            del _before_step[layer]


def _at_projected_values(closure: Callable[[], Any], layers: list[LearnedGrid]) -> Callable[[], Any]:
    """The loss as a function of the values before projection: its gradient is zero where the projection moves them."""

    def projected_closure() -> Any:
        remembered = [layer for layer in layers if layer in _before_step]
        parameters = [parameter for layer in remembered for parameter in (layer.scale, layer.zero_point)]
        before = [parameter.detach().clone() for parameter in parameters]
        for layer in remembered:
            _project(layer)
        moved = [parameter.detach() != value for parameter, value in zip(parameters, before, strict=True)]
        loss = closure()
        for parameter, where in zip(parameters, moved, strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(where, 0)
        _remember([layer for layer in layers if layer not in _before_step])  # the closure's batch was their first
        return loss

    return projected_closure


def _remember(layers: list[LearnedGrid]) -> None:
    for layer in layers:
        if layer.is_initialized:
            _before_step[layer] = (layer.scale.detach().clone(), layer.zero_point.detach().clone())


@torch.no_grad()
def _project(layer: LearnedGrid) -> None:
    old_scale, old_zero_point = _before_step[layer]
    scale = torch.where(torch.isfinite(layer.scale), layer.scale, old_scale)
    scale = scale.clamp(old_scale / _LARGEST_CHANGE, old_scale * _LARGEST_CHANGE)
    zero_point = torch.where(torch.isfinite(layer.zero_point), layer.zero_point, old_zero_point)
    layer.scale.copy_(scale.clamp(SMALLEST_SCALE, LARGEST_SCALE))
    layer.zero_point.copy_(zero_point.clamp(layer.scheme.quant_min, layer.scheme.quant_max))
