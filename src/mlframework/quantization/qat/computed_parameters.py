"""Parameters that are computed for every forward: by parametrizations, or by hooks of pruning and of normalization.

Both kinds belong to the module that is called by name and listed by ``named_modules()``, which is the wrapper: there
PyTorch's functions put them, and look for them to take them off again. What a layer had before it was wrapped is moved
to the wrapper, so that there is one place to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

_REGISTRIES = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
_HOOKS = (BasePruningMethod, SpectralNorm, SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook, WeightNorm)


def move_computation(layer: nn.Module, wrapper: nn.Module) -> None:
    """Moves what computes parameters of ``layer``, and the tensors computed last, to the wrapper of it.

    The two share their registries of parameters and buffers, which hold what is computed from. Parametrizations turn
    the class of the wrapper into a subclass with a property for each parameter, and that of the layer back.
    """
    for registry in _REGISTRIES:
        own, new = vars(layer)[registry], vars(wrapper)[registry]
        for key, hook in list(own.items()):
            if isinstance(getattr(hook, "hook", hook), _HOOKS):
                new[key] = own.pop(key)
    for name in ("weight", "bias"):
        if isinstance(vars(layer).get(name), Tensor):
            vars(wrapper)[name] = vars(layer).pop(name)
    if parametrize.is_parametrized(layer):
        parametrizations: Any = layer.parametrizations
        del layer._modules["parametrizations"]
        layer.__class__ = layer.__class__.__bases__[0]
        if not parametrize.is_parametrized(wrapper):
            parametrize._inject_new_class(wrapper)
            wrapper.parametrizations = nn.ModuleDict()
        for name, parametrization in parametrizations.items():
            parametrize._inject_property(wrapper, name)
            wrapper.parametrizations[name] = parametrization  # type: ignore[operator]


def has_unknown_computation(layer: nn.Module, name: str) -> bool:
    """Whether a parameter is an attribute that some hook of another kind may set."""
    return name in vars(layer) and bool(layer._forward_pre_hooks) and not _hooks_of(layer, name)


def computed(module: nn.Module, name: str) -> Any:
    """The parameter (or None), computed anew in the mode of the module, as a forward does."""
    for hook in _hooks_of(module, name):
        hook(module, ())
    return getattr(module, name)


@torch.no_grad()
def evaluated(module: nn.Module, name: str) -> Any:
    """The parameter (or None) as evaluation computes it, whatever the mode: without steps of a power iteration."""
    if name in module._parameters:
        return module._parameters[name]
    with _in_evaluation(module):
        return computed(module, name)


def _hooks_of(module: nn.Module, name: str) -> list[Any]:
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _HOOKS)]
    return [hook for hook in hooks if getattr(hook, "_tensor_name", getattr(hook, "name", None)) == name]


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    parametrizations = module._modules.get("parametrizations")
    parts = [module, *([] if parametrizations is None else parametrizations.modules())]
    modes = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
