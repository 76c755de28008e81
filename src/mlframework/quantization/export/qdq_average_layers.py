"""Averages as depthwise convolutions, for engines whose convolutions compute the integer formula and whose poolings do
not: weights of one with a scale of ``1 / n``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..int8.average_pooling import AveragePooling, Mean
from ..int8.operations import Int8Operation
from ..int8.pooling_windows import ADAPTIVE_POOLS, FIXED_POOLS, divisors, windows_of
from .grid_nodes import OutputNodes
from .qdq_layers import Weights
from .qdq_operations import QDQOperation, nodes_of


def average_as_layer(node: Int8Operation, shapes: Iterable[torch.Size]) -> nn.Module:
    """The average as a convolution; on float values where the batch is averaged or there is none, where windows differ
    in what they are divided by, and where the operation is called with several sizes.

    Args:
        node: the operation on codes.
        shapes: of its input, wherever it is called.
    """
    assert isinstance(node.operation, AveragePooling)
    pooling = node.operation.pooling
    static = {(len(shape), *shape[1:]) for shape in shapes}
    if len(static) != 1:
        return QDQOperation(node, on_codes=False)
    rank, *sizes = next(iter(static))
    if isinstance(pooling, Mean):
        dim = sorted(dimension % rank for dimension in pooling.dim)
        return QDQOperation(node, on_codes=False) if 0 in dim else QDQMeanLayer(node, dim, sizes, pooling.keepdim)
    kinds: tuple[type[nn.Module], ...] = ADAPTIVE_POOLS if isinstance(pooling, ADAPTIVE_POOLS) else FIXED_POOLS
    if rank != kinds.index(type(pooling)) + 3:
        return QDQOperation(node, on_codes=False)
    channels, *sizes = sizes
    windows = windows_of(pooling, sizes)
    counts = divisors(pooling, windows)
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


class QDQMeanLayer(nn.Module):
    """The mean over some dimensions, which are brought last.

    Args:
        node: the operation whose place it takes.
        dim: positive, in rising order, without the batch.
        sizes: of all dimensions but the batch.
        keepdim: whether they stay, with size 1.
    """

    def __init__(self, node: Int8Operation, dim: list[int], sizes: list[int], keepdim: bool) -> None:
        super().__init__()
        rank = len(sizes) + 1
        kept = [dimension for dimension in range(1, rank) if dimension not in dim]
        channels, averaged = ([sizes[dimension - 1] for dimension in group] for group in (kept, dim))
        self.order = (0, *kept, *dim)
        self.is_image = kept == [1] and rank in (3, 4, 5)
        self.folded = (math.prod(channels), math.prod(averaged))
        geometry = [(size, 1, 0) for size in (averaged if self.is_image else self.folded[1:])]
        self.average = QDQAverageLayer(node, self.folded[0], geometry, self.folded[1], is_fixed=True)
        self.shape = [1 if dimension in dim else sizes[dimension - 1] for dimension in range(1, rank)]
        if not keepdim:
            self.shape = channels
        self.keeps_shape = keepdim and self.is_image

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the input's grid to codes of the output's."""
        if not self.is_image:
            if self.order != tuple(range(codes.dim())):
                codes = self.average.input.move(codes, lambda values: values.permute(self.order))
            codes = self.average.input.move(codes, lambda values: values.reshape(-1, *self.folded))
        means: Tensor = self.average(codes)
        if self.keeps_shape:
            return means
        return self.average.output.grid.move(means, lambda values: values.reshape(-1, *self.shape))
