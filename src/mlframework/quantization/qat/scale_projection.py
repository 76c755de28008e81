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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..arithmetic import LARGEST_SCALE, SMALLEST_SCALE
from ..scheme import QuantizationScheme
from .sharding import is_managed, is_sharded


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
_sharded: weakref.WeakKeyDictionary[LearnedGrid, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_hooks_registered = False


def project_optimizer_steps(layer: LearnedGrid) -> None:
    """From now on, every ``step()`` of an optimizer that trains that layer's parameters leaves them in their ranges."""
    global _hooks_registered
    _learnable_layers.add(layer)
    if not _hooks_registered:
        register_optimizer_step_pre_hook(_begin_step)
        register_optimizer_step_post_hook(_end_step)
        _hooks_registered = True


def remember_shards(*arguments: object) -> None:
    """Forward pre-hook of a model that FSDP has sharded: notes the parameters that optimizers have.

    If another forward comes before the optimizer's step, FSDP has put gathered ones in their place.
    """
    for layer in _learnable_layers:
        if is_sharded(layer.scale):
            _sharded[layer] = layer.scale, layer.zero_point


def _parameters_of(layer: LearnedGrid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, as an optimizer has them."""
    parameters = vars(layer)["_parameters"]  # in every step, where a module's own look-up is slow
    own = parameters["scale"], parameters["zero_point"]
    return _sharded.get(layer, own) if is_managed(layer) and not is_sharded(own[0]) else own


def _trained_by(optimizer: torch.optim.Optimizer) -> list[LearnedGrid]:
    """Of other optimizers' parameters nothing is touched: a graph that waits for its backward may have saved them."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [layer for layer in _learnable_layers if not trained.isdisjoint(map(id, _parameters_of(layer)))]


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
    layers = [layer for layer in _trained_by(optimizer) if layer in _before_step]
    _project(layers)
    for layer in layers:
        del _before_step[layer]


def _at_projected_values(closure: Callable[[], Any], layers: list[LearnedGrid]) -> Callable[[], Any]:
    """The loss as a function of the values before projection: its gradient is zero where the projection moves them."""

    def projected_closure() -> Any:
        remembered = [layer for layer in layers if layer in _before_step]
        parameters = [parameter for layer in remembered for parameter in _parameters_of(layer)]
        before = [parameter.detach().clone() for parameter in parameters]
        _project(remembered)
        moved = [parameter.detach() != value for parameter, value in zip(parameters, before, strict=True)]
        loss = closure()
        for parameter, where in zip(parameters, moved, strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(where, 0)
        _remember([layer for layer in layers if layer not in _before_step])  # the closure's batch was their first
        return loss

    return projected_closure


@torch.no_grad()
def _remember(layers: list[LearnedGrid]) -> None:
    for group in _by_device([layer for layer in layers if layer.is_initialized]):
        scales, zero_points = zip(*map(_parameters_of, group), strict=True)
        for layer, *copies in zip(group, _copies(scales), _copies(zero_points), strict=True):
            _before_step[layer] = copies[0], copies[1]


def _by_device(layers: list[LearnedGrid]) -> list[list[LearnedGrid]]:
    """Layers to be taken together: each alone is too small for the operations that it takes."""
    together: dict[Any, list[LearnedGrid]] = {}
    for layer in layers:
        scale, _ = _parameters_of(layer)
        is_plain = type(scale.data) is Tensor  # and not, say, a shard
        together.setdefault(scale.device if is_plain else layer, []).append(layer)
    return list(together.values())


def _copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(tensors) == 1:
        return (tensors[0].detach().clone(),)
    return torch.split(torch.cat(tensors), [tensor.numel() for tensor in tensors])


@torch.no_grad()
def _project(layers: list[LearnedGrid]) -> None:
    for group in _by_device(layers):
        parameters = list(map(_parameters_of, group))
        before = [_before_step[layer] for layer in group]
        _replace([scale for scale, _ in parameters], [scale for scale, _ in before], _projected_scale)
        ends: dict[tuple[int, int], list[int]] = {}
        for index, (layer, (_, zero_point)) in enumerate(zip(group, parameters, strict=True)):
            if zero_point.requires_grad:
                ends.setdefault((layer.scheme.quant_min, layer.scheme.quant_max), []).append(index)
        for (lowest, highest), same in ends.items():
            zero_points, old = [parameters[index][1] for index in same], [before[index][1] for index in same]
            _replace(zero_points, old, partial(_projected_zero_point, lowest, highest))


def _replace(tensors: list[Tensor], old: list[Tensor], projected: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Puts what a function makes of new and old values in the place of the new ones."""
    if len(tensors) == 1:
        tensors[0].copy_(projected(tensors[0], old[0]))
        return
    parts = torch.split(projected(torch.cat(tensors), torch.cat(old)), [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, list(parts))


def _projected_scale(scale: Tensor, old: Tensor) -> Tensor:
    scale = torch.where(torch.isfinite(scale), scale, old)
    return scale.clamp(old / _LARGEST_CHANGE, old * _LARGEST_CHANGE).clamp(SMALLEST_SCALE, LARGEST_SCALE)


def _projected_zero_point(lowest: int, highest: int, zero_point: Tensor, old: Tensor) -> Tensor:
    return torch.where(torch.isfinite(zero_point), zero_point, old).clamp(lowest, highest)
