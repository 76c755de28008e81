"""Hooks that somebody put on modules which this library does not call, or calls as part of something larger."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_LIBRARY = __name__.rpartition(".graph")[0]

_MODULE_CALL = nn.Module.__call__


def has_user_hooks(*modules: nn.Module | None) -> bool:
    """Whether any of the modules has forward hooks other than this library's own."""
    return any(
        not getattr(hook, "__module__", "").startswith(_LIBRARY)
        for module in modules
        if module is not None
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def is_watched(*modules: nn.Module | None, but_for: object = None) -> bool:
    """Whether a call of any of the modules would run a hook: forward or backward, its own or one for all modules; or a
    forward that was put on that very module, as libraries that move models about do.

    Args:
        but_for: a forward pre-hook that does not count.
    """
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in modules:
        if module is None:
            continue
        own = module.__dict__
        if own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        if own["_forward_pre_hooks"] and any(hook is not but_for for hook in own["_forward_pre_hooks"].values()):
            return True
        if "forward" in own:
            return True
    return False


def is_traced() -> bool:
    """Whether a tracer stands in the place of how modules are called."""
    return nn.Module.__call__ is not _MODULE_CALL


def all_calls_are_watched() -> bool:
    """Whether somebody may follow every call of a module or an operator: tracers, modes, and hooks for all modules."""
    return bool(
        is_traced()
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and _functions_are_watched())
        or torch._C._get_tracing_state() is not None
    )


def _functions_are_watched() -> bool:
    """Whether a mode sees functions, other than a default device, which only concerns tensors that are made of none."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not DeviceContext for mode in modes)
