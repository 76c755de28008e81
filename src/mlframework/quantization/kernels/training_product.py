r"""Products of a training step on codes: exact integer sums forward, returned as floats.

.. math:: y = (\textstyle\sum (q_x - z_x)\, q_w + b)\, (s_x s_w)

is what the same layer computes in evaluation, and what the float product of the fake-quantized tensors is but for
float32 rounding. Weights change with every step, so a product is packed for one call (and one recomputation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .native import has_integer_layers, operators
from .onednn import ConvolutionGeometry

# Any uint8 code by any int8 code: so many products stay within an int32, with as much room again for the bias.
_MOST_PRODUCTS = 2**30 // (255 * 128)


class TrainingProduct(NamedTuple):
    """A layer's weight, packed for the compiled kernels.

    Attributes:
        packed: uint8, as the kernels read it.
        convolves: whether codes have shape (N, C, *size) rather than (*, features).
    """

    packed: Tensor
    convolves: bool

    def __call__(self, codes: Tensor) -> Tensor:
        """Float32 output for codes of the dtype that the product was packed for."""
        output: Tensor = operators["convolution" if self.convolves else "linear"](codes, self.packed)
        return output


def takes_training_product(weight: Tensor, groups: int) -> bool:
    """Whether a layer with a weight (O, I / groups, *kernel) of that shape has a :class:`TrainingProduct` here."""
    if weight.dim() not in (2, 3, 4) or weight.numel() == 0 or weight.device.type != "cpu":
        return False
    depthwise = groups == weight.shape[0] and weight.shape[1] == 1
    products = weight.numel() // weight.shape[0]
    return (groups == 1 or depthwise) and products <= _MOST_PRODUCTS and has_integer_layers()


def pack_training_product(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    geometry: ConvolutionGeometry | None,
    zero_point: int,
    dtype: torch.dtype,
) -> TrainingProduct:
    """Packs weight codes for the codes of an input.

    Args:
        weight: int8 codes, (O, I / groups, *kernel) of a convolution in one or two dimensions, or (O, I).
        bias: int32 (O,), in units of the accumulator; None for none.
        scale: float32 (O,) or (1,), ``sx * sw``.
        geometry: of a convolution; None for a linear layer.
        zero_point, dtype: of the input's codes.
    """
    if geometry is None:
        weight, (stride, padding, dilation, groups) = weight[:, :, None, None], ((1, 1), (0, 0), (1, 1), 1)
    else:
        stride, padding, dilation, groups = geometry  # type: ignore[assignment]
    if weight.dim() == 3:
        weight, stride, padding, dilation = weight.unsqueeze(2), (1, *stride), (0, *padding), (1, *dilation)  # type: ignore[assignment]
    packed: Tensor = operators["pack_layer"](
        weight,
        bias,
        scale,
        stride,
        padding,
        dilation,
        groups,
        zero_point,
        dtype,
        0,
        -torch.inf,
        torch.inf,
        torch.float32,
    )
    return TrainingProduct(packed, geometry is not None)
