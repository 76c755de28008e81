"""What is asked of a file before a network is changed: that it is of this network, and that its values lie on grids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph.float_structure import Record
from ..int8.layers import Int8ConvTranspose2d, Int8Layer, Int8Linear
from ..kernels import ConvolutionGeometry
from ..scheme import QuantizationScheme
from .saved_file import SavedFileError
from .vocabulary import shortened


def check_fits(path: str, saved: Mapping[str, Record], network: Mapping[str, Record]) -> None:
    """Refuses a file of another network.

    Raises:
        SavedFileError: with the first module that is another one.
    """
    if saved == network:
        return
    for name in (*saved, *network):
        if name not in network:
            what = f"it has {name or 'the network'}, a {saved[name]['class']}, and this one has not"
            raise SavedFileError(f"{path!r} is of another network: {what}")
        if name not in saved:
            what = f"this one has {name or 'the network'}, a {network[name]['class']}, and it has not"
            raise SavedFileError(f"{path!r} is of another network: {what}")
    for name, record in saved.items():
        for key in ("class", "tensors", "settings", "hooks", "methods"):
            expected, got = record.get(key), network[name].get(key)
            if expected == got:
                continue
            if isinstance(expected, dict) and isinstance(got, dict):
                key = next(each for each in (*expected, *got) if expected.get(each) != got.get(each))
                expected, got = expected.get(key), got.get(key)
            raise SavedFileError(
                f"{path!r} is of another network: {key} of {name or 'the network'} must be {shortened(expected)}, "
                f"got {shortened(got)}"
            )


def check_layers(
    path: str,
    entries: Sequence[Mapping[str, Any]],
    modules: Sequence[nn.Module],
    states: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Refuses integer layers whose tensors and settings do not belong together.

    Args:
        path: of the file.
        entries: of all modules.
        modules: bare.
        states: the attributes of each.
        tensors: by name.

    Raises:
        SavedFileError: with the first such layer.
    """
    for entry, module, state in zip(entries, modules, states, strict=True):
        if not isinstance(module, Int8Layer):
            continue
        names: Mapping[str, Any] = entry.get("buffers", {})
        weight, scale, bias = (tensors.get(names.get(name, "")) for name in ("weight", "weight_scale", "bias"))
        geometry: Any = state.get("geometry")
        if weight is None or bias is None or not (isinstance(module, Int8Linear) or _is_geometry(geometry, weight)):
            raise SavedFileError(f"{path!r}: {names.get('weight')} has a layer without its settings")
        transposed = isinstance(module, Int8ConvTranspose2d)
        channels = weight.shape[1] * geometry.groups if transposed else weight.shape[0]
        if weight.dtype is not torch.int8 or bias.dtype is not torch.int32:
            raise SavedFileError(
                f"{path!r}: {names['weight']} must be int8 with a bias of int32, got {weight.dtype} and {bias.dtype}"
            )
        if tuple(bias.shape) != (channels,) or scale is None or tuple(scale.shape) != (channels,):
            raise SavedFileError(
                f"{path!r}: {names['weight']} of {channels} channels must have a scale and a bias for each, got "
                f"{None if scale is None else tuple(scale.shape)} and {tuple(bias.shape)}"
            )
        schemes = state.get("input_scheme"), state.get("weight_scheme"), state.get("output_scheme")
        if not all(isinstance(scheme, QuantizationScheme) for scheme in schemes[: 2 + (schemes[2] is not None)]):
            raise SavedFileError(
                f"{path!r}: {names['weight']} must have grids before, of and after it, got {shortened(schemes)}"
            )
        if weight.dim() < 2 or not _are_settings(state, weight.dim() - 2):
            raise SavedFileError(
                f"{path!r}: {names['weight']} has a layer with settings that none has: {shortened(dict(state))}"
            )


def _is_geometry(geometry: Any, weight: Tensor) -> bool:
    """Whether a weight may be that of a convolution with these settings."""
    if not isinstance(geometry, ConvolutionGeometry):
        return False
    lengths = (geometry.stride, geometry.dilation, geometry.padding)
    are_right = all(
        _are_counts(each, weight.dim() - 2, lowest) for each, lowest in zip(lengths, (1, 1, 0), strict=True)
    )
    groups = geometry.groups
    return are_right and _is_count(groups, 1) and weight.shape[0] % groups == 0


def _are_settings(state: Mapping[str, Any], axes: int) -> bool:
    clip, padding, output_padding = state.get("clip"), state.get("padding", ()), state.get("output_padding", ())
    return (
        isinstance(clip, tuple)
        and len(clip) == 2
        and all(isinstance(end, (int, float)) for end in clip)
        and (not padding or _are_counts(padding, 2 * axes, 0))
        and (not output_padding or _are_counts(output_padding, axes, 0))
        and state.get("padding_mode", "zeros") in ("zeros", "reflect", "replicate", "circular")
    )


def _are_counts(numbers: Any, length: int, lowest: int) -> bool:
    return isinstance(numbers, tuple) and len(numbers) == length and all(_is_count(each, lowest) for each in numbers)


def _is_count(number: Any, lowest: int) -> bool:
    return type(number) is int and lowest <= number < 1 << 20


class _Bounded(NamedTuple):
    """A tensor whose values lie on a grid."""

    key: str
    tensor: Tensor
    grid: QuantizationScheme


def check_state(
    path: str, modules: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Refuses codes outside of their grids, scales that are not finite and positive, and zero points on no grid.

    Args:
        path: of the file.
        modules: the entries of all modules.
        states: the attributes of each.
        tensors: by name.

    Raises:
        SavedFileError: with the first such tensor.
    """
    scales: dict[str, Tensor] = {}
    bounded: list[_Bounded] = []
    for entry, state in zip(modules, states, strict=True):
        if not state:
            continue
        for name, key in (*entry.get("parameters", {}).items(), *entry.get("buffers", {}).items()):
            if key is None:
                continue
            of_scale, of_codes = _grids_of(name)
            if of_scale is not None and (of_scale in state or name == "weight_scale"):
                scales[key] = tensors[key]
            grid = state.get(of_codes)
            if isinstance(grid, QuantizationScheme):
                bounded.append(_Bounded(key, tensors[key], grid))
    for key, scale in scales.items():
        if scale.dtype is not torch.float32:
            raise SavedFileError(f"{path!r}: {key} must be float32, got {scale.dtype}")
    if scales:
        together = torch.cat(_flat(scales.values()))
        if not bool((torch.isfinite(together) & (together > 0)).all()):
            raise SavedFileError(f"{path!r}: {next(_wrong_scales(scales))}")
    for each, low, high in _extremes(bounded):
        if not each.grid.quant_min <= low <= high <= each.grid.quant_max:
            raise SavedFileError(f"{path!r}: {each.key} must lie on the grid {each.grid}, got {low:g} to {high:g}")


@lru_cache(256)
def _grids_of(name: str) -> tuple[str | None, str]:
    """The attributes that hold the grid of a tensor of that name: of one that is a scale, of one with values on it."""
    of_scale = f"{name.removesuffix('scale')}grid" if name.endswith("scale") else None
    return of_scale, "weight_scheme" if name == "weight" else f"{name.removesuffix('zero_point')}grid"


def _extremes(bounded: Iterable[_Bounded]) -> Iterator[tuple[_Bounded, float, float]]:
    """The lowest and the highest value of each tensor that may have one off its grid."""
    single: dict[torch.dtype, list[_Bounded]] = {}
    for each in bounded:
        count = each.tensor.numel()
        if count == 1:
            single.setdefault(each.tensor.dtype, []).append(each)
        elif count and (each.tensor.dtype is not each.grid.dtype or not _is_full(each.grid)):
            lowest, highest = each.tensor.aminmax()
            yield each, float(lowest), float(highest)
    for alike in single.values():  # together, for there are several to a layer
        numbers = torch.cat(_flat([each.tensor for each in alike])).double().tolist()
        yield from zip(alike, numbers, numbers, strict=True)


def _flat(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor if tensor.dim() == 1 else tensor.flatten() for tensor in tensors]


def _wrong_scales(scales: Mapping[str, Tensor]) -> Iterator[str]:
    for key, scale in scales.items():
        wrong = ~(torch.isfinite(scale) & (scale > 0))
        if bool(wrong.any()):
            yield f"{key} must be finite and positive, got {scale[wrong][:4].tolist()}"


def _is_full(grid: QuantizationScheme) -> bool:
    """Whether every number of its dtype is on the grid."""
    return grid.bits == torch.iinfo(grid.dtype).bits and not grid.narrow_range
