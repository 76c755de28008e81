"""Hooks that somebody put on modules which evaluation on integers does not call."""

from __future__ import annotations

from torch import nn

_LIBRARY = __name__.rpartition(".qat")[0]


def has_user_hooks(*modules: nn.Module | None) -> bool:
    """Whether any of the modules has forward hooks other than this library's own."""
    return any(
        not getattr(hook, "__module__", "").startswith(_LIBRARY)
        for module in modules
        if module is not None
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )
