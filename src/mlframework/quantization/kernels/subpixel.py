r"""A transposed convolution as a convolution that computes every output phase as a channel of its own.

With stride s and dilation 1, output :math:`Y` of a transposed convolution, counted from before its padding p was cut
off, is :math:`Y + p = s a + r` for a phase r below s, and only the taps :math:`r, r + s, r + 2s, \dots` reach it:

.. math:: y[s a + r - p] = \sum_j x[a - j]\, w[s j + r]

So each phase is an ordinary convolution of the input, with the kernel reversed and every s-th tap kept (Shi et al.,
"Is the deconvolution layer the same as a convolutional layer?", 2016). The phases of a channel lie side by side, as
:func:`torch.nn.functional.pixel_shuffle` expects them, and ONNX's ``DepthToSpace`` in mode ``CRD``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SubpixelConvolution(NamedTuple):
    """What stands for a transposed convolution: convolve, shuffle phases into place, cut off the edges.

    Attributes:
        weight: (O * stride * stride, I, height, width), for a convolution with stride 1 and dilation 1.
        padding: rows and columns of zeros around its input.
        stride: upscaling factor of the shuffle.
        crop: rows to cut off at the top and at the bottom, and columns on the left and on the right.
    """

    weight: Tensor
    padding: tuple[int, int]
    stride: int
    crop: tuple[int, int, int, int]

    def shuffled(self, output: Tensor) -> Tensor:
        """The transposed convolution's output, (N, O, H', W'), from the convolution's."""
        output = F.pixel_shuffle(output, self.stride)
        top, bottom, left, right = self.crop
        return output[..., top : output.shape[-2] - bottom, left : output.shape[-1] - right]


def subpixel_convolution(
    weight: Tensor, stride: int, padding: tuple[int, int], output_padding: tuple[int, int]
) -> SubpixelConvolution:
    """The convolution that computes the phases of a transposed one.

    Args:
        weight: of the transposed convolution, (I, O, height, width), any dtype; no groups, dilation 1.
        stride: the same along both axes.
        padding, output_padding: of the transposed convolution.

    Example:
        >>> weight, values = torch.randn(3, 5, 4, 4), torch.randn(1, 3, 6, 6)
        >>> subpixel = subpixel_convolution(weight, 2, (1, 1), (0, 0))
        >>> output = subpixel.shuffled(F.conv2d(values, subpixel.weight, padding=subpixel.padding))
        >>> torch.allclose(output, F.conv_transpose2d(values, weight, stride=2, padding=1), atol=1e-5)
        True
    """
    inputs, outputs, *kernel = weight.shape
    taps = [-(-size // stride) for size in kernel]
    whole = weight.new_zeros(inputs, outputs, taps[0] * stride, taps[1] * stride)
    whole[:, :, : kernel[0], : kernel[1]] = weight
    phases = whole.reshape(inputs, outputs, taps[0], stride, taps[1], stride).flip(2, 4)
    phases = phases.permute(1, 3, 5, 0, 2, 4).reshape(outputs * stride * stride, inputs, *taps)

    paddings, crop = [], []
    for axis in range(2):
        # The padded input must reach as far as the first output and the last one do.
        before = taps[axis] - 1 - padding[axis] // stride
        after = -(-(kernel[axis] + output_padding[axis] - padding[axis]) // stride) - 1
        around = max(before, after, 0)
        first = padding[axis] - stride * (taps[axis] - 1 - around)
        # Of an input of size n, n + 2 * around - taps + 1 positions are shuffled, and this many outputs are wanted:
        # (n - 1) * stride - 2 * padding + kernel + output_padding. The difference does not depend on n.
        surplus = stride * (2 * around - taps[axis] + 2) + 2 * padding[axis] - kernel[axis] - output_padding[axis]
        paddings.append(around)
        crop += [first, surplus - first]
    return SubpixelConvolution(
        phases.contiguous(), (paddings[0], paddings[1]), stride, (crop[0], crop[1], crop[2], crop[3])
    )
