"""What a state dict says of grids, checked before any of it is loaded: the scheme itself, scales and zero points.

The scheme stands in the state dict and is no buffer: averages of weights and buffers, which round integers, would make
another scheme of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .scheme import QuantizationScheme

_PER_TENSOR = -100  # an axis that no tensor has
_FIELDS = "[bits, signed, symmetric, narrow_range, channel_axis]"


def register_scheme(module: nn.Module, name: str, scheme: QuantizationScheme) -> None:
    """Keeps ``scheme`` as an attribute of that name, ``{...}grid``, and in the module's state.

    The module's ``_save_to_state_dict`` must call :func:`save_schemes`, and its ``_load_from_state_dict``
    :func:`check_schemes` and :func:`without_schemes`.
    """
    setattr(module, name, scheme)
    vars(module).setdefault("_grids", []).append(name)


def save_schemes(module: nn.Module, destination: dict[str, Any], prefix: str) -> None:
    """Writes the module's schemes, each an int64 tensor."""
    for name in _grids_of(module):
        destination[f"{prefix}{name}"] = _encoded(getattr(module, name))


def without_schemes(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The state dict without the module's schemes, which are not for PyTorch to load."""
    own = {f"{prefix}{name}" for name in _grids_of(module)}
    return {key: value for key, value in state_dict.items() if key not in own}


def check_schemes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Refuses a state of another scheme, or one that no grid can have, before any of it is loaded; a load pre-hook.

    Raises:
        RuntimeError: a scheme in the state is not that of the module it is meant for; a scale is not finite and
            positive; a zero point is not on its grid; integers are of another dtype.
    """
    for path, child in module.named_modules():
        if "_grids" in vars(child):
            own = f"{prefix}{path}." if path else prefix
            _check_grids(child, state_dict, own)
            _check_values(child, state_dict, own)


class KeyWithHint(str):
    """A key of a state dict that is missing or not expected; PyTorch's error, which formats it, also shows a hint."""

    __slots__ = ()

    def __format__(self, specification: str) -> str:
        return (
            f"{super().__format__(specification)} [of a quantization node: the float model's state_dict loads before "
            "prepare(), or with load_float_state_dict(), which leaves activations to calibrate(); the state_dict of a "
            "model with other nodes loads where prepare() was given the same configuration]"
        )


def hint_at_reason(keys: list[str], prefix: str) -> None:
    """Has the first key of a module's that PyTorch is going to name followed by a hint, once in an error."""
    if not any(isinstance(key, KeyWithHint) for key in keys):
        for index, key in enumerate(keys):
            if key.startswith(prefix):
                keys[index] = KeyWithHint(key)
                return


def _grids_of(module: nn.Module) -> list[str]:
    return vars(module).get("_grids", [])  # type: ignore[no-any-return]


def _check_grids(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    where = prefix.removesuffix(".") or "this module"
    for name in _grids_of(module):
        scheme, saved = getattr(module, name), state_dict.get(f"{prefix}{name}")
        if saved is None or (isinstance(saved, Tensor) and torch.equal(saved.cpu(), _encoded(scheme))):
            continue
        try:
            found = str(_decoded(saved))
        except (AttributeError, TypeError, ValueError):
            numbers = saved.tolist() if isinstance(saved, Tensor) else saved
            raise RuntimeError(
                f"state_dict's {prefix}{name} must be five integers {_FIELDS}, {_encoded(scheme).tolist()} for "
                f"{scheme}, got {numbers}"
            ) from None
        raise RuntimeError(f"state_dict holds {where} quantized as {found}, expected {scheme}")


def _check_values(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    for name, own in (*module._parameters.items(), *module._buffers.items()):
        key = f"{prefix}{name}"
        saved = state_dict.get(key)
        if own is None or not isinstance(saved, Tensor) or saved.is_meta:
            continue
        if not own.is_floating_point() and saved.dtype is not own.dtype:
            raise RuntimeError(f"state_dict's {key} must be of dtype {own.dtype}, got {saved.dtype}")
        if name.endswith("scale") and not bool((torch.isfinite(saved) & (saved > 0)).all()):
            raise RuntimeError(f"state_dict's {key} must be finite and positive, got {_first_of(saved)}")
        if name.endswith("zero_point"):
            scheme = getattr(module, f"{name.removesuffix('zero_point')}grid")
            if not bool(((saved >= scheme.quant_min) & (saved <= scheme.quant_max)).all()):  # NaN is not either
                raise RuntimeError(
                    f"state_dict's {key} must lie on the grid, from {scheme.quant_min} to {scheme.quant_max}, "
                    f"got {_first_of(saved)}"
                )


def _first_of(values: Tensor) -> str:
    return f"{values.flatten()[:4].tolist()}{' and more' if values.numel() > 4 else ''}"


def _encoded(scheme: QuantizationScheme) -> Tensor:
    axis = _PER_TENSOR if scheme.channel_axis is None else scheme.channel_axis
    return torch.tensor([scheme.bits, scheme.signed, scheme.symmetric, scheme.narrow_range, axis])


def _decoded(saved: Tensor) -> QuantizationScheme:
    bits, signed, symmetric, narrow_range, axis = saved.tolist()
    return QuantizationScheme(
        bits, bool(signed), bool(symmetric), bool(narrow_range), None if axis == _PER_TENSOR else axis
    )
