"""Observation within the transforms of ``torch.func``."""

from __future__ import annotations

import torch
from torch import Tensor


def require_own_level(input: Tensor, state: Tensor, name: str) -> None:
    """Refuses to observe within a transform of ``torch.func`` what would have to be written to other buffers.

    Args:
        input: what is observed.
        state: a buffer of the observer.
        name: of the layer.

    Raises:
        RuntimeError: the input is transformed, and the observer's buffers are not.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    level = torch._C._functorch.maybe_get_level
    if level(input) > level(state):  # -1 of a tensor that no transform wraps
        raise RuntimeError(
            f"{name or 'this layer'} observes a tensor that torch.func transforms, and its statistics are not among "
            "what is transformed: switch observation off (eval(), QATSchedule, observer.enabled), or hand the buffers "
            "to torch.func.functional_call in the transformed function"
        )
