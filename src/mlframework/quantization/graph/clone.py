"""A copy of a model that trains the same parameters."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def clone_sharing_parameters(model: nn.Module) -> nn.Module:
    """A deep copy in which Parameters are the model's own objects; buffers are copies.

    Hooks are the same objects too (a recorder goes on recording), unless they belong to a module of the model, whose
    copy then has its own.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    inside = {id(module) for module in model.modules()}
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                for hook in hooks.values():
                    if id(getattr(hook, "__self__", None)) not in inside:
                        memo[id(hook)] = hook
    return copy.deepcopy(model, memo)
