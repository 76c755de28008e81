"""A layer as a matrix product: its inputs as rows, its weight as a matrix for each group of channels."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..qat.layer_types import layer_type_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_product(layer: nn.Module) -> bool:
    """Whether :func:`rows_of` and :func:`matrix_of` know the layer: linear layers and convolutions."""
    kind = layer_type_of(layer)
    return kind is not None and kind.application is not None and not isinstance(layer, nn.ConvTranspose2d)


def rows_of(layer: Any, input: Tensor, most: int | None = None) -> Tensor:
    """What the layer multiplies by its weight, one row for each position, in groups: (G, N, D).

    Args:
        layer: of the kinds that :func:`is_product` knows.
        input: as the layer is called with.
        most: about as many rows as are wanted, and less than twice as many at the most, evenly spaced; None for all.
    """
    if not isinstance(layer, _CONVOLUTIONS):
        return _thinned(input.reshape(1, -1, input.shape[-1]), most)
    size = len(layer.kernel_size)
    windows = _windows(layer, input if input.dim() == size + 2 else input[None])
    batch, channels, *rest = windows.shape
    # (N, C, *positions, *kernel) to (positions and batch, groups, channels of a group, *kernel)
    grouped = windows.reshape(batch, layer.groups, channels // layer.groups, *rest)
    places = [0, *range(3, 3 + size)]
    rows = grouped.permute(1, *places, 2, *range(3 + size, 3 + 2 * size))
    longest = max(range(1, size + 2), key=lambda axis: rows.shape[axis])
    if most is not None:  # along one axis first, before windows are copied
        count = math.prod(rows.shape[1 : size + 2])
        step = max(1, min(rows.shape[longest], count // most))
        rows = rows[(slice(None),) * longest + (slice(None, None, step),)]
    length = channels // layer.groups * math.prod(layer.kernel_size)
    return _thinned(rows.reshape(layer.groups, -1, length), most)


def _windows(layer: Any, input: Tensor) -> Tensor:
    """(N, C, *size) to the windows that the kernel meets: (N, C, *positions, *kernel)."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    else:
        input = F.pad(input, [amount for amount in reversed(layer.padding) for _ in range(2)])
    for axis, (length, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        input = input.unfold(axis, dilation * (length - 1) + 1, stride)[..., ::dilation]
    return input


def _thinned(rows: Tensor, most: int | None) -> Tensor:
    return rows if most is None else rows[:, :: max(1, rows.shape[1] // most)]


def matrix_of(layer: Any, weight: Tensor) -> Tensor:
    """The weight as (groups, outputs of a group, inputs of an output)."""
    groups, outputs = getattr(layer, "groups", 1), _outputs_first(layer, weight)
    return outputs.reshape(groups, outputs.shape[0] // groups, -1)


def weight_of(layer: Any, matrix: Tensor, like: Tensor) -> Tensor:
    """The weight that :func:`matrix_of` makes ``matrix`` of, in the shape of ``like``."""
    kind = layer_type_of(layer)
    assert kind is not None
    return matrix.reshape(_outputs_first(layer, like).shape).movedim(0, kind.output_axis)


def _outputs_first(layer: Any, weight: Tensor) -> Tensor:
    kind = layer_type_of(layer)
    assert kind is not None
    return weight.movedim(kind.output_axis, 0)
