"""Operations other than layers as a file states them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import arithmetic
from ..int8.lookup import Lookup
from ..int8.operations import Int8Operation
from ..parameters import QuantizationParameters
from . import qdq_operators as operators
from .grid_nodes import GridNodes, OutputNodes

# Engines' own sigmoids are off by less than this.
_ERROR_OF_A_SIGMOID = 1e-6


def nodes_of(parameters: QuantizationParameters) -> GridNodes:
    """The nodes of a grid."""
    return GridNodes(parameters.scale, parameters.zero_point, parameters.scheme)


class QDQOperation(nn.Module):
    """An operation on float values between dequantize and quantize nodes.

    Sums, products and concatenations have integer forms in ONNX Runtime, whose arithmetic is this library's.
    """

    def __init__(self, node: Int8Operation, on_codes: bool) -> None:
        super().__init__()
        self.operation = node.operation
        self.inputs = nn.ModuleList(map(nodes_of, node.input_parameters))
        self.output = OutputNodes(nodes_of(node.output_parameters), node.clip, on_codes=on_codes)

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes of the inputs' grids to codes of the output's."""
        values = [nodes.dequantize(part) for nodes, part in zip(self.inputs, codes, strict=True)]  # type: ignore[operator]
        result: Tensor = self.output(self.operation.on_values(*values))
        return result


class QDQConcatenation(QDQOperation):
    """A concatenation whose parts are brought to its output's grid before."""

    def __init__(self, node: Int8Operation) -> None:
        super().__init__(node, on_codes=False)
        output = node.output_parameters
        self.changes_grid = [not _same_grid(part, output) for part in node.input_parameters]

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes of the inputs' grids to codes of the output's."""
        parts = [
            grid.quantize(nodes.dequantize(part)) if changes else part  # type: ignore[operator]
            for nodes, part, changes in zip(self.inputs, codes, self.changes_grid, strict=True)
            for grid in (self.output.grid,)
        ]
        result: Tensor = self.output(self.operation.on_values(*map(self.output.grid.dequantize, parts)))
        return result


def _same_grid(one: QuantizationParameters, other: QuantizationParameters) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


class QDQTable(nn.Module):
    """A function of each element as the table that it is: exact whatever an engine makes of the function."""

    table: Tensor

    def __init__(self, node: Int8Operation) -> None:
        super().__init__()
        (table,) = node.pack().constants
        lowest = torch.iinfo(node.input_schemes[0].dtype).min
        self.register_buffer("table", table.roll(lowest))  # entry `code % 256`

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        return operators.look_up(codes.reshape(-1), self.table).reshape(-1, *codes.shape[1:])


def fuses_exactly(node: Int8Operation) -> bool:
    """Whether ONNX Runtime, which makes tables of its own for LeakyReLU and Sigmoid, is sure to make ours."""
    assert isinstance(node.operation, Lookup)
    function, (input,), output = node.operation.function, node.input_parameters, node.output_parameters
    if input.scheme.dtype is not output.scheme.dtype:
        return False
    ends = torch.iinfo(input.scheme.dtype)
    codes = torch.arange(ends.min, ends.max + 1)
    values = arithmetic.dequantize_codes(codes, input.scale, input.zero_point, None)
    if isinstance(function, nn.LeakyReLU):  # one float32 product, the same everywhere
        (table,) = node.pack().constants
        theirs = arithmetic.quantize_values(function(values), output.scale, output.zero_point, output.scheme)
        return torch.equal(theirs, table)
    if isinstance(function, nn.Sigmoid):
        steps = function(values.double()) / output.scale
        distances = (steps - steps.floor() - 0.5).abs()  # to where the rounding changes over
        return bool((distances > _ERROR_OF_A_SIGMOID / output.scale).all())
    return False
