"""The training forward of a layer on its codes: integers forward, straight through in floating point backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..kernels import ConvolutionGeometry, TrainingProduct
from ..scheme import QuantizationScheme
from .activation_observer import MovingAverageObserver
from .attached_codes import Codes
from .fake_quantize_layer import FakeQuantizeLayer
from .native_function import apply_of, refuse_gradient_of_gradient

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class IntegerProduct(NamedTuple):
    """A layer's output, and what it takes to compute it again: the product, the codes it was given, and what was added
    to the result, of a shape that broadcasts."""

    output: Tensor
    product: TrainingProduct
    codes: Tensor
    addend: Tensor | None = None

    @property
    def takes_less_again(self) -> bool:
        """Whether what computes the output again takes less memory than the output; codes are kept anyway."""
        return self.product.packed.nbytes < self.output.nbytes

    def plus(self, addend: Tensor) -> IntegerProduct:
        """The sum of the output and a tensor that broadcasts."""
        return self._replace(output=self.output + addend, addend=addend.detach())


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
        quantized: _QuantizedWeight,
        product: TrainingProduct,
        geometry: ConvolutionGeometry | None,
    ) -> Tensor:
        ctx.save_for_backward(
            codes.codes, codes.scale, codes.zero_point, quantized.own, quantized.scale, quantized.mask
        )
        ctx.geometry = geometry
        ctx.scheme = quantized.scheme
        ctx.strides = quantized.own.stride()
        ctx.gradient_clip = quantized.gradient_clip
        autocast = torch.is_autocast_enabled("cpu")
        ctx.dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        return product(codes.codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        codes, scale, zero_point, own_weight, weight_scale, mask = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad[:3]
        dtype = ctx.dtype
        gradient = gradient.to(dtype)
        # The gradient of each takes the values of the other.
        if needs_weight:
            input = kernels.dequantize(codes, scale, zero_point, None)
        else:
            input = torch.empty(1).expand(codes.shape)
        weight = own_weight
        if needs_input:
            scheme = ctx.scheme
            values = kernels.fake_quantize(
                own_weight,
                weight_scale,
                torch.zeros_like(weight_scale),
                scheme.quant_min,
                scheme.quant_max,
                scheme.channel_axis,
            ).values
            assert values is not None
            weight = values
        backward = _linear_backward if ctx.geometry is None else _convolution_backward
        to_input, to_weight, to_bias = (
            None if each is None else each.to(torch.float32)
            for each in backward(gradient, input.to(dtype), weight.to(dtype), ctx.geometry, ctx.needs_input_grad[:3])
        )
        if to_weight is not None and mask is not None:
            to_weight = kernels.mask_gradient(to_weight, mask, ctx.strides, ctx.gradient_clip)
        elif to_weight is not None and ctx.gradient_clip is not None:
            to_weight = to_weight.clamp(-ctx.gradient_clip, ctx.gradient_clip)
        return to_input, to_weight, to_bias, *[None] * 4


_apply = apply_of(_IntegerProduct)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


def _convolution_backward(
    gradient: Tensor, input: Tensor, weight: Tensor, geometry: ConvolutionGeometry, needs: Needs
) -> Gradients:
    stride, padding, dilation, groups = geometry
    channels = [weight.shape[0]]
    no_output_padding = [0] * len(stride)
    to_input, to_weight, to_bias = torch.ops.aten.convolution_backward.default(
        gradient, input, weight, channels, stride, padding, dilation, False, no_output_padding, groups, list(needs)
    )
    return to_input, to_weight, to_bias


def _linear_backward(gradient: Tensor, input: Tensor, weight: Tensor, geometry: None, needs: Needs) -> Gradients:
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
    """A layer's output on fake-quantized values, computed on codes; None where no compiled kernel does that.

    Args:
        layer: for its kind and its geometry.
        input: float32 values on the grid of ``source``; those of a convolution with a batch.
        weight: the layer's; a parameter, or computed from some.
        weight_node: observes the weight and quantizes it.
        bias: (O,), added in units of the accumulator; None for none.
    """
    if type(layer) not in _LAYERS or weight.dtype is not torch.float32 or input.dtype is not torch.float32:
        return None
    geometry = _geometry_of(layer)
    if geometry is None and not isinstance(layer, nn.Linear):
        return None
    if (geometry is not None and input.dim() != weight.dim()) or source.scheme.channel_axis is not None:
        return None
    scheme = weight_node.scheme
    if not scheme.symmetric or scheme.dtype is not torch.int8 or scheme.channel_axis not in (None, 0):
        return None
    if type(weight_node) is not FakeQuantizeLayer or weight_node.layer is not None:
        return None
    if not kernels.takes_training_product(weight, 1 if geometry is None else geometry.groups):
        return None
    codes = source.codes_on_grid(input)
    if codes is None:
        return None
    pack = _packed_by_kernel if _is_observed_by_kernel(weight, weight_node, bias) else _packed
    packed = pack(weight, weight_node, bias, codes, geometry)
    if packed is None:
        return None
    product, quantized = packed
    output = _apply(input, quantized.values, bias, codes, quantized, product, geometry)
    return IntegerProduct(output, product, codes.codes)


class _QuantizedWeight(NamedTuple):
    """A weight on its grid, and how a gradient passes to ``values``.

    Attributes:
        own: the weight itself, apart from the graph.
        values: what the gradient goes to: the weight or, where the node does more than round, what the node returned.
        scale: a copy of the weight's; its zero point is 0.
        mask: of the elements that a gradient of the weight passes; None for all.
    """

    own: Tensor
    values: Tensor
    scale: Tensor
    scheme: QuantizationScheme
    mask: Tensor | None = None
    gradient_clip: float | None = None


def _is_observed_by_kernel(weight: Tensor, node: FakeQuantizeLayer, bias: Tensor | None) -> bool:
    """Whether one kernel does to the weight what the node does: it is one as :func:`.prepare` makes them, with fixed
    scales."""
    observer = node.observer
    if node.learnable or type(observer) is not MovingAverageObserver or observer.update_every != 1:
        return False
    if node.scale.is_inference() or (bias is not None and not bias.is_contiguous()):
        return False
    # A mask is in the order of a dense tensor.
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _packed_by_kernel(
    weight: Tensor, node: FakeQuantizeLayer, bias: Tensor | None, codes: Codes, geometry: ConvolutionGeometry | None
) -> tuple[TrainingProduct, _QuantizedWeight] | None:
    """Without the node being called; None where there are no codes, or the bias does not fit."""
    observer: Any = node.observer
    own, observes, estimator = weight.detach(), node.observes, node.estimator
    trained = kernels.train_weight(
        own,
        None if bias is None else bias.detach(),
        observer.state,
        node.scale,
        node.zero_point,
        observer.statistics.momentum,
        node.scheme,
        observes=observes,
        mask=estimator.saturated == "zero",
        geometry=geometry,
        input_scale=codes.scale,
        input_zero_point=int(codes.zero_point),
        dtype=codes.codes.dtype,
    )
    if trained is None:
        return None
    quantized = _QuantizedWeight(own, weight, trained.scale, node.scheme, trained.mask, estimator.gradient_clip)
    return trained.product, quantized


def _packed(
    weight: Tensor, node: FakeQuantizeLayer, bias: Tensor | None, codes: Codes, geometry: ConvolutionGeometry | None
) -> tuple[TrainingProduct, _QuantizedWeight] | None:
    """With whatever the node does to the weight; None where there are no codes, or the bias does not fit."""
    values = node(weight)
    quantized = node.codes_on_grid(values)
    if quantized is None:
        return None
    scale, bias_codes = codes.scale * quantized.scale, None
    if bias is not None:
        if not bool(arithmetic.bias_fits(bias.detach(), scale).all()):
            return None
        bias_codes = arithmetic.quantize_bias(bias.detach(), scale)
    product = kernels.pack_training_product(
        quantized.codes, bias_codes, scale, geometry, int(codes.zero_point), codes.codes.dtype
    )
    return product, _QuantizedWeight(weight.detach(), values, quantized.scale, node.scheme)


def _geometry_of(layer: nn.Module) -> ConvolutionGeometry | None:
    """Of a convolution that pads with zeros, in numbers."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    return ConvolutionGeometry(layer.stride, layer.padding, layer.dilation, layer.groups)
