"""Averages of codes: exact integer sums over windows, requantized with the window's size in the multiplier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import arithmetic, kernels
from .instruction import Instruction, Settings
from .integer_operation import Ends, Grid, IntegerOperation
from .pooling_windows import ADAPTIVE_POOLS, Adaptive, Fixed, dimensions_of, divisors, windows_of

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
    multiplier_of = staticmethod(arithmetic.average_multiplier)

    def __init__(self, pooling: Fixed | Adaptive | Mean) -> None:
        self.pooling = pooling

    def on_values(self, *values: Tensor) -> Tensor:
        result: Tensor = self.pooling(*values)
        return result

    def constants(self, inputs: Sequence[Grid], output: Grid) -> tuple[Tensor, ...]:
        return inputs[0].zero_point.to(torch.int32), inputs[0].scale

    def on_codes(self, codes: Sequence[Tensor], constants: tuple[Tensor, ...], output: Grid, ends: Ends) -> Tensor:
        zero_point, scale = constants
        if self.instruction_name is not None:
            dimensions = dimensions_of(self.pooling)  # type: ignore[arg-type]
            images = codes[0] if codes[0].dim() == dimensions + 2 else codes[0].unsqueeze(0)
            averages = kernels.average_positions(
                images, zero_point, scale, output.scale, output.zero_point, *ends, output.scheme.dtype
            )
            return averages.reshape(*codes[0].shape[:-dimensions], *[1] * dimensions)
        sums, counts = self._sums_and_counts(codes[0], zero_point)
        multiplier = self.multiplier_of(scale, output.scale, counts)
        return arithmetic.requantize_accumulator(sums, multiplier, output.zero_point, *ends, output.scheme.dtype)

    @property
    def instruction_name(self) -> str | None:
        return "average" if isinstance(self.pooling, ADAPTIVE_POOLS) and takes_all(self.pooling) else None

    def instruction(self, constants: tuple[Tensor, ...], output: Grid, ends: tuple[int, int]) -> Instruction | None:
        tensors = (*constants, output.scale, output.zero_point)
        numbers = (dimensions_of(self.pooling), *ends, output.scheme.dtype.is_signed)  # type: ignore[arg-type]
        return Instruction("average", tensors, numbers)

    def settings(self) -> tuple[Settings, ...]:
        return Settings(self, ("pooling",)), Settings(self.pooling, ("output_size",))

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
        dimensions = dimensions_of(pooling)
        counts = divisors(pooling, windows_of(pooling, list(codes.shape[-dimensions:]))).to(codes.device)
        if isinstance(pooling, ADAPTIVE_POOLS):
            with torch.autocast(codes.device.type, enabled=False):
                averages = _ADAPTIVE_FUNCTIONS[dimensions - 1](values.double(), pooling.output_size)
            return (averages * counts).round(), counts
        if _window_size(pooling) >= _LARGEST_WINDOW:
            values = values.double()
        return _window_sums(values, pooling), counts


def takes_all(pooling: Adaptive) -> bool:
    """Whether the whole image is one window."""
    wanted = pooling.output_size
    return wanted == 1 or (isinstance(wanted, (tuple, list)) and set(wanted) == {1})


def _window_size(pooling: Fixed) -> int:
    """How many values one window holds at the most."""
    size = pooling.kernel_size
    return size ** dimensions_of(pooling) if isinstance(size, int) else math.prod(size)


def _window_sums(values: Tensor, pooling: Fixed) -> Tensor:
    """Sums over the windows of a pooling, in the dtype of the values."""
    settings: list[Any] = [pooling.kernel_size, pooling.stride, pooling.padding]
    if not isinstance(pooling, nn.AvgPool1d):
        pool: Callable[..., Tensor] = F.avg_pool2d if isinstance(pooling, nn.AvgPool2d) else F.avg_pool3d
        return pool(values, *settings, pooling.ceil_mode, True, 1)
    # In one dimension there is no divisor to choose: a pooling of images one pixel high has one.
    lengths = [setting if isinstance(setting, int) else setting[0] for setting in settings]
    kernel_size, stride, padding = zip((1, 1, 0), lengths, strict=True)
    return F.avg_pool2d(values.unsqueeze(-2), kernel_size, stride, padding, pooling.ceil_mode, True, 1).squeeze(-2)
