"""Operations that move or select values: on codes as on floats, since the grid stays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .layers import padded
from .values import (
    Axes,
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


def reshape(values: Values, node: fx.Node) -> Value:
    """``view``, ``squeeze``, ``unsqueeze`` and the like: the same elements, in order, in another shape."""
    value = values[node.args[0]]
    shape = sizes_of(node)
    if value.data is not None:
        return constant_like(value, value.data.reshape(shape))
    value = values.arranged(value, in_order(len(value.shape)))
    return value if value.shape == shape else values.reshape(value, values.like(value, shape))


def permute(values: Values, node: fx.Node) -> Value:
    """``permute``: nothing moves in memory before someone needs it to."""
    value = values[node.args[0]]
    order = [axis % len(value.shape) for axis in arguments(node)["dims"]]
    if value.data is not None:
        return constant_like(value, value.data.permute(order))
    shape = tuple(value.shape[axis] for axis in order)
    return dataclasses.replace(value, shape=shape, axes=tuple(order.index(axis) for axis in value.axes))


def cat(values: Values, node: fx.Node) -> Value:
    """``cat``: on codes where all parts are of one grid."""
    given = arguments(node)
    tensors = [part for part in given["tensors"] if values[part].shape != (0,)]  # which PyTorch passes over
    if not tensors:
        raise values.refusal("there is nothing in it")
    parts = [values[part] for part in tensors]
    if parts[0].grid is None or len({part.grid for part in parts}) > 1:
        dtype = node.meta["val"].dtype
        parts = [values.cast(values.floats(part), dtype) for part in tensors]
    axes = parts[0].axes
    arranged = [values.arranged(part, axes) for part in parts]
    options = values.model.options("ConcatenationOptions", axis=axes.index(given["dim"] % len(axes)))
    return values.operator("CONCATENATION", arranged, values.like(parts[0], sizes_of(node), axes), options)


def narrow(values: Values, node: fx.Node) -> Value:
    """``slice``: indices ``start:end:step`` along one axis."""
    given = arguments(node)
    value = values[given["self"]]
    dim = given["dim"] % len(value.shape)
    start, end, step = slice(given["start"], given["end"], given["step"]).indices(value.shape[dim])
    return _strided(values, value, dim, start, end, step)


def select(values: Values, node: fx.Node) -> Value:
    """``select``: one index of one axis, which goes."""
    given = arguments(node)
    value = values[given["self"]]
    dim = given["dim"] % len(value.shape)
    start = given["index"] % value.shape[dim]
    part = _strided(values, value, dim, start, start + 1)
    return values.reshape(part, values.like(part, sizes_of(node), without(part.axes, dim)))


def split(values: Values, node: fx.Node) -> list[Value]:
    """``split_with_sizes``: parts of these lengths along an axis."""
    given = arguments(node)
    value = values[given["self"]]
    dim = given["dim"] % len(value.shape)
    parts, start = [], 0
    for length in given["split_sizes"]:
        parts.append(_strided(values, value, dim, start, start + length))
        start += length
    return parts


def pad(values: Values, node: fx.Node) -> Value:
    """``constant_pad_nd``: of codes with zeros alone, whose code the operator takes by itself."""
    given = arguments(node)
    value = values[given["self"]] if given["value"] == 0 else values.floats(given["self"])
    ends = _ends(value, given["pad"])
    for dim, pair in enumerate(ends):
        if min(pair) < 0:  # an edge is cut off
            start, cut = (max(-end, 0) for end in pair)
            value = _strided(values, value, dim, start, value.shape[dim] - cut)
    ends = [(max(before, 0), max(behind, 0)) for before, behind in ends]
    if given["value"] == 0:
        return padded(values, value, ends)
    return padded(values, value, ends, "PADV2", values[given["value"]])


def mirror(values: Values, node: fx.Node) -> Value:
    """``reflection_pad``: the values beside an edge once more, mirrored."""
    given = arguments(node)
    value = values[given["self"]]
    ends = _ends(value, given["padding"])
    numbers = constant(torch.tensor([ends[axis] for axis in value.axes], dtype=torch.int32))
    options = values.model.options("MirrorPadOptions", mode=values.model.schema.MirrorPadMode.REFLECT)
    return values.operator("MIRROR_PAD", [value, numbers], values.like(value, sizes_of(node), value.axes), options)


def expand(values: Values, node: fx.Node) -> Value:
    """``expand``: axes of length 1 repeated."""
    value, shape = values[node.args[0]], sizes_of(node)
    if value.data is not None:
        return constant_like(value, value.data.expand(shape).contiguous())
    if value.shape == shape:
        return value
    value = with_rank(values, value, len(shape))
    output = values.like(value, shape, value.axes)
    options = values.model.options("BroadcastToOptions")
    return values.operator("BROADCAST_TO", [value, integers(output.lies)], output, options)


def max_pool(values: Values, node: fx.Node) -> Value:
    """``max_pool2d``, whose padding is below every value."""
    given = arguments(node)
    if as_pair(given["dilation"]) != (1, 1):
        raise values.refusal("its pooling has no dilation")
    kernel, edges = as_pair(given["kernel_size"]), as_pair(given["padding"])
    stride = as_pair(given["stride"] or kernel)
    value = as_images(values, values[given["self"]])
    result = tuple(tree_leaves(node.meta["val"])[0].shape)
    shape = (*value.shape[:2], *result[-2:])
    # What is added behind the image lets a last window begin within it, as ceil_mode does.
    ends = [
        (edge, max((count - 1) * step + width - size - edge, 0))
        for count, step, width, size, edge in zip(shape[2:], stride, kernel, value.shape[2:], edges, strict=True)
    ]
    if any(map(any, ends)):
        lowest = torch.tensor(-128, dtype=torch.int8) if value.grid is not None else torch.tensor(-math.inf)
        value = padded(values, value, [(0, 0), (0, 0), *ends], "PADV2", constant(lowest, value.grid))
    output = values.operator("MAX_POOL_2D", [value], values.like(value, shape), window(values, kernel, stride))
    return from_images(values, output, result)


def max_pool_alone(values: Values, node: fx.Node) -> list[Value]:
    """``max_pool2d_with_indices``, of which the indices have no form: what pooling of one dimension is made of."""
    return [max_pool(values, node)]


def nearest(values: Values, node: fx.Node) -> Value:
    """``upsample_nearest2d`` by a whole number: each value several times over."""
    value = values.arranged(values[node.args[0]], channels_last(4))
    shape = sizes_of(node)
    check_factors(values, node)
    if any(size % length for size, length in zip(shape[2:], value.shape[2:], strict=True)):
        raise values.refusal("images become larger by a whole number of times alone")
    options = values.model.options("ResizeNearestNeighborOptions")
    output = values.like(value, shape)
    return values.operator("RESIZE_NEAREST_NEIGHBOR", [value, integers(shape[2:])], output, options)


def check_factors(values: Values, node: fx.Node) -> None:
    """Refuses to resize by factors that are not those of the sizes, which is what LiteRT goes by."""
    given = arguments(node)
    sizes = zip(sizes_of(node)[2:], values[given["input"]].shape[2:], strict=True)
    factors = given["scale_factors"]
    if factors is not None and any(
        factor * length != size for factor, (size, length) in zip(factors, sizes, strict=True)
    ):
        raise values.refusal("it resizes by the quotients of the sizes alone (recompute_scale_factor=True)")


def rows(values: Values, node: fx.Node) -> Value:
    """``embedding``: rows of a table, of which codes stay codes."""
    given = arguments(node)
    table, indices = values[given["weight"]], values[given["indices"]]
    if table.grid is not None and len(table.grid.scale) > 1:
        table = values.floats(given["weight"])
    table, indices = (values.arranged(part, in_order(len(part.shape))) for part in (table, indices))
    options = values.model.options("GatherOptions", axis=0)
    return values.operator("GATHER", [table, indices], values.like(table, sizes_of(node)), options)


def same(values: Values, node: fx.Node) -> Value:
    """What changes no value: ``clone``, ``detach`` and the like."""
    return values[node.args[0]]


def with_rank(values: Values, value: Value, rank: int) -> Value:
    """The value with axes of length 1 before its own."""
    more = rank - len(value.shape)
    if more == 0:
        return value
    shape = (*[1] * more, *value.shape)
    if value.data is not None:
        return constant_like(value, value.data.reshape(shape))
    axes: Axes = (*range(more), *(axis + more for axis in value.axes))
    return values.reshape(value, values.like(value, shape, axes))


def as_images(values: Values, value: Value) -> Value:
    """(N, C, H, W), or (C, H, W) without a batch, with channels last."""
    return values.arranged(with_rank(values, value, 4), channels_last(4))


def from_images(values: Values, value: Value, shape: tuple[int, ...]) -> Value:
    """(N, C, H, W) without the batch where ``shape`` has none."""
    if value.shape == shape:
        return value
    return values.reshape(value, values.like(value, shape, without(value.axes, 0)))


def window(values: Values, kernel: tuple[int, int], stride: tuple[int, int]) -> Any:
    """The options of pooling without padding."""
    return values.model.options(
        "Pool2DOptions",
        padding=values.model.schema.Padding.VALID,
        strideH=stride[0],
        strideW=stride[1],
        filterHeight=kernel[0],
        filterWidth=kernel[1],
    )


def as_pair(numbers: Any) -> tuple[int, int]:
    """Down and across, where one number may stand for both."""
    first, *second = [numbers] if isinstance(numbers, int) else numbers
    return int(first), int(second[0] if second else first)


def _strided(values: Values, value: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
    count = len(range(start, end, step))
    shape = (*value.shape[:dim], count, *value.shape[dim + 1 :])
    begins, ends, steps = [0] * len(shape), list(value.lies), [1] * len(shape)
    place = value.axes.index(dim)
    begins[place], ends[place], steps[place] = start, end, step
    options = values.model.options("StridedSliceOptions")
    numbers = map(integers, (begins, ends, steps))
    return values.operator("STRIDED_SLICE", [value, *numbers], values.like(value, shape, value.axes), options)


def _ends(value: Value, widths: Sequence[int]) -> list[tuple[int, int]]:
    """PyTorch's widths, which begin with the last axis, for each axis."""
    rank = len(value.shape)
    ends = [(0, 0)] * rank
    for index, pair in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        ends[rank - 1 - index] = pair
    return ends
