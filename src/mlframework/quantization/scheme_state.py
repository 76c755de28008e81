"""The scheme in the state dict: a state says which grid its numbers belong to, and no other grid takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .scheme import QuantizationScheme

_PER_TENSOR = -100  # an axis that no tensor has


def register_scheme(module: nn.Module, name: str, scheme: QuantizationScheme) -> None:
    """Keeps ``scheme`` in the module's state under that name."""
    module.register_buffer(name, _encoded(scheme))
    vars(module).setdefault("_schemes", {})[name] = scheme


def check_schemes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Refuses a state of another scheme before any of it is loaded; a load pre-hook.

    Raises:
        RuntimeError: a scheme in the state is not that of the module it is meant for.
    """
    for path, child in module.named_modules():
        for name, scheme in vars(child).get("_schemes", {}).items():
            saved = state_dict.get(f"{prefix}{path}.{name}" if path else f"{prefix}{name}")
            if saved is not None and not torch.equal(saved.cpu(), _encoded(scheme)):
                where = f"{prefix}{path}".removesuffix(".") or "this module"
                raise RuntimeError(f"state_dict holds {where} quantized as {_decoded(saved)}, expected {scheme}")


def _encoded(scheme: QuantizationScheme) -> Tensor:
    axis = _PER_TENSOR if scheme.channel_axis is None else scheme.channel_axis
    return torch.tensor([scheme.bits, scheme.signed, scheme.symmetric, scheme.narrow_range, axis])


def _decoded(saved: Tensor) -> QuantizationScheme:
    bits, signed, symmetric, narrow_range, axis = saved.tolist()
    return QuantizationScheme(
        bits, bool(signed), bool(symmetric), bool(narrow_range), None if axis == _PER_TENSOR else axis
    )
