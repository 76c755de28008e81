"""Learned scales where ``torch.distributed.fsdp.fully_shard`` has split them over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate


def begin_forward(model: nn.Module, nodes: Iterable[object], hook: Callable[..., object]) -> None:
    """Makes the parameters whole of nodes that were sharded as a group of their own, and lets a hook run after FSDP's.

    Their scales are read outside of their own forward, too, by layers that compute on codes.

    Args:
        model: whose forward begins.
        nodes: of the model.
        hook: a forward hook of the model's.
    """
    if not dist.is_available():
        return
    for node in nodes:
        if isinstance(node, FSDPModule):
            node.unshard()
    if isinstance(model, FSDPModule):
        hooks = model._forward_hooks
        for identifier in [key for key, each in hooks.items() if each is hook]:
            hooks[identifier] = hooks.pop(identifier)


def shard_again(model: nn.Module, nodes: Iterable[object]) -> None:
    """Lets go of the whole parameters that a forward has gathered, as FSDP does after that of an inner module.

    What is then written goes to the parameters that the optimizer knows; written to the gathered ones, it is lost.

    Args:
        model: whose forward ends.
        nodes: of the model; where they are a group of their own, they are kept whole from forward to backward.
    """
    if not dist.is_available():
        return
    own = [node for node in nodes if isinstance(node, FSDPModule)]
    for node in own:
        node.set_reshard_after_forward(True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for node in own:
        node.set_reshard_after_forward(False)


def write(parameter: Tensor, value: Tensor) -> None:
    """Copies a value that is the same on all ranks into a parameter, whole or sharded; nothing is sent."""
    if dist.is_available() and isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.copy_(whole.redistribute(mesh, parameter.placements))
    else:
        parameter.copy_(value)


def sharded_parameter(model: nn.Module) -> str | None:
    """The name of a parameter that is split over ranks, by FSDP or by tensor parallelism."""
    named = model.named_parameters() if dist.is_available() else ()
    return next((name for name, parameter in named if isinstance(parameter, DTensor)), None)


def require_float32(scale: Tensor, name: str) -> None:
    """Raises RuntimeError where FSDP's mixed precision has cast a learned scale."""
    if scale.dtype is not torch.float32:
        raise RuntimeError(
            f"the learned scale of {name or 'a node'} must be float32, got {scale.dtype}: shard the nodes before the "
            "model and without a mixed precision policy: fully_shard([module for module in model.modules() if "
            "isinstance(module, FakeQuantizeLayer)], mesh=mesh, reshard_after_forward=False)"
        )
