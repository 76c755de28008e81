"""Keeps learned scales positive and zero points on the grid, whatever step an optimizer takes.

A step of any size may carry a scale through zero, and from there on its grid is upside down. Projecting when the step
has been taken, and not at the next forward, means that no checkpoint, conversion or printout sees such a scale.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..arithmetic import LARGEST_SCALE, SMALLEST_SCALE

if TYPE_CHECKING:
    from .fake_quantize_layer import FakeQuantizeLayer

_learnable_layers: weakref.WeakSet[FakeQuantizeLayer] = weakref.WeakSet()
_hook_registered = False


def project_after_optimizer_steps(layer: FakeQuantizeLayer) -> None:
    """From now on, every ``step()`` of an optimizer that trains them ends with its parameters in their ranges."""
    global _hook_registered
    _learnable_layers.add(layer)
    if not _hook_registered:
        register_optimizer_step_post_hook(_project)
        _hook_registered = True


@torch.no_grad()
def _project(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Of other optimizers' parameters nothing is touched: a graph that still waits for its backward may have saved them.
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in _learnable_layers:
        if trained.isdisjoint((id(layer.scale), id(layer.zero_point))):
            continue
        layer.scale.clamp_(SMALLEST_SCALE, LARGEST_SCALE)
        layer.zero_point.clamp_(layer.scheme.quant_min, layer.scheme.quant_max)
