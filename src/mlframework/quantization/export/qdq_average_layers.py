"""Averages as layers, for engines whose layers compute the integer formula and whose poolings do not: weights of one
with a scale of ``1 / n``, of a linear layer where all of an axis is averaged, else of a depthwise convolution."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..int8.average_pooling import AveragePooling, Mean
from ..int8.operations import Int8Operation
from ..int8.pooling_windows import ADAPTIVE_POOLS, FIXED_POOLS, cover_everything, divisors, windows_of
from ..targets import Conventions
from .grid_nodes import OutputNodes
from .qdq_layers import Weights
from .qdq_operations import QDQOperation, nodes_of


def average_as_layer(node: Int8Operation, shapes: Iterable[torch.Size], conventions: Conventions) -> nn.Module:
    """The average as a layer; on float values where the batch is averaged or there is none, where windows differ
    in what they are divided by, and where the operation is called with several sizes.

    Args:
        node: the operation on codes.
        shapes: of its input, wherever it is called.
        conventions: how the file is written.
    """
    assert isinstance(node.operation, AveragePooling)
    pooling = node.operation.pooling
    static = {(len(shape), *shape[1:]) for shape in shapes}
    if len(static) != 1:
        return QDQOperation(node, on_codes=False)
    rank, *sizes = next(iter(static))
    if isinstance(pooling, Mean):
        dim = sorted(dimension % rank for dimension in pooling.dim)
        if 0 in dim:
            return QDQOperation(node, on_codes=False)
        if conventions.flattens_images or dim != list(range(2, rank)):
            return QDQMeanLayer(node, dim, sizes, pooling.keepdim)
        channels, *sizes = sizes
        return QDQImageMean(node, channels, sizes, pooling.keepdim)
    kinds: tuple[type[nn.Module], ...] = ADAPTIVE_POOLS if isinstance(pooling, ADAPTIVE_POOLS) else FIXED_POOLS
    if rank != kinds.index(type(pooling)) + 3:
        return QDQOperation(node, on_codes=False)
    channels, *sizes = sizes
    windows = windows_of(pooling, sizes)
    counts = divisors(pooling, windows)
    if conventions.flattens_images and cover_everything(windows, sizes) and int(counts) == math.prod(sizes):
        return QDQMeanLayer(node, list(range(2, rank)), [channels, *sizes], keepdim=True)
    strided = [window.strided for window in windows if window.strided is not None]
    if len(strided) == len(windows) and bool((counts == counts.flatten()[0]).all()):
        is_fixed = isinstance(pooling, ADAPTIVE_POOLS) or pooling.ceil_mode
        return QDQAverageLayer(node, channels, strided, int(counts.flatten()[0]), is_fixed)
    return QDQOperation(node, on_codes=False)


class QDQAverageLayer(nn.Module):
    """Averages over windows of (N, C, *size), all divided by one number.

    Args:
        node: the operation whose place it takes.
        channels: C.
        geometry: kernel, stride and padding of each dimension.
        count: what the sums are divided by.
        is_fixed: whether all of this holds for one size of the input alone.
    """

    def __init__(
        self, node: Int8Operation, channels: int, geometry: list[tuple[int, int, int]], count: int, is_fixed: bool
    ) -> None:
        super().__init__()
        self.is_fixed = is_fixed
        kernel, self.stride, self.padding = zip(*geometry, strict=True)
        self.channels = channels
        (input,) = node.input_parameters
        self.input = nodes_of(input)
        self.output = OutputNodes(nodes_of(node.output_parameters), on_codes=False)
        codes = torch.ones(channels, 1, *kernel, dtype=torch.int8)
        scale = (1 / torch.tensor(float(count))).repeat(channels)
        self.weights = Weights(codes, scale, torch.zeros(channels, dtype=torch.int32), input.scale.detach())

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        if self.is_fixed and any(isinstance(size, torch.SymInt) for size in codes.shape[2:]):
            raise NotImplementedError("an average over windows whose size follows the input's has no integer form")
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        weight, bias = self.weights()
        values = self.input.dequantize(codes)
        result: Tensor = self.output(convolution(values, weight, bias, self.stride, self.padding, 1, self.channels))
        return result


class QDQImageMean(nn.Module):
    """The mean over images of (N, C, *size), for batches of any size.

    Args:
        node: the operation whose place it takes.
        channels: C.
        sizes: of the images.
        keepdim: whether their axes stay, with size 1.
    """

    def __init__(self, node: Int8Operation, channels: int, sizes: list[int], keepdim: bool) -> None:
        super().__init__()
        self.average = QDQAverageLayer(
            node, channels, [(size, 1, 0) for size in sizes], math.prod(sizes), is_fixed=True
        )
        self.keepdim = keepdim

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        means: Tensor = self.average(codes)
        return means if self.keepdim else self.average.output.grid.move(means, lambda values: values.flatten(1))


class QDQMeanLayer(nn.Module):
    """The mean over some dimensions, which are brought last: a linear layer with one output.

    (XNNPACK's kernels of depthwise convolutions end at 25 weights.)

    Args:
        node: the operation whose place it takes.
        dim: positive, in rising order, without the batch.
        sizes: of all dimensions but the batch.
        keepdim: whether they stay, with size 1.
    """

    def __init__(self, node: Int8Operation, dim: list[int], sizes: list[int], keepdim: bool) -> None:
        super().__init__()
        kept = [dimension for dimension in range(1, len(sizes) + 1) if dimension not in dim]
        self.order = (0, *kept, *dim)
        self.averaged = [sizes[dimension - 1] for dimension in dim]
        self.shape = [1 if axis in dim else sizes[axis - 1] for axis in (range(1, len(sizes) + 1) if keepdim else kept)]
        (input,) = node.input_parameters
        self.input = nodes_of(input)
        self.output = OutputNodes(nodes_of(node.output_parameters), on_codes=False)
        count = math.prod(self.averaged)
        codes, scale = torch.ones(1, count, dtype=torch.int8), 1 / torch.tensor([float(count)])
        self.weights = Weights(codes, scale, torch.zeros(1, dtype=torch.int32), input.scale.detach())

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        if [codes.shape[axis] for axis in self.order[-len(self.averaged) :]] != self.averaged:
            raise NotImplementedError("an average over axes whose sizes follow the input's has no integer form")
        if self.order != tuple(range(codes.dim())):
            codes = self.input.move(codes, lambda values: values.permute(self.order))
        if len(self.averaged) > 1:
            codes = self.input.move(codes, lambda values: values.flatten(-len(self.averaged)))
        means: Tensor = self.output(F.linear(self.input.dequantize(codes), *self.weights()))
        return self.output.grid.move(means, lambda values: values.reshape(-1, *self.shape))
