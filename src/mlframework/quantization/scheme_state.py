"""What a state dict says of grids: the scheme itself, scales and zero points.

The scheme stands in the state dict and is no buffer: averages of weights and buffers, which round integers, would make
another scheme of it. With it stands the version of the format, since files of tensors alone keep no metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .scheme import QuantizationScheme
from .state_check import faults_where

FORMAT_VERSION = 1  # of all that quantization adds to a state dict

_PER_TENSOR = -100  # an axis that no tensor has
_FIELDS = "[bits, signed, symmetric, narrow_range, channel_axis]"
_LENGTH = 5


def register_scheme(module: nn.Module, name: str, scheme: QuantizationScheme) -> None:
    """Keeps ``scheme`` as an attribute of that name, ``{...}grid``, and in the module's state.

    The module's ``_save_to_state_dict`` must call :func:`save_schemes`, its ``_load_from_state_dict``
    :func:`without_schemes` and its ``state_faults`` :func:`grid_faults`.
    """
    setattr(module, name, scheme)
    vars(module).setdefault("_grids", []).append(name)


def save_schemes(module: nn.Module, destination: dict[str, Any], prefix: str) -> None:
    """Writes the module's schemes, each an int64 tensor that ends with the version of the format."""
    for name in _grids_of(module):
        destination[f"{prefix}{name}"] = torch.tensor([*_encoded(getattr(module, name)), FORMAT_VERSION])


def without_schemes(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]
) -> dict[str, Any]:
    """The state dict without the module's schemes, which are not for PyTorch to load; notes those that are missing."""
    own = {f"{prefix}{name}" for name in _grids_of(module)}
    if not _is_handed_out():
        missing_keys += sorted(own.difference(state_dict))
    return {key: value for key, value in state_dict.items() if key not in own}


def _is_handed_out() -> bool:
    """Whether the state may be what the first rank hands out to the others (``broadcast_from_rank0`` of
    torch.distributed.checkpoint): parameters and buffers alone. The first rank has checked the rest."""
    return dist.is_available() and dist.is_initialized() and dist.get_rank() > 0


def grid_faults(module: nn.Module, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Tells of schemes that are not the module's, of scales that are not finite and positive and of zero points that
    are not on their grid."""
    for name in _grids_of(module):
        if f"{prefix}{name}" in state:
            yield from _scheme_faults(getattr(module, name), state[f"{prefix}{name}"], prefix, name)
    for name, own in (*module._parameters.items(), *module._buffers.items()):
        key = f"{prefix}{name}"
        if own is not None and name.endswith("scale"):
            yield from faults_where(state, key, own, _is_scale, "be finite and positive")
        if own is not None and name.endswith("zero_point"):
            yield from _zero_point_faults(getattr(module, f"{name.removesuffix('zero_point')}grid"), state, key, own)


def _zero_point_faults(grid: QuantizationScheme, state: Mapping[str, Any], key: str, own: Tensor) -> Iterator[str]:
    lowest, highest, fixed = grid.quant_min, grid.quant_max, grid.symmetric_zero_point
    faults = list(
        faults_where(
            state,
            key,
            own,
            lambda values: (values >= lowest) & (values <= highest),
            f"lie on the grid, from {lowest} to {highest}",
        )
    )
    if grid.symmetric and not faults:
        faults += faults_where(state, key, own, lambda values: values == fixed, f"be {fixed}, as on {grid}")
    yield from faults


def _is_scale(values: Tensor) -> Tensor:
    return torch.isfinite(values) & (values > 0)


def _grids_of(module: nn.Module) -> list[str]:
    return vars(module).get("_grids", [])  # type: ignore[no-any-return]


def _scheme_faults(scheme: QuantizationScheme, saved: Any, prefix: str, name: str) -> Iterator[str]:
    if isinstance(saved, Tensor) and saved.is_meta:
        return
    got = saved.tolist() if isinstance(saved, Tensor) else saved
    numbers = got if isinstance(got, list) else []
    if len(numbers) == _LENGTH:
        numbers = [*numbers, FORMAT_VERSION]  # states once had none
    version = numbers[_LENGTH] if len(numbers) > _LENGTH else None
    if numbers == [*_encoded(scheme), FORMAT_VERSION]:
        return
    if isinstance(version, int) and version > FORMAT_VERSION:
        yield (
            f"state_dict's {prefix}{name} is of format {version}, which a newer version of this library wrote: it must "
            f"be of format {FORMAT_VERSION} at most"
        )
        return
    try:
        found = _decoded(numbers[:_LENGTH])
        if numbers != [*_encoded(found), FORMAT_VERSION]:
            raise ValueError(numbers)
    except (TypeError, ValueError):
        yield (
            f"state_dict's {prefix}{name} must be five integers {_FIELDS} and the format, "
            f"{[*_encoded(scheme), FORMAT_VERSION]} for {scheme}, got {got}"
        )
        return
    yield f"state_dict holds {prefix.removesuffix('.') or 'this module'} quantized as {found}, expected {scheme}"


def _encoded(scheme: QuantizationScheme) -> list[int]:
    axis = _PER_TENSOR if scheme.channel_axis is None else scheme.channel_axis
    return [scheme.bits, int(scheme.signed), int(scheme.symmetric), int(scheme.narrow_range), axis]


def _decoded(numbers: list[Any]) -> QuantizationScheme:
    bits, signed, symmetric, narrow_range, axis = numbers
    return QuantizationScheme(
        bits, bool(signed), bool(symmetric), bool(narrow_range), None if axis == _PER_TENSOR else axis
    )
