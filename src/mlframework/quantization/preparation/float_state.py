"""States of the float model, into a prepared one and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.nodes import ADDED
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.sharding import sharded_parameter


def float_state_dict(model: nn.Module) -> dict[str, Any]:
    """A prepared model's state without its quantization nodes: it loads strictly into the float model.

    Args:
        model: from :func:`prepare`.

    Returns:
        Keys, tensors (no copies) and metadata of ``model.state_dict()``.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig(), (torch.randn(1, 4),))
        >>> list(float_state_dict(prepared))
        ['0.weight', '0.bias']
        >>> nn.Sequential(nn.Linear(4, 2)).load_state_dict(float_state_dict(prepared))
        <All keys matched successfully>
    """
    state: Any = model.state_dict()
    added = _prefixes_of_what_was_added(model)
    for key in [key for key in state if key.startswith(added)]:
        del state[key]
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QATModuleWrapper) and name in state._metadata:
            state._metadata[name]["version"] = module.layer._version
    return state  # type: ignore[no-any-return]


def load_float_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads a checkpoint of the float model into a prepared one; a state that does not fit changes nothing.

    Scales of weights, learned ones too, start from the weights that were loaded (a learned one of a weight that the
    model's own code hands to a function, from the next batch of training). Those of activations stay as they are:
    :func:`calibrate`, or train.

    Args:
        model: from :func:`prepare`.
        state_dict: what the model that was prepared has as its ``state_dict()``.

    Raises:
        RuntimeError: keys are missing or not expected, a tensor is of another shape or not finite (the first of these
            are named); or parameters of the model are split over ranks.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig(), (torch.randn(1, 4),))
        >>> checkpoint = nn.Sequential(nn.Linear(4, 2)).state_dict()
        >>> load_float_state_dict(prepared, checkpoint)
        >>> torch.equal(prepared[0].weight, checkpoint["0.weight"])
        True
    """
    sharded = sharded_parameter(model)
    if sharded is not None:
        raise RuntimeError(f"model must hold whole parameters, got {sharded} split over ranks: load before fully_shard")
    own = float_state_dict(model)
    faults = [f"{key} is missing" for key in own if key not in state_dict]
    faults += [f"{key} is not expected" for key in state_dict if key not in own]
    for key, value in own.items():
        if isinstance(value, Tensor) and key in state_dict:
            faults += _faults_of(key, state_dict[key], value)
    if faults:
        raise RuntimeError(f"state_dict must be the float model's: {'; '.join(faults[:5])}")
    model.load_state_dict(state_dict, strict=False)
    for module in model.modules():
        # Of these the model's own code hands the weight over, with the next batch of training.
        node = module.weight_fake_quantize if isinstance(module, GivenWeightWrapper) else None
        if node is not None and node.learnable:
            node.reset()


def _prefixes_of_what_was_added(model: nn.Module) -> tuple[str, ...]:
    """Of the nodes, and of the modules that :func:`prepare` put in for further calls of a layer and for functions."""
    prefixes = []
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"{name}." if name else ""
        if isinstance(module, FakeQuantizeLayer):
            prefixes.append(path)
        prefixes.extend(f"{path}{added}." for added in vars(module).get(ADDED, ()))
    # A wrapper that keys do not show.
    return tuple(prefix.replace("_checkpoint_wrapped_module.", "") for prefix in prefixes)


def _faults_of(key: str, value: Any, own: Tensor) -> list[str]:
    if not isinstance(value, Tensor):
        return [f"{key} must be a tensor, got {type(value).__name__}"]
    if value.shape != own.shape:
        return [f"{key} must be of shape {tuple(own.shape)}, got {tuple(value.shape)}"]
    if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
        return [f"{key} holds NaN or infinite values"]
    return []
