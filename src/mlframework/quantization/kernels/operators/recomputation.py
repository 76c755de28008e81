"""Refuses, while a compiled graph runs, to run within ``torch.utils.checkpoint``."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor

from .declaration import operator

CANNOT_RECOMPUTE = (
    "cannot be recomputed with the scales that its forward had: train with checkpoints or with torch.compile, whose "
    "own partitioner recomputes what is cheap (torch._functorch.config.activation_memory_budget)"
)


# No guard of a compiler tells whether a graph runs in a checkpoint's forward, or again in backward: a model that was
# compiled before the checkpoint came is not compiled again. The operator says that it writes to its argument, or a
# compiler would drop it.
@operator("refuse_recomputation(Tensor(a!) state) -> ()", ())
def _refuse(state: Tensor) -> None:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    is_checkpoint = hooks is not None and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__
    if is_checkpoint or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(f"torch.utils.checkpoint around a compiled model {CANNOT_RECOMPUTE}")


@_refuse.fake
def _(state: Tensor) -> None:
    return None


def refuse_recomputation(state: Tensor) -> None:
    """Has a graph that a compiler traces raise RuntimeError wherever ``torch.utils.checkpoint`` runs it.

    Args:
        state: a tensor that the graph goes on to update.
    """
    if not torch.compiler.is_exporting():  # programs have no backward that could repeat them
        _refuse.overload(state)
