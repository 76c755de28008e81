"""Hooks that somebody put on modules which this library does not call, or calls as part of something larger."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_LIBRARY = __name__.rpartition(".graph")[0]


def has_user_hooks(*modules: nn.Module | None) -> bool:
    """Whether any of the modules has forward hooks other than this library's own."""
    return any(
        not getattr(hook, "__module__", "").startswith(_LIBRARY)
        for module in modules
        if module is not None
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def is_watched(*modules: nn.Module | None) -> bool:
    """Whether a call of any of the modules would run a hook: forward or backward, its own or one for all modules; or a
    forward that was put on that very module, as libraries that move models about do."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in modules:
        if module is None:
            continue
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        if "forward" in own:
            return True
    return False
