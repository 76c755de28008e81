"""Quantize and dequantize nodes of one grid, and what an engine is told about codes that saturate before its ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import arithmetic
from ..scheme import QuantizationScheme
from . import qdq_operators as operators


def in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values cast to a dtype; where they have it, no cast, of which the exporter would make two nodes."""
    return values if values.dtype is dtype else values.to(dtype)


class GridNodes(nn.Module):
    """A grid with the nodes into and out of it.

    Args:
        scale: float32, (1,) or (C,).
        zero_point: integer, of the same shape.
        scheme: the grid; the scale and zero point of a grid per tensor get rank 0 in the file, because ONNX Runtime
            fuses additions and multiplications only then.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, scheme: QuantizationScheme) -> None:
        super().__init__()
        self.scheme = scheme
        shape = () if scheme.channel_axis is None else scale.shape
        self.register_buffer("scale", scale.detach().to(torch.float32).reshape(shape).clone())
        self.register_buffer("zero_point", zero_point.detach().to(scheme.dtype).reshape(shape).clone())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Scale (1,) or (C,), and the zero point as int32: as the arithmetic takes them."""
        return self.scale.reshape(-1), self.zero_point.reshape(-1).to(torch.int32)

    def _axis(self, dimensions: int) -> int:
        axis = self.scheme.resolve_channel_axis(dimensions)
        return operators.PER_TENSOR if axis is None else axis

    def quantize(self, values: Tensor) -> Tensor:
        """Float values to codes, saturating at the ends of the dtype."""
        values = in_dtype(values, torch.float32)
        return operators.quantize(values, self.scale, self.zero_point, self._axis(values.dim()))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes to float32 values."""
        return operators.dequantize(codes, self.scale, self.zero_point, self._axis(codes.dim()))

    def move(self, codes: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """An operation that moves or selects values, between nodes as engines want it; they run it on the codes."""
        return self.quantize(function(self.dequantize(codes)))


class UnitNodes(GridNodes):
    """Nodes of scale 1, between which the values are the codes themselves, less the zero point.

    What an exact integer formula multiplies its sums by can then be written as one float32 number, where between nodes
    of the true scales ONNX Runtime would make it up of three.
    """

    def __init__(self, like: GridNodes) -> None:
        super().__init__(torch.ones(1), like.zero_point.reshape(1), like.scheme)


class OutputNodes(nn.Module):
    """From an operation's float values to codes of its output's grid, a clipping activation included.

    Args:
        grid: of the output; per channel only where no activation comes with it.
        clip: the range of the activation; infinite ends for none.
        on_codes: clip codes where the activation or a grid of fewer bits ends before the dtype does. Exact, and the
            operation still fuses with its quantize node, as ONNX Runtime needs it. Otherwise values are clipped before
            they are quantized, which other engines recognize.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, grid: GridNodes, clip: tuple[float, float] = (-math.inf, math.inf), *, on_codes: bool) -> None:
        super().__init__()
        self.grid = grid
        scheme, zero = grid.scheme, int(grid.zero_point.reshape(-1)[0])
        # Of a grid per channel, the ends are the same for all channels.
        lowest, highest = (int(end[0]) for end in arithmetic.codes_of_clip(clip, *grid.tensors(), scheme))
        ends = torch.iinfo(scheme.dtype)
        # A ReLU that has nothing left to do, because no code lies below that of zero, is absorbed by every engine.
        self.relu = clip[0] == 0 and (zero == ends.min or not on_codes)
        clips = (lowest, highest) != ((zero if self.relu else ends.min), ends.max)
        self.value_range: tuple[float, float] | None = None
        self.clips_codes = clips and (on_codes or scheme.channel_axis is not None)
        if self.clips_codes:
            self.register_buffer("lowest", torch.tensor(lowest, dtype=scheme.dtype))
            self.register_buffer("highest", torch.tensor(highest, dtype=scheme.dtype))
        elif clips:
            self.relu = False
            scale = float(grid.scale)
            self.value_range = ((lowest - zero) * scale, (highest - zero) * scale)

    def forward(self, values: Tensor) -> Tensor:
        """Values to codes."""
        if self.relu:
            values = torch.relu(values)
        if self.value_range is not None:
            values = F.hardtanh(values, *self.value_range)  # which XNNPACK fuses, and clamp not
        codes = self.grid.quantize(values)
        return operators.clip_codes(codes, self.lowest, self.highest) if self.clips_codes else codes
