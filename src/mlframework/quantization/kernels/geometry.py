"""Where a convolution is applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ConvolutionGeometry(NamedTuple):
    """Per spatial dimension: stride, zero padding (code ``zero_point``) and dilation; and the number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def output_size(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Of an input of that size, per spatial dimension."""
        each = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)

    def as_2d(self) -> ConvolutionGeometry:
        """The same of a convolution in one dimension as one in two, on a single row."""
        if len(self.stride) == 2:
            return self
        return ConvolutionGeometry((1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)


def is_dense_or_depthwise(weight: Sequence[int], groups: int) -> bool:
    """Whether every output channel of a layer with a weight (O, I / groups, *kernel) of that shape reads all input
    channels, or every one its own."""
    return groups == 1 or (groups == weight[0] and weight[1] == 1)


POINTWISE = ConvolutionGeometry((1, 1), (0, 0), (1, 1))
