"""Averages of codes: exact integer sums over windows, requantized with the window's size in the multiplier."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import arithmetic
from .integer_operation import Ends, Grid, IntegerOperation

Adaptive = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d
Fixed = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
FIXED_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


# Sums over smaller windows are float32 numbers.
_LARGEST_WINDOW = 2**24 // 255

_ADAPTIVE_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)


class Mean(nn.Module):
    """:func:`torch.mean` over given dimensions, as a module."""

    def __init__(self, dim: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.dim = dim
        self.keepdim = keepdim

    def forward(self, input: Tensor) -> Tensor:
        return input.mean(self.dim, self.keepdim)


class AveragePooling(IntegerOperation):
    r"""Averages over windows: :math:`q_y = \mathrm{requantize}(\sum (q_x - z_x))` with the multiplier
    :math:`s_x / (s_y n)` for a window of n values, as ONNX Runtime's ``QLinearGlobalAveragePool``.

    Args:
        pooling: average pooling, adaptive average pooling, or :class:`Mean`.
    """

    kind = "average pool"

    def __init__(self, pooling: Fixed | Adaptive | Mean) -> None:
        self.pooling = pooling

    def on_values(self, *values: Tensor) -> Tensor:
        result: Tensor = self.pooling(*values)
        return result

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        return inputs[0].zero_point.to(torch.int32), inputs[0].scale

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        zero_point, scale = constants
        sums, counts = self._sums_and_counts(codes[0], zero_point)
        multiplier = arithmetic.average_multiplier(scale, output.scale, counts)
        return arithmetic.requantize_accumulator(sums, multiplier, output.zero_point, *ends, output.scheme.dtype)

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.pooling,)

    def _sums_and_counts(self, codes: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Exact sums of ``codes - zero_point`` over the windows, and what each is divided by; they broadcast."""
        pooling = self.pooling
        if isinstance(pooling, Mean):
            count = 1
            for dim in pooling.dim:
                count *= codes.shape[dim]
            sums = codes.sum(pooling.dim, pooling.keepdim, dtype=torch.int32) - zero_point * count
            return sums, torch.full_like(zero_point, count, dtype=torch.float32)
        values = codes.to(torch.float32) - zero_point
        if isinstance(pooling, ADAPTIVE_POOLS):
            counts = _adaptive_counts(codes, pooling)
            pool = _ADAPTIVE_FUNCTIONS[ADAPTIVE_POOLS.index(type(pooling))]
            with torch.autocast(codes.device.type, enabled=False):
                return (pool(values.double(), pooling.output_size) * counts).round(), counts
        if _window_size(pooling) >= _LARGEST_WINDOW:
            values = values.double()
        sums = _window_sums(values, pooling)
        counts = _fixed_counts(values, pooling, sums)
        return sums, counts


def _adaptive_counts(codes: Tensor, pooling: Adaptive) -> Tensor:
    """Window sizes, over the spatial dimensions: output i of n covers inputs floor(i S / n) to ceil((i + 1) S / n)."""
    dimensions = ADAPTIVE_POOLS.index(type(pooling)) + 1
    sizes = codes.shape[-dimensions:]
    wanted = (
        pooling.output_size if isinstance(pooling.output_size, (tuple, list)) else (pooling.output_size,) * dimensions
    )
    lengths = []
    for size, target in zip(sizes, wanted, strict=True):
        target = size if target is None else target
        index = torch.arange(target, device=codes.device)
        lengths.append(torch.ceil((index + 1) * size / target) - torch.floor(index * size / target))
    return functools.reduce(lambda counts, length: counts.unsqueeze(-1) * length, lengths)


def _window_size(pooling: Fixed) -> int:
    """How many values one window holds at the most."""
    dimensions = FIXED_POOLS.index(type(pooling)) + 1
    size = pooling.kernel_size
    return size**dimensions if isinstance(size, int) else math.prod(size)


def _window_sums(values: Tensor, pooling: Fixed, padded: bool = True) -> Tensor:
    """Sums over the windows of a pooling, in the dtype of the values."""
    settings: list[Any] = [pooling.kernel_size, pooling.stride, pooling.padding if padded else 0]
    if not isinstance(pooling, nn.AvgPool1d):
        pool: Callable[..., Tensor] = F.avg_pool2d if isinstance(pooling, nn.AvgPool2d) else F.avg_pool3d
        return pool(values, *settings, pooling.ceil_mode, True, 1)
    # In one dimension there is no divisor to choose: a pooling of images one pixel high has one.
    lengths = [setting if isinstance(setting, int) else setting[0] for setting in settings]
    kernel_size, stride, padding = zip((1, 1, 0), lengths, strict=True)
    return F.avg_pool2d(values.unsqueeze(-2), kernel_size, stride, padding, pooling.ceil_mode, True, 1).squeeze(-2)


def _fixed_counts(values: Tensor, pooling: Fixed, sums: Tensor) -> Tensor:
    """What the windows' sums are divided by: the values inside, padding included or not, or a divisor of the user's."""
    divisor = getattr(pooling, "divisor_override", None)
    if divisor is not None:
        return values.new_full((), divisor)
    dimensions = FIXED_POOLS.index(type(pooling)) + 1
    ones = torch.ones((1, *values.shape[-dimensions:]), device=values.device)
    if not pooling.count_include_pad:
        return _window_sums(ones, pooling)
    padding = (pooling.padding,) * dimensions if isinstance(pooling.padding, int) else pooling.padding
    padded = F.pad(ones, [side for p in reversed(padding) for side in (p, p)], value=1.0)
    counts = _window_sums(padded, pooling, False)
    # No window begins in the padding on the right; where that is part of the image, some do.
    within = (slice(None), *(slice(size) for size in sums.shape[-dimensions:]))
    return counts[within]
