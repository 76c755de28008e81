"""Averages as a file states them for ONNX Runtime to compute the integer formula.

Its average pooling adds up floats, and takes 8 to 24 times as long as the depthwise convolution with weights of one
that stands here in its place. Its global average pooling is the integer formula itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import arithmetic
from ..int8.average_pooling import AveragePooling, Mean, takes_all
from ..int8.operations import Int8Operation
from ..int8.pooling_windows import (
    ADAPTIVE_POOLS,
    Adaptive,
    Fixed,
    Windows,
    cover_everything,
    dimensions_of,
    divisors,
    strides_of,
    windows_of,
)
from . import qdq_operators as operators
from .grid_nodes import OutputNodes, UnitNodes
from .qdq_operations import QDQOperation, nodes_of


def average(node: Int8Operation, shapes: Iterable[torch.Size]) -> nn.Module:
    """What computes an average exactly in ONNX Runtime; as floats where the batch is averaged or there is none, and
    where the operation is called with several sizes that need several forms.

    Args:
        node: the operation on codes.
        shapes: of its input, wherever it is called.
    """
    assert isinstance(node.operation, AveragePooling)
    pooling = node.operation.pooling
    static = {(len(shape), *shape[1:]) for shape in shapes}
    ranks = {rank for rank, *_ in static}
    if len(ranks) != 1:
        return QDQOperation(node, on_codes=True)
    (rank,) = ranks
    if isinstance(pooling, Mean):
        dim = tuple(sorted(dimension % rank for dimension in pooling.dim))
        return QDQOperation(node, on_codes=True) if 0 in dim else QDQMean(node, dim, pooling.keepdim)
    if rank != dimensions_of(pooling) + 2:
        return QDQOperation(node, on_codes=True)
    if isinstance(pooling, ADAPTIVE_POOLS) and takes_all(pooling):
        return QDQMean(node, tuple(range(2, rank)), keepdim=True)
    if len(static) != 1:
        return QDQOperation(node, on_codes=True)
    _, channels, *sizes = next(iter(static))
    return QDQAverage(_of_these_sizes(node, pooling, channels, sizes), _of_any_size(node, pooling, channels), pooling)


def _of_these_sizes(node: Int8Operation, pooling: Fixed | Adaptive, channels: int, sizes: list[int]) -> nn.Module:
    windows = windows_of(pooling, sizes)
    counts = divisors(pooling, windows)
    if cover_everything(windows, sizes) and int(counts) == math.prod(sizes):
        return QDQMean(node, tuple(range(2, 2 + len(sizes))), keepdim=True)
    strided = [window.strided for window in windows if window.strided is not None]
    if len(strided) == len(windows) and bool((counts == counts.flatten()[0]).all()):
        return QDQEvenWindows(node, channels, strided, counts.flatten()[0])
    return QDQUnevenWindows(node, windows, sizes, counts)


def _of_any_size(node: Int8Operation, pooling: Fixed | Adaptive, channels: int) -> nn.Module | None:
    """The form whose windows and divisor do not depend on the size; None where they do."""
    if isinstance(pooling, ADAPTIVE_POOLS):
        return None
    geometry = strides_of(pooling)
    padded = any(padding for _, _, padding in geometry)
    divisor: int | None = getattr(pooling, "divisor_override", None)
    if pooling.ceil_mode or (padded and divisor is None and not pooling.count_include_pad):
        return None
    count = math.prod(kernel for kernel, _, _ in geometry) if divisor is None else divisor
    return QDQEvenWindows(node, channels, geometry, torch.tensor(count))


class QDQAverage(nn.Module):
    """Averages over windows in the form for the example's sizes; where the file takes any size, in one for all.

    Args:
        these: for the sizes of the example.
        any_size: for all sizes; None where there is no exact one.
        pooling: what both compute.
    """

    def __init__(self, these: nn.Module, any_size: nn.Module | None, pooling: Fixed | Adaptive) -> None:
        super().__init__()
        self.these = these
        self.any_size = any_size
        self.description = str(pooling)
        self.dimensions = dimensions_of(pooling)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's.

        Raises:
            ValueError: sizes that are averaged over are unknown, and the windows depend on them.
        """
        form = self.these
        if any(isinstance(size, torch.SymInt) for size in codes.shape[-self.dimensions :]):
            if self.any_size is None:
                raise ValueError(f"the windows of {self.description} depend on sizes that dynamic_shapes leave open")
            form = self.any_size
        result: Tensor = form(codes)
        return result


class QDQMean(nn.Module):
    """The mean over some dimensions as ``GlobalAveragePool``.

    Args:
        node: the operation whose place it takes.
        dim: positive, in rising order.
        keepdim: whether they stay, with size 1.
    """

    def __init__(self, node: Int8Operation, dim: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.dim = dim
        self.keepdim = keepdim
        self.input = nodes_of(node.input_parameters[0])
        self.output = OutputNodes(nodes_of(node.output_parameters), on_codes=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        sizes = codes.shape
        kept = [dimension for dimension in range(1, codes.dim()) if dimension not in self.dim]
        if kept != [1]:
            codes = self._with_means_last(codes, kept)
        means: Tensor = self.output(operators.global_average_pool(self.input.dequantize(codes)))
        shape = [1 if dimension in self.dim else sizes[dimension] for dimension in range(1, len(sizes))]
        if not self.keepdim:
            shape = [sizes[dimension] for dimension in kept]
        if len(shape) == means.dim() - 1 and list(means.shape[1:]) == shape:
            return means
        return self.output.grid.move(means, lambda values: values.reshape(-1, *shape))

    def _with_means_last(self, codes: Tensor, kept: list[int]) -> Tensor:
        """(N, kept, averaged), all of them in one dimension each."""
        channels, length = (math.prod(codes.shape[dimension] for dimension in group) for group in (kept, self.dim))
        order = (0, *kept, *self.dim)
        if order != tuple(range(codes.dim())):
            codes = self.input.move(codes, lambda values: values.permute(order))
        return self.input.move(codes, lambda values: values.reshape(-1, channels, length))


class QDQEvenWindows(nn.Module):
    """Averages over windows of (N, C, *size), all divided by one number: a convolution with weights of one.

    Args:
        node: the operation whose place it takes.
        channels: C.
        geometry: kernel, stride and padding of each dimension.
        count: what the sums are divided by.
    """

    weight: Tensor
    zero_point: Tensor
    multiplier: Tensor

    def __init__(self, node: Int8Operation, channels: int, geometry: list[tuple[int, int, int]], count: Tensor) -> None:
        super().__init__()
        kernel, self.stride, self.padding = zip(*geometry, strict=True)
        (input,), output = node.input_parameters, node.output_parameters
        self.input = UnitNodes(nodes_of(input))
        self.output = OutputNodes(UnitNodes(nodes_of(output)), on_codes=True)
        self.register_buffer("weight", torch.ones(channels, 1, *kernel, dtype=torch.int8))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))
        multiplier = arithmetic.average_multiplier(input.scale, output.scale, count)
        self.register_buffer("multiplier", multiplier.reshape(()))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        weight = operators.dequantize(self.weight, self.multiplier, self.zero_point)
        values = self.input.dequantize(codes)
        result: Tensor = self.output(
            convolution(values, weight, None, self.stride, self.padding, 1, self.weight.shape[0])
        )
        return result


class QDQUnevenWindows(nn.Module):
    """Averages over windows that are divided by different numbers: sums as products with matrices of zeros and ones,
    exact in float32, times a multiplier for every window.

    Args:
        node: the operation whose place it takes.
        windows: along each of the last dimensions.
        sizes: of those dimensions in the input.
        counts: what each window's sum is divided by, by position.
    """

    multiplier: Tensor

    def __init__(self, node: Int8Operation, windows: list[Windows], sizes: list[int], counts: Tensor) -> None:
        super().__init__()
        (input,), output = node.input_parameters, node.output_parameters
        self.input = UnitNodes(nodes_of(input))
        self.output = OutputNodes(UnitNodes(nodes_of(output)), on_codes=True)
        self.register_buffer("multiplier", arithmetic.average_multiplier(input.scale, output.scale, counts))
        self.dimensions = len(windows)
        for dimension, (window, size) in enumerate(zip(windows, sizes, strict=True)):
            inside = torch.zeros(size, len(window.starts))
            for column, (start, end) in enumerate(zip(window.starts, window.ends, strict=True)):
                inside[start:end, column] = 1
            self.register_buffer(f"inside_{dimension}", inside)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        sums = self.input.dequantize(codes)
        for dimension in range(self.dimensions):
            axis = codes.dim() - self.dimensions + dimension
            inside: Tensor = getattr(self, f"inside_{dimension}")
            sums = (sums.transpose(axis, -1) @ inside).transpose(axis, -1)
        result: Tensor = self.output(sums * self.multiplier)
        return result
