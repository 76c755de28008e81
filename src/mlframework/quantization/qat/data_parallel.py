"""Where DistributedDataParallel runs a prepared model: after its all-reduce of the gradients, and within ``Join``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from .. import kernels

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.algorithms.join import Joinable as Joinable
    from torch.distributed.algorithms.join import JoinHook as JoinHook
    from torch.nn.parallel import DistributedDataParallel
else:
    Joinable = JoinHook = object


def after_reducing_gradients(model: nn.Module | None, output: Any, call: Callable[[], None]) -> bool:
    """Has something called when the backward of the present forward has reduced the gradients.

    Args:
        model: whose forward it is.
        output: of the forward, at whose end this is.
        call: without arguments; called in any backward that reaches the output.

    Returns:
        Whether it will be called: not where this is no forward of a DistributedDataParallel of just that model (ranks
        may then run backward without reaching its output), or one whose backward reduces no gradients (``no_sync``),
        nor under ``torch.compile``.
    """
    if kernels.is_traced() or not torch.is_grad_enabled():
        return False
    parallel = _running()
    if parallel is None or parallel.module is not model or not parallel.require_backward_grad_sync:
        return False
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs:
        return False

    def at_end_of_backward(gradient: Tensor) -> None:
        # Twice, because the first turn comes before that of DistributedDataParallel, whose communication hooks may
        # still start all-reduces: all ranks must start theirs in one order.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(call))

    register_multi_grad_hook(outputs, at_end_of_backward, mode="any")
    return True


def require_joined(model: nn.Module | None, joinable: Joinable, communicates: Callable[[], bool]) -> None:
    """Raises RuntimeError in a forward within ``Join``, which does not list a joinable that communicates in it."""
    parallel = _running()
    if parallel is None or not parallel._join_config.enable:
        return
    config = joinable._join_config
    is_in_order = config.enable and not config.is_first_joinable and parallel.module is model
    if not is_in_order and communicates():
        raise RuntimeError(
            "within torch.distributed.algorithms.join.Join, a rank without data has to take part in reducing the "
            "statistics of observers: list them behind the model, "
            "Join([parallel, parallel.module.observer_synchronizer]), where parallel is the DistributedDataParallel of "
            "just what prepare() returned"
        )


def _running() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward this is."""
    return DistributedDataParallel._active_ddp_module if dist.is_available() else None
