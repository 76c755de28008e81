"""What a file may put into a module: tensors in the place of a network's own, attributes, windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.pooling import _MaxPoolNd

from ..graph.float_structure import holds_text, is_pytorchs
from ..graph.nodes import ADDED
from ..preparation.report import PreparationReport
from ..qat.observer_synchronizer import ObserverSynchronizer
from .classes import names_in_code
from .encoding import is_value
from .guards import LARGEST_DILATION, LONGEST_POOLED
from .vocabulary import NotAllowedError, shortened

# What this library keeps in modules of a network.
_OWN_ATTRIBUTES: dict[str, type] = {
    "observer_synchronizer": ObserverSynchronizer,
    "preparation_report": PreparationReport,
}
# Settings of windows.
_LENGTHS = frozenset({"dilation", "kernel_size", "output_padding", "output_size", "padding", "stride"})
# What others keep in modules, beside what PyTorch does, to call something else than the forward.
_OF_OTHERS = frozenset({"_code", "_generated_from", "_hf_hook", "_old_forward", "_orig_mod", "_forward_module"})


def check_tensor_fits(name: str, loaded: Tensor, present: Tensor, is_parameter: bool) -> None:
    """Refuses what cannot be put in the place of a tensor of the network, or could not be trained there."""
    if nn.parameter.is_lazy(present):
        return
    if present.layout is not torch.strided:
        raise NotAllowedError(f"{name} must be of strided memory in the network, got {present.layout}")
    if not present.is_meta and present.device != loaded.device:
        raise NotAllowedError(f"{name} must be on {loaded.device}, as others of the network are, got {present.device}")
    are_floats = loaded.dtype.is_floating_point, present.dtype.is_floating_point
    if loaded.shape != present.shape or are_floats[0] is not are_floats[1] or present.is_complex():
        raise NotAllowedError(
            f"{name} must be of shape {tuple(present.shape)} and like {present.dtype}, got "
            f"{tuple(loaded.shape)} of {loaded.dtype}"
        )
    if is_parameter is not isinstance(present, nn.Parameter) or (is_parameter and not present.is_leaf):
        expected = "a parameter" if isinstance(present, nn.Parameter) else "no parameter"
        raise NotAllowedError(f"{name} must be {expected}, as in the network, and a leaf of the graph of gradients")


def check_own(kind: type[nn.Module], own: Mapping[str, Any], state: Mapping[str, Any], module_names: Any) -> None:
    """Refuses attributes of a module of the network by which its own code could do something else than compute: text,
    objects, modules, and what PyTorch or a framework keeps in modules."""
    for key, value in state.items():
        if key == ADDED:
            if not _is_listed(value) or not all(isinstance(name, str) and name in module_names for name in value):
                raise NotAllowedError(f"{key} must name modules, got {shortened(value)}")
            continue
        if key in _OWN_ATTRIBUTES:
            if not isinstance(value, _OWN_ATTRIBUTES[key]):
                raise NotAllowedError(f"{key} may not be {shortened(value)}")
            continue
        if hasattr(nn.Module, key) or key in _OF_OTHERS or (key.startswith("_") and is_pytorchs(kind)):
            raise NotAllowedError(f"{key} is no attribute that a file sets in a network")
        if holds_text(value):
            raise NotAllowedError(f"{key} is text, which a file does not set in a network: {shortened(value)}")
        if not is_value(value) or not is_value(own.get(key)) or holds_text(own.get(key)):
            raise NotAllowedError(
                f"{key} must be numbers or tensors, in the network and in the file, got {shortened(own.get(key))} and "
                f"{shortened(value)}"
            )


def is_hidden(kind: type, key: str) -> bool:
    """Whether a name with an underscore is none that the class itself has for its attributes."""
    if not key.startswith("_") or key == "_grids":  # which functions beside the classes keep in them
        return False
    return (issubclass(kind, nn.Module) and hasattr(nn.Module, key)) or key not in names_in_code(kind)


def check_distinct(*named: Mapping[str, Any]) -> None:
    """Refuses two things of one name: which of them a module finds, others would not look at."""
    together = [name for each in named for name in each]
    if len(set(together)) != len(together):
        twice = next(name for name in together if together.count(name) > 1)
        raise NotAllowedError(f"a module may not have two things called {twice}")


def check_lengths(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuses windows whose products no number of a kernel holds."""
    for key in _LENGTHS & state.keys():
        value = state[key]
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        is_of_pooling = key == "dilation" and isinstance(module, _MaxPoolNd)
        limit = LARGEST_DILATION if is_of_pooling else LONGEST_POOLED
        if any(type(number) is int and not -limit < number < limit for number in numbers):
            raise NotAllowedError(f"{key} must be below {limit}, got {shortened(value)}")


def _is_listed(value: Any) -> bool:
    return type(value) in (list, tuple)
