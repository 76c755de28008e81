"""Functions of single elements, sums, products and averages; on floats, but where LiteRT has them on codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .fused_output import FusedOutput, finished, fused_output, output_of
from .layers import padded
from .moves import as_images, as_pair, check_factors, from_images, window, with_rank
from .values import Value, Values, arguments, channels_last, constant, in_order, integers, sizes_of

Emitter = Callable[[Values, fx.Node], Value]


def binary(name: str, options: str, on_codes: bool = False) -> Emitter:
    """An operation on two tensors, with broadcasting.

    Args:
        name: of LiteRT's operator.
        options: the class of its options.
        on_codes: whether it is one of integers between codes that go on a grid.
    """

    def emit(values: Values, node: fx.Node) -> Value:
        parts, factor = node.args[:2], arguments(node).get("alpha", 1)
        fused = fused_output(node) if on_codes and factor == 1 and _are_codes(values, parts) else None
        if fused is not None:
            return _combined(values, name, options, values[parts[0]], values[parts[1]], fused)
        dtype = node.meta["val"].dtype
        first, second, factor = (values.cast(values.floats(part), dtype) for part in (*parts, factor))
        if factor.data is None or factor.data != 1:
            second = _combined(values, "MUL", "MulOptions", second, factor)
        return _combined(values, name, options, first, second)

    return emit


def unary(name: str, options: str | None = None, **fields: Any) -> Emitter:
    """A function of each element, on floats."""

    def emit(values: Values, node: fx.Node) -> Value:
        value = values.floats(node.args[0])
        made = None if options is None else values.model.options(options, **fields)
        return values.operator(name, [value], values.like(value), made)

    return emit


def relu(values: Values, node: fx.Node) -> Value:
    """On codes as well: zero is one of them."""
    value = values[node.args[0]]
    return values.operator("RELU", [value], values.like(value))


def clamp(values: Values, node: fx.Node) -> Value:
    """``hardtanh`` and ``clamp``: between two numbers, of which one may be missing."""
    input, low, high = arguments(node).values()
    value = values.floats(input)
    if (low, high) == (0, 6):
        return values.operator("RELU6", [value], values.like(value))
    for name, end in (("MAXIMUM", low), ("MINIMUM", high)):
        if end is not None:
            value = _combined(values, name, "MaximumMinimumOptions", value, values[end])
    return value


def leaky_relu(values: Values, node: fx.Node) -> Value:
    """With its slope as an option."""
    return unary("LEAKY_RELU", "LeakyReluOptions", alpha=float(arguments(node)["negative_slope"]))(values, node)


def gelu(values: Values, node: fx.Node) -> Value:
    """Exact, or by the approximation with tanh."""
    return unary("GELU", "GeluOptions", approximate=arguments(node)["approximate"] == "tanh")(values, node)


def elu(values: Values, node: fx.Node) -> Value:
    """Of unit slope and size."""
    if set(list(arguments(node).values())[1:]) != {1}:
        raise values.refusal("it has ELU with a factor of one alone")
    return unary("ELU")(values, node)


def prelu(values: Values, node: fx.Node) -> Value:
    """A slope for each channel, or one for all."""
    value, slope = (values.floats(part) for part in node.args)
    return _combined(values, "PRELU", None, value, slope)


def softmax(values: Values, node: fx.Node) -> Value:
    """Over one axis, which is brought last."""
    value = values.floats(node.args[0])
    rank = len(value.shape)
    dim = arguments(node)["dim"] % rank
    if value.axes[-1] != dim:
        value = values.arranged(value, (*(axis for axis in range(rank) if axis != dim), dim))
    return values.operator("SOFTMAX", [value], values.like(value), values.model.options("SoftmaxOptions", beta=1.0))


def safe_softmax(values: Values, node: fx.Node) -> Value:
    """That of attention: zeros in rows of which all is masked, where a softmax has none."""
    result = softmax(values, node)
    if _leaves_a_score(values, node.args[0], arguments(node)["dim"]):
        return result
    scores = values.arranged(values.floats(node.args[0]), result.axes)
    masked = values.new(scores.shape, scores.axes, dtype=torch.bool)
    values.operator("EQUAL", [scores, constant(torch.tensor(-math.inf))], masked, values.model.options("EqualOptions"))
    options = values.model.options("SelectV2Options")
    return values.operator("SELECT_V2", [masked, constant(torch.zeros(())), result], values.like(result), options)


def _leaves_a_score(values: Values, scores: Any, dim: int) -> bool:
    """Whether no mask was added to the scores of attention, or a constant one that has more than ``-inf`` everywhere
    along an axis."""
    assert isinstance(scores, fx.Node)
    if scores.target is not torch.ops.aten.add.Tensor:
        return True
    masks = [data for node in scores.all_input_nodes if (data := values.known(node)) is not None]
    return any(bool((data.amax(dim) > -math.inf).all()) for data in masks)


def cast(values: Values, node: fx.Node) -> Value:
    """To another dtype."""
    return values.cast(values.floats(node.args[0]), node.meta["val"].dtype)


def where(values: Values, node: fx.Node) -> Value:
    """Of two tensors, by a third of booleans, with broadcasting."""
    dtype = node.meta["val"].dtype
    condition, *others = (values.floats(part) for part in node.args)
    parts = [condition, *(values.cast(part, dtype) for part in others)]
    rank = max(len(part.shape) for part in parts)
    ranked = [values.arranged(with_rank(values, part, rank), in_order(rank)) for part in parts]
    output = values.new(sizes_of(node), dtype=dtype)
    return values.operator("SELECT_V2", ranked, output, values.model.options("SelectV2Options"))


def reduction(name: str) -> Emitter:
    """Over some axes, which stay with length 1 or go."""

    def emit(values: Values, node: fx.Node) -> Value:
        value, given = values.floats(node.args[0]), arguments(node)
        rank = len(value.shape)
        dims = [dim % rank for dim in _as_list(given["dim"]) or range(rank)]
        return _reduced(values, name, value, dims, given["keepdim"])

    return emit


def average_pool(values: Values, node: fx.Node) -> Value:
    """``avg_pool2d`` of floats, whose windows count what is padded, or have no padding."""
    given = arguments(node)
    kernel, edges = as_pair(given["kernel_size"]), as_pair(given["padding"])
    stride = as_pair(given["stride"] or kernel)
    skips = any(edges) and not given["count_include_pad"]
    if skips or given["ceil_mode"] or given["divisor_override"] is not None:
        raise values.refusal("its averages divide by the size of the window")
    value = as_images(values, values.floats(given["self"]))
    if any(edges):
        value = padded(values, value, [(0, 0), (0, 0), *((edge, edge) for edge in edges)])
    result = sizes_of(node)
    output = values.like(value, (*value.shape[:2], *result[-2:]))
    values.operator("AVERAGE_POOL_2D", [value], output, window(values, kernel, stride))
    return from_images(values, output, result)


def bilinear(values: Values, node: fx.Node) -> Value:
    """``upsample_bilinear2d``, with its corners on the corners or its pixels in their middles."""
    value = values.arranged(values.floats(node.args[0]), channels_last(4))
    aligned = bool(arguments(node)["align_corners"])
    if not aligned:
        check_factors(values, node)
    options = values.model.options("ResizeBilinearOptions", alignCorners=aligned, halfPixelCenters=not aligned)
    shape = sizes_of(node)
    return values.operator("RESIZE_BILINEAR", [value, integers(shape[2:])], values.like(value, shape), options)


def batch_norm(values: Values, node: fx.Node) -> list[Value]:
    """In evaluation mode: ``x * a + b`` for each channel, as PyTorch's kernel has it."""
    given = arguments(node)
    value = values.floats(given["input"])
    names = [name for name in ("weight", "bias", "running_mean", "running_var") if given[name] is not None]
    parts = {name: data for name in names if (data := values.floats(given[name]).data) is not None}
    if len(parts) < len(names):
        raise values.refusal("its statistics, weight and bias are to be constants")
    mean, variance = parts["running_mean"], parts["running_var"]
    weight, bias = parts.get("weight"), parts.get("bias")
    factor = 1 / torch.sqrt(variance + given["eps"])
    if weight is not None:
        factor = factor * weight
    shift = -mean * factor if bias is None else bias - mean * factor
    shape = [1, -1, *[1] * (len(value.shape) - 2)]
    scaled = _combined(values, "MUL", "MulOptions", value, constant(factor.reshape(shape)))
    return [_combined(values, "ADD", "AddOptions", scaled, constant(shift.reshape(shape)))]


def layer_norm(values: Values, node: fx.Node) -> list[Value]:
    """Over the last axes: ``(x - mean) / sqrt(variance + eps) * weight + bias``."""
    given = arguments(node)
    value = values.floats(given["input"])
    rank = len(value.shape)
    dims = list(range(rank - len(given["normalized_shape"]), rank))
    mean = _reduced(values, "MEAN", value, dims, True)
    centred = _combined(values, "SUB", "SubOptions", value, mean)
    square = _combined(values, "MUL", "MulOptions", centred, centred)
    variance = _reduced(values, "MEAN", square, dims, True)
    variance = _combined(values, "ADD", "AddOptions", variance, values[given["eps"]])
    inverse = values.operator("RSQRT", [variance], values.like(variance))
    result = _combined(values, "MUL", "MulOptions", centred, inverse)
    for name, options, part in (("MUL", "MulOptions", "weight"), ("ADD", "AddOptions", "bias")):
        if given[part] is not None:
            result = _combined(values, name, options, result, values.floats(given[part]))
    return [result]


def product(values: Values, node: fx.Node) -> Value:
    """``mm`` and ``bmm``, of floats."""
    operands = [values.floats(part) for part in node.args]
    operands = [values.arranged(operand, in_order(len(operand.shape))) for operand in operands]
    options = values.model.options("BatchMatMulOptions")
    return values.operator("BATCH_MATMUL", operands, values.new(sizes_of(node)), options)


def _combined(
    values: Values, name: str, options: str | None, first: Value, second: Value, fused: FusedOutput | None = None
) -> Value:
    """A binary operator on operands that are brought to one rank and order."""
    operands = [first, second]
    rank = max(len(operand.shape) for operand in operands)
    shape: tuple[int, ...] = tuple(torch.broadcast_shapes(first.shape, second.shape))  # type: ignore[no-untyped-call]
    leading = next((part for part in operands if len(part.shape) == rank and part.data is None), None)
    axes = in_order(rank) if leading is None else leading.axes
    arranged = [
        operand if not operand.shape else values.arranged(with_rank(values, operand, rank), axes)
        for operand in operands
    ]
    if fused is None:
        made = None if options is None else values.model.options(options)
        return values.operator(name, arranged, values.new(shape, axes, dtype=first.dtype), made)
    output, activation = output_of(values, shape, axes, fused)
    assert options is not None
    made = values.model.options(options, fusedActivationFunction=activation)
    return finished(values, values.operator(name, arranged, output, made), fused)


def _reduced(values: Values, name: str, value: Value, dims: Sequence[int], keeps: bool) -> Value:
    places = integers([value.axes.index(dim) for dim in dims])
    axes, shape = value.axes, tuple(1 if axis in dims else size for axis, size in enumerate(value.shape))
    if not keeps:
        left = [axis for axis in range(len(value.shape)) if axis not in dims]
        axes = tuple(left.index(axis) for axis in value.axes if axis in left)
        shape = tuple(value.shape[axis] for axis in left)
    options = values.model.options("ReducerOptions", keepDims=keeps)
    return values.operator(name, [value, places], values.new(shape, axes, dtype=value.dtype), options)


def _as_list(numbers: Any) -> list[int]:
    """One number as a list of it, and none as an empty one."""
    return [] if numbers is None else [numbers] if isinstance(numbers, int) else list(numbers)


def _are_codes(values: Values, parts: Sequence[Any]) -> bool:
    return all(isinstance(part, fx.Node) and values[part].grid is not None for part in parts)
