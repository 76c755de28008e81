r"""Products of a training step on codes: exact integer sums forward, returned as floats.

.. math:: y = (\textstyle\sum (q_x - z_x)\, q_w + b)\, (s_x s_w)

is what the same layer computes in evaluation, and what the float product of the fake-quantized tensors is but for
float32 rounding. Weights change with every step, so a product is packed for one call (and one recomputation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..scheme import QuantizationScheme
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


class TrainedWeight(NamedTuple):
    """What :func:`train_weight` makes of a layer's weight.

    Attributes:
        product: the layer on codes.
        mask: a bit to an element (:func:`.fake_quantize`); None where it was not asked for.
        scale: a copy of the weight's.
    """

    product: TrainingProduct
    mask: Tensor | None
    scale: Tensor


def train_weight(
    weight: Tensor,
    bias: Tensor | None,
    averages: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    zero_point: Tensor,
    momentum: float,
    scheme: QuantizationScheme,
    *,
    observes: bool,
    mask: bool,
    geometry: ConvolutionGeometry | None,
    input_scale: Tensor,
    input_zero_point: int,
    dtype: torch.dtype,
) -> TrainedWeight | None:
    """Observes a weight, quantizes it and packs it for the codes of an input, in one call.

    It is :func:`.update_moving_average`, :func:`.fake_quantize` and :func:`pack_training_product`, one after the other.

    Args:
        weight: float32, (O, I / groups, *kernel) of a convolution in one or two dimensions, or (O, I).
        bias: float32 (O,), contiguous, to be rounded to units of the accumulator; None for none.
        averages: running minimum and maximum, float32 (C,), and the number of batches, int64 (1,).
        scale, zero_point: float32 (C,), of the weight; the zero point is 0.
        momentum: of the averages.
        scheme: int8, symmetric.
        observes: whether to fold the weight into the averages, and make a scale of them, first.
        mask: whether to return where a gradient passes.
        geometry: of a convolution; None for a linear layer.
        input_scale: float32 (1,).
        input_zero_point, dtype: of the input's codes.

    Returns:
        None where the weight holds NaN, which has no code, or a bias does not fit the accumulator; nothing has changed.
    """
    matrix, (stride, padding, dilation, groups) = _as_convolution_2d(weight, geometry)
    packed, passes, own_scale = operators["train_weight"](
        matrix,
        bias,
        -1 if scheme.channel_axis is None else scheme.channel_axis,
        *averages,
        scale,
        zero_point,
        momentum,
        scheme.quant_min,
        scheme.quant_max,
        observes,
        mask,
        float(input_scale),
        input_zero_point,
        dtype,
        stride,
        padding,
        dilation,
        groups,
    )
    if packed is None:
        return None
    if observes:
        torch.autograd.graph.increment_version((*averages, scale, zero_point))
    return TrainedWeight(TrainingProduct(packed, geometry is not None), passes, own_scale)


def _as_convolution_2d(weight: Tensor, geometry: ConvolutionGeometry | None) -> tuple[Tensor, ConvolutionGeometry]:
    if geometry is None:
        return weight[:, :, None, None], _POINTWISE
    if weight.dim() == 4:
        return weight, geometry
    stride, padding, dilation, groups = geometry
    return weight.unsqueeze(2), ConvolutionGeometry((1, *stride), (0, *padding), (1, *dilation), groups)


_POINTWISE = ConvolutionGeometry((1, 1), (0, 0), (1, 1))


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
    weight, (stride, padding, dilation, groups) = _as_convolution_2d(weight, geometry)
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
