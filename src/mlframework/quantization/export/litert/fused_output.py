"""What an operator on codes takes up of the nodes behind it: an activation, and the grid that its result goes on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from ..qdq_program import constant_of
from .flat_model import Grid
from .values import Value, Values, arguments, constant

_decomposed: Any = torch.ops.quantized_decomposed
QUANTIZE = _decomposed.quantize_per_tensor.default
DEQUANTIZE = _decomposed.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = _decomposed.dequantize_per_channel.default
_aten: Any = torch.ops.aten
_RANGES = {(0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}


class FusedOutput(NamedTuple):
    """The nodes that become part of an operator.

    Attributes:
        nodes: the activation, where there is one, and the quantize node.
        activation: as LiteRT's schema calls it.
        grid: of the codes.
        ends: the lowest and the highest code where these are not the activation's.
    """

    nodes: tuple[fx.Node, ...]
    activation: str
    grid: Grid
    ends: tuple[int, int] | None = None


def fused_output(node: fx.Node) -> FusedOutput | None:
    """What stands behind an operator that computes on codes; None where its floats are read by others."""
    reader = _only_reader(node)
    if reader is None:
        return None
    if reader.target is QUANTIZE:
        return FusedOutput((reader,), "NONE", grid_of(reader))
    quantize = _only_reader(reader)
    if quantize is None or quantize.target is not QUANTIZE:
        return None
    nodes, grid = (reader, quantize), grid_of(quantize)
    if reader.target is _aten.relu.default:
        return FusedOutput(nodes, "RELU", grid)
    if reader.target in (_aten.hardtanh.default, _aten.clamp.default):
        _, low, high = arguments(reader).values()
        activation = _RANGES.get((low, high))
        return FusedOutput(nodes, activation or "NONE", grid, None if activation else _codes_of(grid, low, high))
    return None


def output_of(
    values: Values, shape: tuple[int, ...], axes: tuple[int, ...], fused: FusedOutput | None
) -> tuple[Value, int]:
    """The output of an operator, and its activation's number. What is left to do is :func:`finished`'s."""
    activations = values.model.schema.ActivationFunctionType
    if fused is None:
        return values.new(shape, axes), activations.NONE
    return values.new(shape, axes, grid=fused.grid), getattr(activations, fused.activation)


def finished(values: Values, output: Value, fused: FusedOutput | None) -> Value:
    """An operator's output, cut off at its ends, as that of the nodes that the operator takes up, too."""
    if fused is None:
        return output
    if fused.ends is not None:
        for name, end in zip(("MAXIMUM", "MINIMUM"), fused.ends, strict=True):
            code = constant(torch.tensor(end, dtype=torch.int8), fused.grid)
            options = values.model.options("MaximumMinimumOptions")
            output = values.operator(name, [output, code], values.like(output), options)
    for part in fused.nodes:
        values[part] = output
    return output


def grid_of(node: fx.Node) -> Grid:
    """The grid of a node that quantizes or dequantizes a tensor."""
    given = arguments(node)
    return Grid((float(given["scale"]),), (int(given["zero_point"]),))


def channel_grid_of(program: torch.export.ExportedProgram, node: fx.Node) -> Grid:
    """The grids of the channels of a constant that a node dequantizes."""
    given = arguments(node)
    scales, zero_points = (constant_of(program, given[name]) for name in ("scales", "zero_points"))
    assert scales is not None
    if zero_points is None:  # as a bias has it
        zero_points = torch.zeros_like(scales)
    return Grid(tuple(scales.tolist()), tuple(map(int, zero_points.tolist())), given["axis"])


def _codes_of(grid: Grid, low: float | None, high: float | None) -> tuple[int, int]:
    """The codes of two values, at most those that there are."""
    (scale,), (zero_point,), _ = grid
    lowest, highest = (
        end if value is None else round(value / scale) + zero_point for value, end in ((low, -128), (high, 127))
    )
    return max(lowest, -128), min(highest, 127)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
