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
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..arithmetic import LARGEST_SCALE, SMALLEST_SCALE
from ..kernels.devices import PLAIN
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
_sharded: weakref.WeakKeyDictionary[LearnedGrid, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_hooks_registered = False


class _Bounded(NamedTuple):
    """Scales, or zero points, that are taken together: each alone is too small for the operations that it takes.

    Attributes:
        parameters: by the layers that they are of.
        old: their values before the step, one behind the other.
        projected: new values within their bounds, of new and old ones.
    """

    parameters: dict[LearnedGrid, Tensor]
    old: Tensor
    projected: Callable[[Tensor, Tensor], Tensor]


# Those that have begun.
_steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[_Bounded]] = weakref.WeakKeyDictionary()


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
    _steps.pop(optimizer, None)  # of one that an error or an interruption ended
    trained = _trained_by(optimizer)
    if not trained:
        return None
    _steps[optimizer] = _remembered(trained)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": _at_projected_values(kwargs["closure"], optimizer, trained)}
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], _at_projected_values(args[1], optimizer, trained), *args[2:]), kwargs
    return None


def _end_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    step = _steps.pop(optimizer, None)
    if step is None:
        return
    _project(step)
    # An optimizer that took this step within its own may put what it likes in the place of the results.
    for other in list(_steps):
        _steps[other] = _without(_layers_of(step), _steps[other])


def _at_projected_values(
    closure: Callable[[], Any], optimizer: torch.optim.Optimizer, trained: Collection[LearnedGrid]
) -> Callable[[], Any]:
    """The loss as a function of the values before projection: its gradient is zero where the projection moves them."""

    def projected_closure() -> Any:
        step = _steps.get(optimizer, [])
        parameters = [parameter for bounded in step for parameter in bounded.parameters.values()]
        before = [parameter.detach().clone() for parameter in parameters]
        _project(step)
        moved = [parameter.detach() != value for parameter, value in zip(parameters, before, strict=True)]
        loss = closure()
        for parameter, where in zip(parameters, moved, strict=True):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(where, 0)
        # The closure's batch was their first.
        known = _layers_of(step)
        first = _remembered({layer: _parameters_of(layer) for layer in trained if layer not in known})
        _steps[optimizer] = [*step, *first]
        return loss

    return projected_closure


@torch.no_grad()
def _remembered(trained: _Trained) -> list[_Bounded]:
    """The values of the layers that data has set."""
    scales: dict[Any, dict[LearnedGrid, Tensor]] = {}
    zero_points: dict[Any, dict[LearnedGrid, Tensor]] = {}
    for layer, (scale, zero_point) in trained.items():
        if not layer.is_initialized:
            continue
        together = scale.device if type(scale) in PLAIN else layer  # a shard, say, is taken alone
        scales.setdefault(together, {})[layer] = scale
        if zero_point.requires_grad:
            ends = layer.scheme.quant_min, layer.scheme.quant_max
            zero_points.setdefault((together, ends), {})[layer] = zero_point
    step = [_Bounded(parameters, _joined(parameters.values()), _projected_scale) for parameters in scales.values()]
    for (_, ends), parameters in zero_points.items():
        step.append(_Bounded(parameters, _joined(parameters.values()), partial(_projected_zero_point, *ends)))
    return step


def _layers_of(step: list[_Bounded]) -> set[LearnedGrid]:
    return {layer for bounded in step for layer in bounded.parameters}


@torch.no_grad()
def _without(layers: set[LearnedGrid], step: list[_Bounded]) -> list[_Bounded]:
    rest = []
    for parameters, old, projected in step:
        kept = {layer: parameter for layer, parameter in parameters.items() if layer not in layers}
        if kept:
            values = dict(zip(parameters, _apart(old, parameters.values()), strict=True))
            rest.append(_Bounded(kept, _joined([values[layer] for layer in kept]), projected))
    return rest


@torch.no_grad()
def _project(step: list[_Bounded]) -> None:
    for parameters, old, projected in step:
        tensors = list(parameters.values())
        results = projected(_joined(tensors), old)
        if len(tensors) == 1:
            tensors[0].copy_(results)
        else:
            torch._foreach_copy_(tensors, list(_apart(results, tensors)))


def _joined(tensors: Collection[Tensor]) -> Tensor:
    """A copy of all values, one behind the other."""
    first, *others = tensors
    return torch.cat([first, *others]) if others else first.detach().clone()


def _apart(joined: Tensor, tensors: Collection[Tensor]) -> Collection[Tensor]:
    """What :func:`_joined` has joined, of tensors like these."""
    return (joined,) if len(tensors) == 1 else torch.split(joined, [tensor.numel() for tensor in tensors])


def _projected_scale(scale: Tensor, old: Tensor) -> Tensor:
    scale = torch.where(torch.isfinite(scale), scale, old)
    return scale.clamp(old / _LARGEST_CHANGE, old * _LARGEST_CHANGE).clamp(SMALLEST_SCALE, LARGEST_SCALE)


def _projected_zero_point(lowest: int, highest: int, zero_point: Tensor, old: Tensor) -> Tensor:
    return torch.where(torch.isfinite(zero_point), zero_point, old).clamp(lowest, highest)
