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


_Trained = dict[LearnedGrid, tuple[Tensor, Tensor]]  # layers with their scales and zero points

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


def _trained_by(optimizer: torch.optim.Optimizer) -> _Trained:
    """Of other optimizers' parameters nothing is touched: a graph that waits for its backward may have saved them."""
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {}
    for layer in _learnable_layers:
        own = _parameters_of(layer)
        if id(own[0]) in parameters or id(own[1]) in parameters:
            trained[layer] = own
    return trained


def _begin_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    trained = _trained_by(optimizer)
    if not trained:
        return None
    _remember(trained)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": _at_projected_values(kwargs["closure"], list(trained))}
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], _at_projected_values(args[1], list(trained)), *args[2:]), kwargs
    return None


def _end_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    trained = {layer: own for layer, own in _trained_by(optimizer).items() if layer in _before_step}
    _project(trained)
    for layer in trained:
        del _before_step[layer]


def _at_projected_values(closure: Callable[[], Any], layers: list[LearnedGrid]) -> Callable[[], Any]:
    """The loss as a function of the values before projection: its gradient is zero where the projection moves them."""

    def projected_closure() -> Any:
        remembered = {layer: _parameters_of(layer) for layer in layers if layer in _before_step}
        parameters = [parameter for own in remembered.values() for parameter in own]
        before = [parameter.detach().clone() for parameter in parameters]
        _project(remembered)
        moved = [parameter.detach() != value for parameter, value in zip(parameters, before, strict=True)]
        loss = closure()
        for parameter, where in zip(parameters, moved, strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(where, 0)
        # The closure's batch was their first.
        _remember({layer: _parameters_of(layer) for layer in layers if layer not in _before_step})
        return loss

    return projected_closure


@torch.no_grad()
def _remember(trained: _Trained) -> None:
    for group in _by_device({layer: own for layer, own in trained.items() if layer.is_initialized}):
        scales, zero_points = zip(*group.values(), strict=True)
        _before_step.update(zip(group, zip(_copies(scales), _copies(zero_points), strict=True), strict=True))


def _by_device(trained: _Trained) -> list[_Trained]:
    """Layers to be taken together: each alone is too small for the operations that it takes."""
    together: dict[Any, _Trained] = {}
    for layer, own in trained.items():
        is_plain = type(own[0].data) is Tensor  # and not, say, a shard
        together.setdefault(own[0].device if is_plain else layer, {})[layer] = own
    return list(together.values())


def _copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(tensors) == 1:
        return (tensors[0].detach().clone(),)
    return torch.split(torch.cat(tensors), [tensor.numel() for tensor in tensors])


@torch.no_grad()
def _project(trained: _Trained) -> None:
    for group in _by_device(trained):
        before = [_before_step[layer] for layer in group]
        _replace([scale for scale, _ in group.values()], [scale for scale, _ in before], _projected_scale)
        ends: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for (layer, (_, zero_point)), (_, old) in zip(group.items(), before, strict=True):
            if zero_point.requires_grad:
                ends.setdefault((layer.scheme.quant_min, layer.scheme.quant_max), []).append((zero_point, old))
        for (lowest, highest), pairs in ends.items():
            zero_points, of_old = map(list, zip(*pairs, strict=True))
            _replace(zero_points, of_old, partial(_projected_zero_point, lowest, highest))


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
