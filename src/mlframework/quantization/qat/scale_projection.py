"""Keeps learned scales positive and zero points on the grid, whatever step an optimizer takes.

A step of any size may carry a scale through zero, and from there on its grid is upside down; or to next to nothing,
where everything saturates. So a step changes a scale by a factor of two at the most, and one that is not finite leaves
it as it was. This happens when the step is taken, and not at the next forward: no checkpoint, conversion or printout
sees anything else.
"""

from __future__ import annotations

import weakref
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


_LARGEST_CHANGE = 2.0

_learnable_layers: weakref.WeakSet[LearnedGrid] = weakref.WeakSet()
_before_step: weakref.WeakKeyDictionary[LearnedGrid, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_hooks_registered = False


def project_optimizer_steps(layer: LearnedGrid) -> None:
    """From now on, every ``step()`` of an optimizer that trains that layer's parameters leaves them in their ranges."""
    global _hooks_registered
    _learnable_layers.add(layer)
    if not _hooks_registered:
        register_optimizer_step_pre_hook(_remember)
        register_optimizer_step_post_hook(_project)
        _hooks_registered = True


def _trained_by(optimizer: torch.optim.Optimizer) -> list[LearnedGrid]:
    """Of other optimizers' parameters nothing is touched: a graph that waits for its backward may have saved them."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [layer for layer in _learnable_layers if not trained.isdisjoint((id(layer.scale), id(layer.zero_point)))]


def _remember(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _trained_by(optimizer):
        _before_step[layer] = (layer.scale.detach().clone(), layer.zero_point.detach().clone())


@torch.no_grad()
def _project(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for layer in _trained_by(optimizer):
        if layer not in _before_step:  # it came to be during the step, from a closure
            continue
        old_scale, old_zero_point = _before_step.pop(layer)
        scale = torch.where(torch.isfinite(layer.scale), layer.scale, old_scale)
        scale = scale.clamp(old_scale / _LARGEST_CHANGE, old_scale * _LARGEST_CHANGE)
        zero_point = torch.where(torch.isfinite(layer.zero_point), layer.zero_point, old_zero_point)
        layer.scale.copy_(scale.clamp(SMALLEST_SCALE, LARGEST_SCALE))
        layer.zero_point.copy_(zero_point.clamp(layer.scheme.quant_min, layer.scheme.quant_max))
