"""Learned scales where ``torch.distributed.fsdp.fully_shard`` has split them over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import TypeIs

# These take half a second to import, and where they were not, there is nothing of them.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def unshard_nodes(nodes: Iterable[object]) -> None:
    """Gathers the parameters of nodes that were sharded as a group of their own.

    Layers that compute on codes read the scales of nodes outside of these nodes' own forward.
    """
    for node in nodes:
        if _is_fsdp(node):
            node.unshard()


def run_after_fsdp(model: nn.Module, hook: Callable[..., object]) -> None:
    """Puts a forward hook of a sharded model behind the one that FSDP registered later."""
    if _is_fsdp(model):
        hooks = model._forward_hooks
        if next(reversed(hooks.values())) is not hook:
            for identifier in [key for key, each in hooks.items() if each is hook]:
                hooks[identifier] = hooks.pop(identifier)


def run_before_fsdp(model: nn.Module, hook: Callable[..., None]) -> None:
    """Gives a sharded model a forward pre-hook that runs before the one of FSDP: from the next forward on."""
    if _is_fsdp(model) and hook not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(hook, prepend=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's shard of one, as optimizers hold it."""
    return _is_dtensor(tensor)


def reshard(model: nn.Module, nodes: Iterable[object]) -> None:
    """Reshards all of a model that a forward has gathered, as FSDP does after the forward of an inner module.

    What is then written goes to the parameters that the optimizer has; written to the gathered ones, it would be lost.

    Args:
        model: between two forwards, or at the end of one.
        nodes: of the model; where they are a group of their own, they stay gathered from forward to backward.
    """
    own = [node for node in nodes if _is_fsdp(node)]
    for node in own:
        node.set_reshard_after_forward(True)
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()
    for node in own:
        node.set_reshard_after_forward(False)


def copy_replicated(parameter: Tensor, value: Tensor) -> None:
    """Copies a value that is the same on all ranks into a parameter, sharded or not; nothing is sent."""
    if _is_dtensor(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.copy_(replicated.redistribute(mesh, parameter.placements))
    else:
        parameter.copy_(value)


def sharded_parameter(model: nn.Module) -> str | None:
    """The name of a parameter that is split over ranks, by FSDP (also while it is gathered) or tensor parallelism."""
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if _is_dtensor(parameter) or is_managed(module):
                return f"{name}.{own}" if name else own
    return None


def require_writable(node: nn.Module, scale: Tensor, name: str) -> None:
    """Raises RuntimeError where a scale that is about to be set is one that FSDP has gathered."""
    if is_managed(node) and not _is_dtensor(scale):
        raise RuntimeError(
            f"the learned scale of {name or 'a node'} cannot be set while FSDP has gathered it, and would be lost: "
            "apply fully_shard to the prepared model itself, not only to a module around it, and run the first batch "
            "(or calibrate) before fully_shard where the model is compiled, or where nodes stand outside of one that "
            "prepare() made"
        )


def require_float32(scale: Tensor, name: str) -> None:
    """Raises RuntimeError where FSDP's mixed precision has cast a learned scale."""
    if scale.dtype is not torch.float32:
        raise RuntimeError(
            f"the learned scale of {name or 'a node'} must be float32, got {scale.dtype}: shard the nodes before the "
            "model and without a mixed precision policy: fully_shard([module for module in model.modules() if "
            "isinstance(module, FakeQuantizeLayer)], mesh=mesh, reshard_after_forward=False)"
        )


def is_managed(module: object) -> bool:
    """Whether ``fully_shard`` was applied to the module, or to one around it."""
    # Asked in every step, where a module's own look-up of what it lacks is slow.
    return bool(vars(module).get("_is_fsdp_managed_module", False))


def _is_fsdp(module: object) -> TypeIs[FSDPModule]:
    if not is_managed(module):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    if type(tensor) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
