"""A copy of a model that trains the same parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def clone_sharing_parameters(model: nn.Module) -> nn.Module:
    """A deep copy in which Parameters are the model's own objects; buffers are copies.

    Hooks are the same objects too (a recorder goes on recording), unless they belong to a module of the model, whose
    copy then has its own.
    """
    return _with_hooks_of_others(model, {id(parameter): parameter for parameter in model.parameters()})


def scratch_of(model: nn.Module) -> nn.Module:
    """A copy to run as often as need be: its parameters are its own, and no backward hook of the user's fires."""
    scratch = _with_hooks_of_others(model, {})
    for module in scratch.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return scratch


def _with_hooks_of_others(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    inside = {id(module) for module in model.modules()}
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                for hook in hooks.values():
                    function = _function_of(hook)
                    if id(getattr(function, "__self__", None)) not in inside:
                        memo[id(function)] = function
    return copy_of(model, memo)


def _function_of(hook: Any) -> Any:
    """A hook, or what PyTorch has wrapped in one that it calls with the module: the wrapper is the copy's own."""
    return hook.hook if getattr(hook, "with_module", False) else hook


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of tensors that were computed with gradients (hooks of weight normalization and of pruning keep
    such), which it takes out of their graph.

    Args:
        model: to be copied.
        memo: what stands for which object in the copy, by id.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        values = list(vars(module).values())
        # Most registries of most modules are empty, and copying an OrderedDict by its protocol takes long.
        empty = [value for value in values if type(value) is OrderedDict and not value]
        memo.update((id(value), OrderedDict()) for value in empty)
        for value in tree_leaves([value for value in values if id(value) not in memo]):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
