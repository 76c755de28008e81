"""A layer on codes in training: exact integers forward, straight through in floating point backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...scheme import QuantizationScheme
from ..devices import is_traced, kernels_for
from ..geometry import ConvolutionGeometry
from ..operators.codes import dequantize
from ..operators.fake_quantization import fake_quantize, mask_gradient, weight_gradients
from ..operators.moving_average import update_moving_average
from ..operators.training_layers import train_layer, weighted_product
from .function import call, refuse_gradient_of_gradient


class Codes(NamedTuple):
    """Codes, and the grid that they were made with, as it was then: float32 (2, 1) or (2, C), scale and zero point."""

    codes: Tensor
    grid: Tensor


class WeightState(NamedTuple):
    """A weight's grid, and the statistics that it follows.

    Attributes:
        averages: running minimum, maximum and the number of batches; None where a node has observed the weight and
            passes its gradients on, or where the scale is learned.
        scale, zero_point: float32, updated in place where the weight is observed.
        momentum: of the averages.
        observes: whether the weight of this step is to be folded in, first.
        is_newest: whether the grid is that of this very weight, also where a recomputation does not observe it again.
        mask: whether the gradient of a weight that saturates does not pass.
        gradient_clip: the largest magnitude of it that passes.
        learns: whether gradients go to the scale, and to the weight, as :func:`.weight_gradients` has them.
    """

    scheme: QuantizationScheme
    scale: Tensor
    zero_point: Tensor
    averages: tuple[Tensor, Tensor, Tensor] | None = None
    momentum: float = 1.0
    observes: bool = False
    is_newest: bool = False
    mask: bool = False
    gradient_clip: float | None = None
    learns: bool = False

    @property
    def saturates(self) -> bool:
        """Whether a weight may lie beyond its grid. None does where each channel's grid was made for it, and where one
        is not finite, the scale is NaN."""
        return not (self.is_newest and self.scheme.channel_axis == 0)


class Computation(NamedTuple):
    """What it takes to compute a layer's output again."""

    codes: Tensor
    grid: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    scheme: QuantizationScheme
    geometry: ConvolutionGeometry | None
    dtype: torch.dtype = torch.float32

    def __call__(self) -> Tensor:
        return weighted_product(*self)


class _Layer(torch.autograd.Function):
    """Saves codes, a byte to a value, in the place of the floats that a layer would save. The weight itself, a
    parameter, is saved as it is and quantized again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        grid: Tensor,
        own_weight: Tensor,
        state: WeightState,
        geometry: ConvolutionGeometry | None,
        dtype: torch.dtype,
        learned_scale: Tensor | None,
    ) -> Tensor:
        scheme = state.scheme
        own_bias = None if bias is None else bias.detach().contiguous()
        if state.averages is not None and not is_traced():
            output, mask, scale = train_layer(
                codes,
                grid,
                own_weight,
                own_bias,
                state.averages,
                state.scale,
                state.zero_point,
                state.momentum,
                scheme,
                geometry,
                observes=state.observes,
                mask=state.mask and state.saturates,
                dtype=dtype,
            )
        else:
            mask = None
            ends = scheme.quant_min, scheme.quant_max, scheme.channel_axis
            if learned_scale is not None:
                scale = learned_scale
            else:
                scale = state.scale.expand(own_weight.shape[0]).clone()  # which is updated in place
                if state.mask:
                    mask = fake_quantize(own_weight, state.scale, state.zero_point, *ends, values=False, mask=True).mask
            output = weighted_product(codes, grid, own_weight, state.scale, own_bias, scheme, geometry, dtype)
        zero_point = None if learned_scale is None else state.zero_point
        ctx.save_for_backward(codes, grid, own_weight, scale, zero_point, mask)
        ctx.geometry = geometry
        ctx.ends = scheme.quant_min, scheme.quant_max, 0 if learned_scale is None else scheme.channel_axis
        ctx.gradient_clip = state.gradient_clip
        ctx.learns = learned_scale is not None
        ctx.pass_saturated = not state.mask
        ctx.dtype = _autocast_dtype(codes) or dtype
        ctx.dtypes = [None if each is None else each.dtype for each in (input, weight, bias)]
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_gradient_of_gradient()
        if gradient is None:
            return (None,) * 10
        codes, grid, own_weight, scale, zero_point, mask = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_scale = ctx.needs_input_grad[9]
        dtype = ctx.dtype
        # The gradient of each takes the values of the other.
        if needs_weight or needs_scale:
            input = dequantize(codes, grid[0], grid[1], None, dtype)
        else:
            input = gradient.new_empty(1).to(dtype).expand(codes.shape)
        weight = own_weight
        if needs_input:
            zero = torch.zeros_like(scale) if zero_point is None else zero_point
            values = fake_quantize(own_weight, scale, zero, *ctx.ends).values
            assert values is not None
            weight = values
        backward = _linear_backward if ctx.geometry is None else _convolution_backward
        needs = needs_input, needs_weight or needs_scale, needs_bias
        to_input, to_weight, to_bias = (
            None if each is None else each.to(own)
            for each, own in zip(
                backward(gradient.to(dtype), input, weight.to(dtype), ctx.geometry, needs), ctx.dtypes, strict=True
            )
        )
        to_scale = None
        if to_weight is None:
            pass
        elif ctx.learns:
            to_weight, to_scale = weight_gradients(
                to_weight,
                own_weight,
                scale,
                zero_point,
                *ctx.ends,
                pass_saturated=ctx.pass_saturated,
                gradient_clip=ctx.gradient_clip,
                needs=(needs_weight, needs_scale),
            )
        elif mask is not None:
            to_weight = mask_gradient(to_weight, mask, own_weight.stride(), ctx.gradient_clip)
        elif ctx.gradient_clip is not None:
            to_weight = to_weight.clamp(-ctx.gradient_clip, ctx.gradient_clip)
        return to_input, to_weight, to_bias, *[None] * 6, to_scale


def _output_dtype(input: Tensor, codes: Tensor) -> torch.dtype:
    """Of a layer on these codes of an input: what the layer would return by itself, where kernels for a GPU run it; the
    compiled ones return float32."""
    if kernels_for(codes) != "triton":
        return torch.float32
    return _autocast_dtype(codes) or input.dtype


def _autocast_dtype(codes: Tensor) -> torch.dtype | None:
    """Autocast's on the device of the codes; None where it is off."""
    device = codes.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool]


def _convolution_backward(
    gradient: Tensor, input: Tensor, weight: Tensor, geometry: ConvolutionGeometry, needs: Needs
) -> Gradients:
    stride, padding, dilation, groups = geometry
    channels = [weight.shape[0]]
    no_output_padding = [0] * len(stride)
    gradients = torch.ops.aten.convolution_backward.default(
        gradient, input, weight, channels, stride, padding, dilation, False, no_output_padding, groups, list(needs)
    )
    # In one dimension there is something in the places of those that are not needed, too.
    to_input, to_weight, to_bias = (each if need else None for each, need in zip(gradients, needs, strict=True))
    return to_input, to_weight, to_bias


def _linear_backward(gradient: Tensor, input: Tensor, weight: Tensor, geometry: None, needs: Needs) -> Gradients:
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        gradient @ weight if needs[0] else None,
        rows.t() @ input.reshape(-1, input.shape[-1]) if needs[1] else None,
        rows.sum(dim=0) if needs[2] else None,
    )


def layer_on_codes(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Codes,
    own_weight: Tensor,
    state: WeightState,
    geometry: ConvolutionGeometry | None,
    *,
    again: bool,
) -> tuple[Tensor, Computation | None]:
    """A layer's output and, where ``again``, how to compute it again.

    Args:
        input: the values that the codes stand for, which its gradient goes to.
        weight: what the gradient of the weight goes to: the weight or, where a node does more than round, what the
            node returned.
        bias: (O,), rounded to units of the accumulator; None for none.
        codes: of the input.
        own_weight: the weight itself, apart from the graph.
        state: of the weight.
        geometry: of a convolution; None for a linear layer.
    """
    if state.averages is not None and state.observes and is_traced():
        # Apart from the function: what a compiler traces as one changes nothing in place.
        axis = state.scheme.channel_axis
        update_moving_average(
            own_weight, False, axis, *state.averages, state.scale, state.zero_point, state.momentum, state.scheme, True
        )
    dtype = _output_dtype(input, codes.codes)
    learned_scale = state.scale if state.learns else None
    output: Tensor = call(_Layer, input, weight, bias, *codes, own_weight, state, geometry, dtype, learned_scale)
    if not again:
        return output, None
    own_bias = None if bias is None else bias.detach().contiguous()
    return output, Computation(
        *codes, own_weight, state.scale.detach().clone(), own_bias, state.scheme, geometry, dtype
    )
