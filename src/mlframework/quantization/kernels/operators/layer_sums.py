r"""What layers on codes have in common: exact integer sums, and how their operators are given a geometry.

With the codes of an input on the grid :math:`(s_x, z_x)` and the codes of a weight with scale :math:`s_w`,

.. math:: a = \sum (q_x - z_x)\, q_w + b,\qquad y = a\,(s_x s_w)
   \qquad\text{or}\qquad q_y = \mathrm{rne}(\mathrm{clamp}(a\, m)) + z_y.

A geometry of empty lists is a linear layer's: codes (*, I) and a weight (O, I). Otherwise codes are (N, C, *size) and
the weight is (O, I / groups, *kernel), in one or two dimensions; the output then lies in memory channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import ConvolutionGeometry
from .layout import with_channels_last

# In a schema.
GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"

Ints = Sequence[int]


def geometry_arguments(geometry: ConvolutionGeometry | None) -> tuple[Ints, Ints, Ints, int]:
    """As the operators take it."""
    return ((), (), (), 1) if geometry is None else geometry


def exact_sums(
    codes: Tensor,
    zero_point: int | Tensor,
    weight: Tensor,
    geometry: tuple[Ints, Ints, Ints, int],
    output_padding: Ints | None = None,
) -> Tensor:
    """Exact sums, as int32; with an ``output_padding``, of a transposed convolution."""
    values, weights = codes.double() - zero_point, weight.double()
    with torch.autocast(codes.device.type, enabled=False):
        if not geometry[0]:
            sums = F.linear(values, weights)
        elif output_padding is not None:
            stride, padding, dilation, groups = geometry
            sums = F.conv_transpose2d(values, weights, None, stride, padding, output_padding, groups, dilation)
        else:
            convolution = (F.conv1d, F.conv2d, F.conv3d)[len(geometry[0]) - 1]
            sums = convolution(values, weights, None, *geometry)
    return with_channels_last(sums.round().to(torch.int32)) if geometry[0] else sums.round().to(torch.int32)


def output_like(
    codes: Tensor, channels: int, kernel: Ints, geometry: tuple[Ints, Ints, Ints, int], dtype: torch.dtype
) -> Tensor:
    """An output on fake tensors."""
    if not geometry[0]:
        return codes.new_empty((*codes.shape[:-1], channels), dtype=dtype)
    size = ConvolutionGeometry(*map(tuple, geometry[:3])).output_size(tuple(codes.shape[2:]), tuple(kernel))  # type: ignore[arg-type]
    return codes.new_empty((codes.shape[0], *size, channels), dtype=dtype).movedim(-1, 1)


def channel_axis_of(geometry: tuple[Ints, Ints, Ints, int]) -> int:
    """The axis of the sums that the output's channels lie along."""
    return 1 if geometry[0] else -1
