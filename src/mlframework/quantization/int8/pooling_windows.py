"""Where the windows of an average pooling lie, as PyTorch lays them out."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

Adaptive = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d
Fixed = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
FIXED_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def dimensions_of(pooling: Fixed | Adaptive) -> int:
    """How many spatial dimensions the pooling has."""
    kinds = ADAPTIVE_POOLS if isinstance(pooling, ADAPTIVE_POOLS) else FIXED_POOLS
    return kinds.index(type(pooling)) + 1


class Windows(NamedTuple):
    """The windows along one dimension.

    Attributes:
        starts, ends: what each covers of the input, [start, end).
        counts: as how many values each counts in the divisor, padding among them or not.
        strided: kernel, stride and padding, where windows lie as those of a convolution do; None otherwise.
    """

    starts: list[int]
    ends: list[int]
    counts: list[int]
    strided: tuple[int, int, int] | None


def windows_of(pooling: Fixed | Adaptive, sizes: list[int]) -> list[Windows]:
    """The windows along each spatial dimension of an input of these sizes."""
    if isinstance(pooling, ADAPTIVE_POOLS):
        return [
            _adaptive(size, size if target is None else target)
            for size, target in zip(sizes, _each(pooling.output_size, len(sizes)), strict=True)
        ]
    return [
        _fixed(size, *lengths, pooling.ceil_mode, pooling.count_include_pad)
        for size, lengths in zip(sizes, strides_of(pooling), strict=True)
    ]


def strides_of(pooling: Fixed) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding along each spatial dimension."""
    dimensions = dimensions_of(pooling)
    settings = (pooling.kernel_size, pooling.stride, pooling.padding)
    return list(zip(*(_each(setting, dimensions) for setting in settings), strict=True))


def divisors(pooling: Fixed | Adaptive, windows: list[Windows]) -> Tensor:
    """What the sum over each window is divided by, by its position."""
    counts = functools.reduce(
        lambda product, lengths: product.unsqueeze(-1) * lengths, (torch.tensor(window.counts) for window in windows)
    )
    divisor = getattr(pooling, "divisor_override", None)
    return counts if divisor is None else torch.full_like(counts, divisor)


def cover_everything(windows: list[Windows], sizes: list[int]) -> bool:
    """Whether there is one window, which covers the whole input and nothing else."""
    return all(
        window.starts == [0] and window.ends == window.counts == [size]
        for window, size in zip(windows, sizes, strict=True)
    )


def _each(setting: object, dimensions: int) -> tuple[int, ...]:
    return tuple(setting) if isinstance(setting, (tuple, list)) else (setting,) * dimensions  # type: ignore[return-value]


def _adaptive(size: int, target: int) -> Windows:
    starts = [index * size // target for index in range(target)]
    ends = [-(-(index + 1) * size // target) for index in range(target)]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    return Windows(starts, ends, counts, None if size % target else (size // target, size // target, 0))


def _fixed(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, count_include_pad: bool) -> Windows:
    outputs = strided = (size + 2 * padding - kernel) // stride + 1
    if ceil_mode:  # the last window starts inside the input or its left padding
        outputs = -(-(size + 2 * padding - kernel) // stride) + 1
        outputs -= (outputs - 1) * stride >= size + padding
    lefts = [index * stride - padding for index in range(outputs)]
    starts, ends = [max(left, 0) for left in lefts], [min(left + kernel, size) for left in lefts]
    if count_include_pad:
        counts = [min(left + kernel, size + padding) - left for left in lefts]
    else:
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
    return Windows(starts, ends, counts, (kernel, stride, padding) if outputs == strided else None)
