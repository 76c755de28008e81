"""The integer grid: how many bits, which codes, and which axis has a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizationScheme:
    r"""An integer grid: the codes that a quantized tensor may hold.

    Args:
        bits: width of a code, 2 to 8.
        signed: codes from :math:`-2^{b-1}` (stored as ``torch.int8``) or from 0 (stored as ``torch.uint8``).
        symmetric: the zero point is fixed at code 0 and only the scale is free. Of an unsigned symmetric grid,
            which holds values that are never negative (after a ReLU, say), negative values saturate at zero.
        narrow_range: leave out the lowest code, so that a signed grid is closed under negation ([-127, 127]).
        channel_axis: the axis along which every channel has its own scale and zero point; ``None`` is per tensor.

    Raises:
        TypeError: a field is not of its type.
        ValueError: ``bits`` is not within 2 and 8.

    Example:
        >>> QuantizationScheme(bits=4, narrow_range=True).quant_min
        -7
        >>> QuantizationScheme(signed=False).dtype
        torch.uint8
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow_range: bool = False
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"bits must be an int, got {self.bits!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be between 2 and 8, got {self.bits}")
        for name in ("signed", "symmetric", "narrow_range"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        axis = self.channel_axis
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise TypeError(f"channel_axis must be an int or None, got {axis!r}")

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest + int(self.narrow_range)

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that stores the codes: ``torch.int8`` or ``torch.uint8``."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def symmetric_zero_point(self) -> int:
        """The code of the value zero on a symmetric grid: 0, or the lowest code where 0 is not on the grid."""
        return max(self.quant_min, 0)

    def resolve_channel_axis(self, dimensions: int) -> int | None:
        """``channel_axis`` as a non-negative axis of a tensor of that many dimensions.

        Raises:
            ValueError: the axis is out of range for such a tensor.
        """
        axis = self.channel_axis
        if axis is None:
            return None
        if not -dimensions <= axis < dimensions:
            raise ValueError(
                f"channel_axis {axis} is out of range for a tensor of {dimensions} dimensions "
                f"(expected {-dimensions} to {dimensions - 1})"
            )
        return axis % dimensions

    def __str__(self) -> str:
        grid = f"{'int' if self.signed else 'uint'}{self.bits}"
        kind = "symmetric" if self.symmetric else "affine"
        extent = "per tensor" if self.channel_axis is None else f"per channel {self.channel_axis}"
        return f"{grid} [{self.quant_min}, {self.quant_max}] {kind}, {extent}"
