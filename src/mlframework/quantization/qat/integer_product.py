"""The training forward of a layer on its codes: integers forward, straight through in floating point backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import arithmetic, kernels
from ..kernels import ConvolutionGeometry, TrainingProduct
from ..scheme import QuantizationScheme
from .attached_codes import Codes
from .fake_quantize_layer import FakeQuantizeLayer

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class IntegerProduct(NamedTuple):
    """A layer's output, and what it takes to compute it again: the product and the codes it was given."""

    output: Tensor
    product: TrainingProduct
    codes: Tensor


class _IntegerProduct(torch.autograd.Function):
    """Saves codes, a byte to a value, in the place of the floats that a layer would save. The weight, which is there
    all the same, is quantized again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Codes,
        own_weight: Tensor,
        weight_codes: Codes,
        scheme: QuantizationScheme,
        product: TrainingProduct,
        geometry: ConvolutionGeometry | None,
    ) -> Tensor:
        ctx.save_for_backward(
            codes.codes, codes.scale, codes.zero_point, own_weight, weight_codes.scale, weight_codes.zero_point
        )
        ctx.geometry = geometry
        ctx.scheme = scheme
        autocast = torch.is_autocast_enabled("cpu")
        ctx.dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        return product(codes.codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, zero_point, own_weight, weight_scale, weight_zero_point = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = ctx.dtype
        gradient = gradient.to(dtype)
        # Each gradient takes the other operand's values.
        input = kernels.dequantize(codes, scale, zero_point, None).to(dtype)
        scheme = ctx.scheme
        weight = kernels.fake_quantize(
            own_weight, weight_scale, weight_zero_point, scheme.quant_min, scheme.quant_max, scheme.channel_axis
        ).values
        assert weight is not None
        weight = weight.to(dtype)
        if ctx.geometry is None:
            to_input, to_weight, to_bias = _linear_backward(gradient, input, weight, ctx.needs_input_grad)
        else:
            stride, padding, dilation, groups = ctx.geometry
            to_input, to_weight, to_bias = torch.ops.aten.convolution_backward(
                gradient,
                input,
                weight,
                [weight.shape[0]],
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [needs_input, needs_weight, needs_bias],
            )
        gradients = (None if each is None else each.to(torch.float32) for each in (to_input, to_weight, to_bias))
        return *gradients, *[None] * 7


def _linear_backward(
    gradient: Tensor, input: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient @ weight if needs[0] else None,
        rows.t() @ input.reshape(-1, input.shape[-1]) if needs[1] else None,
        rows.sum(dim=0) if needs[2] else None,
    )


def integer_product(
    layer: nn.Module,
    input: Tensor,
    source: FakeQuantizeLayer,
    weight: Tensor,
    weight_node: FakeQuantizeLayer,
    bias: Tensor | None,
) -> IntegerProduct | None:
    """A layer's output on fake-quantized values, computed on their codes; None where no compiled kernel does that.

    Args:
        layer: for its kind and geometry.
        input: float32 values on the grid of ``source``.
        weight: float32 values on the grid of ``weight_node``, in the layer's weight's shape.
        bias: (O,), added in units of the accumulator; None for none.
    """
    own_weight = layer.weight
    assert isinstance(own_weight, Tensor)
    if (
        type(layer) not in _LAYERS
        or own_weight.dtype is not torch.float32
        or input.dtype is not torch.float32
        or weight.dtype is not torch.float32
    ):
        return None
    geometry = _geometry_of(layer)
    if geometry is None and not isinstance(layer, nn.Linear):
        return None
    if not kernels.takes_training_product(weight, 1 if geometry is None else geometry.groups):
        return None
    weight_codes, codes = weight_node.codes_on_grid(weight), source.codes_on_grid(input)
    if weight_codes is None or codes is None:
        return None
    scale = codes.scale * weight_codes.scale
    if bias is None:
        bias_codes = torch.zeros(weight.shape[0], dtype=torch.int32)
    elif bool(arithmetic.bias_fits(bias.detach(), scale).all()):
        bias_codes = arithmetic.quantize_bias(bias.detach(), scale)
    else:
        return None
    product = kernels.pack_training_product(
        weight_codes.codes, bias_codes, scale, geometry, int(codes.zero_point), codes.codes.dtype
    )
    output = _IntegerProduct.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, codes, own_weight.detach(), weight_codes, weight_node.scheme, product, geometry
    )
    return IntegerProduct(output, product, codes.codes)


def _geometry_of(layer: nn.Module) -> ConvolutionGeometry | None:
    """Of a convolution that pads with zeros, in numbers."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    return ConvolutionGeometry(layer.stride, layer.padding, layer.dilation, layer.groups)
