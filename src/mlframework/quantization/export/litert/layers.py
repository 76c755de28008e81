"""Convolutions and linear layers: on codes where their input and weights are codes, on floats where both are floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from .fused_output import FusedOutput, finished, fused_output, output_of
from .values import (
    Value,
    Values,
    arguments,
    channels_last,
    constant,
    constant_like,
    in_order,
    integers,
    sizes_of,
    without,
)

_IMAGE = 4  # dimensions of what LiteRT's convolutions take


class _Layer(NamedTuple):
    """A convolution over images.

    Attributes:
        operands: images, weights and a bias.
        shape: of the result.
        fused: what becomes part of it.
        stride, padding, dilation: down and across.
        groups: of channels.
    """

    operands: list[Value]
    shape: tuple[int, ...]
    fused: FusedOutput | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def convolution(values: Values, node: fx.Node) -> Value:
    """``aten.convolution``: (N, I, *size) to (N, O, *size'); of one or two dimensions."""
    given = arguments(node)
    operands, fused = _operands(values, node, given)
    sizes = sizes_of(node)
    if len(sizes) not in (_IMAGE - 1, _IMAGE):
        raise values.refusal(f"its convolutions have two dimensions, got {len(sizes) - 2}")
    stride, padding, dilation = (
        _as_pair(given[name], alone) for name, alone in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    shape = sizes if len(sizes) == _IMAGE else (*sizes[:2], 1, sizes[2])
    if len(operands) == 2:  # LiteRT wants a bias
        operands.append(constant(torch.zeros(sizes[1])))
    images = [_as_image(values, operand) for operand in operands]
    layer = _Layer(images, shape, fused, stride, padding, dilation, given["groups"])
    output = _transposed(values, layer) if given["transposed"] else _direct(values, layer)
    return finished(values, output if len(sizes) == _IMAGE else _as_line(values, output), fused)


def linear(values: Values, node: fx.Node) -> Value:
    """``aten.linear``: (*, I) to (*, O)."""
    (data, *others), fused = _operands(values, node, arguments(node))
    rank = len(data.shape)
    if data.axes[-1] != rank - 1:
        data = values.arranged(data, in_order(rank))
    output, activation = output_of(values, sizes_of(node), data.axes, fused)
    options = values.model.options("FullyConnectedOptions", fusedActivationFunction=activation, keepNumDims=rank > 2)
    return finished(values, values.operator("FULLY_CONNECTED", [data, *others], output, options), fused)


def _operands(values: Values, node: fx.Node, given: dict[str, Any]) -> tuple[list[Value], FusedOutput | None]:
    """Input, weight and, where there is one, bias; and what becomes part of the layer: None for floats.

    Raises:
        NotExportableError: the layer was to be one of integers, and LiteRT would compute it in floats.
    """
    operands = [given[name] for name in ("input", "weight", "bias") if given[name] is not None]
    if values[given["weight"]].grid is None:
        return [values.floats(operand) for operand in operands], None
    fused = fused_output(node)
    if values[given["input"]].grid is None or fused is None:
        raise values.refusal("its input or its output has no grid, and it would be computed in floats")
    return [values[operand] for operand in operands], fused


def _direct(values: Values, layer: _Layer) -> Value:
    data, weights, bias = layer.operands
    data = values.arranged(data, channels_last(_IMAGE))
    scheme = values.model.schema.Padding.VALID
    if _is_same(layer, data.shape[2:], weights.shape[2:]):
        scheme = values.model.schema.Padding.SAME
    elif any(layer.padding):
        data = padded(values, data, [(0, 0), (0, 0), *((edge, edge) for edge in layer.padding)])
    output, activation = output_of(values, layer.shape, channels_last(_IMAGE), layer.fused)
    fields = {
        "padding": scheme,
        "strideH": layer.stride[0],
        "strideW": layer.stride[1],
        "dilationHFactor": layer.dilation[0],
        "dilationWFactor": layer.dilation[1],
        "fusedActivationFunction": activation,
    }
    if layer.groups > 1 and layer.groups == data.shape[1]:
        weights = values.arranged(weights, (1, 2, 3, 0))
        multiplier = layer.shape[1] // layer.groups
        options = values.model.options("DepthwiseConv2DOptions", depthMultiplier=multiplier, **fields)
        return values.operator("DEPTHWISE_CONV_2D", [data, weights, bias], output, options)
    weights = values.arranged(weights, channels_last(_IMAGE))
    options = values.model.options("Conv2DOptions", **fields)
    return values.operator("CONV_2D", [data, weights, bias], output, options)


def _transposed(values: Values, layer: _Layer) -> Value:
    """A transposed convolution without padding, of whose output the edges are cut."""
    data, weights, bias = layer.operands
    if layer.dilation != (1, 1) or layer.groups != 1:
        raise values.refusal("its transposed convolutions have neither dilation nor groups")
    data = values.arranged(data, channels_last(_IMAGE))
    weights = values.arranged(weights, (1, 2, 3, 0))
    # Output padding is what rows of zeros behind the image would add.
    wanted = [edge + size for edge, size in zip(layer.padding, layer.shape[2:], strict=True)]
    more = [
        max(0, -(-(end - (size - 1) * step - kernel) // step))
        for end, size, step, kernel in zip(wanted, data.shape[2:], layer.stride, weights.shape[2:], strict=True)
    ]
    if any(more):
        data = padded(values, data, [(0, 0), (0, 0), *((0, rows) for rows in more)])
    down, across = (
        (size - 1) * step + kernel
        for size, step, kernel in zip(data.shape[2:], layer.stride, weights.shape[2:], strict=True)
    )
    output, activation = output_of(values, (*layer.shape[:2], down, across), channels_last(_IMAGE), layer.fused)
    options = values.model.options(
        "TransposeConvOptions",
        padding=values.model.schema.Padding.VALID,
        strideH=layer.stride[0],
        strideW=layer.stride[1],
        fusedActivationFunction=activation,
    )
    values.operator("TRANSPOSE_CONV", [integers(output.lies), weights, data, bias], output, options)
    if (down, across) == layer.shape[2:]:
        return output
    cut = values.like(output, layer.shape)
    begin = integers([0, *layer.padding, 0])
    return values.operator("SLICE", [output, begin, integers(cut.lies)], cut, values.model.options("SliceOptions"))


def padded(
    values: Values, data: Value, ends: Sequence[tuple[int, int]], operator: str = "PAD", *filling: Value
) -> Value:
    """A value with more before and behind each of its axes: zeros, or the code of zero, unless ``filling`` says other.

    Args:
        values: the values so far.
        data: what is padded.
        ends: how many before and how many behind, for each axis of the program.
        operator: ``"PAD"``, or ``"PADV2"`` with a value to fill in.
        filling: that value.
    """
    shape = [size + before + behind for size, (before, behind) in zip(data.shape, ends, strict=True)]
    numbers = integers([end for axis in data.axes for end in ends[axis]])
    assert numbers.data is not None
    numbers = constant_like(numbers, numbers.data.reshape(-1, 2))
    options = values.model.options("PadOptions" if operator == "PAD" else "PadV2Options")
    return values.operator(operator, [data, numbers, *filling], values.like(data, shape, data.axes), options)


def _is_same(layer: _Layer, sizes: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether padding on both sides is what LiteRT's ``SAME`` comes to, which puts an odd one behind."""
    for size, width, result, step, before, distance in zip(
        sizes, kernel, layer.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True
    ):
        total = max((-(-size // step) - 1) * step + (width - 1) * distance + 1 - size, 0)
        if result != -(-size // step) or total // 2 != before:
            return False
    return any(layer.padding)


def _as_pair(numbers: Sequence[int], alone: int) -> tuple[int, int]:
    """Down and across; of a line, whose first is ``alone``, across."""
    down, across = (alone, *numbers) if len(numbers) == 1 else numbers
    return down, across


def _as_image(values: Values, value: Value) -> Value:
    """(N, C, length) as (N, C, 1, length); all else as it is."""
    if len(value.shape) != _IMAGE - 1:
        return value
    count, channels, length = value.shape
    shape = (count, channels, 1, length)
    if value.data is not None:
        return constant_like(value, value.data.reshape(shape))
    known = values.reshaped_from(value)
    if known is not None and known.shape == shape and without(known.axes, 2) == value.axes:
        return known
    value = values.arranged(value, channels_last(_IMAGE - 1))
    return values.reshape(value, values.like(value, shape, channels_last(_IMAGE)))


def _as_line(values: Values, value: Value) -> Value:
    """(N, C, 1, length) as (N, C, length)."""
    count, channels, _, length = value.shape
    return values.reshape(value, values.like(value, (count, channels, length), channels_last(_IMAGE - 1)))
