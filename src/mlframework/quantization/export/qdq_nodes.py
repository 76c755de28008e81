"""What stands between layers, as a file states it: into codes, out of codes, and what leaves them on their grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..int8.operations import Dequantize, Int8ReLU, Int8Selection, Quantize
from . import qdq_operators as operators
from .grid_nodes import GridNodes, OutputNodes, in_dtype


class QDQQuantize(nn.Module):
    """Float values to codes."""

    def __init__(self, node: Quantize, on_codes: bool) -> None:
        super().__init__()
        self.output = OutputNodes(GridNodes(node.scale, node.zero_point, node.scheme), on_codes=on_codes)

    def forward(self, values: Tensor) -> Tensor:
        """Values to codes."""
        codes: Tensor = self.output(values)
        return codes


class QDQDequantize(nn.Module):
    """Codes to float values."""

    def __init__(self, node: Dequantize) -> None:
        super().__init__()
        self.input = GridNodes(node.scale, node.zero_point, node.scheme)
        self.float_dtype = node.float_dtype

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to values."""
        return in_dtype(self.input.dequantize(codes), self.float_dtype)


class QDQReLU(nn.Module):
    """A ReLU that leaves codes on their grid."""

    def __init__(self, node: Int8ReLU, on_codes: bool) -> None:
        super().__init__()
        self.grid = GridNodes(node.scale, node.zero_point, node.scheme)
        lowest = torch.iinfo(node.scheme.dtype).min
        self.is_identity = bool((node.zero_point == lowest).all())
        self.on_codes = on_codes and node.scheme.channel_axis is None

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        if self.is_identity:
            return codes
        if self.on_codes:
            highest = torch.tensor(torch.iinfo(codes.dtype).max, dtype=codes.dtype)
            return operators.clip_codes(codes, self.grid.zero_point, highest)
        return self.grid.move(codes, torch.relu)


class QDQSelection(nn.Module):
    """Max pooling, padding and the like, on values between nodes of one grid; engines run what they can on the codes.

    Args:
        grid: of the codes that come in, and so of those that go out.
        selection: the operation on floats.
    """

    def __init__(self, grid: GridNodes, selection: nn.Module) -> None:
        super().__init__()
        self.grid = grid
        self.selection = selection

    @classmethod
    def of(cls, node: Int8Selection) -> QDQSelection:
        """In the place of an integer selection."""
        return cls(GridNodes(node.scale, node.zero_point, node.scheme), node.selection)

    def forward(self, codes: Tensor, *others: Any) -> Any:
        """Codes to codes; to several tensors of them where the operation divides its input."""
        values = self.selection(self.grid.dequantize(codes), *others)
        return self.grid.quantize(values) if isinstance(values, Tensor) else tuple(map(self.grid.quantize, values))
