"""The training forward of a layer on its codes: which layers have one, and from what state of their nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ConvolutionGeometry, TrainingDescription
from ..kernels.differentiable.layer import Codes, Computation, WeightState, layer_on_codes
from .activation_observer import MovingAverageObserver
from .fake_quantize_layer import FakeQuantizeLayer
from .sharding import require_float32

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def training_description(
    layer: nn.Module, source: FakeQuantizeLayer, weight_node: FakeQuantizeLayer, input: Tensor, weight: Tensor
) -> TrainingDescription | None:
    """What says who computes a layer on its codes; None where it has no such form."""
    if type(layer) not in _LAYERS or source.scheme.channel_axis is not None:
        return None
    geometry = geometry_of(layer)
    if geometry is None and not isinstance(layer, nn.Linear):
        return None
    scheme = weight_node.scheme
    if not scheme.symmetric or scheme.dtype is not torch.int8 or scheme.channel_axis not in (None, 0):
        return None
    if type(weight_node) is not FakeQuantizeLayer or weight_node.layer is not None:
        return None
    device = input.device.type, input.get_device()
    return TrainingDescription(tuple(weight.shape), geometry, input.dtype, weight.dtype, device)


def integer_product(
    layer: nn.Module,
    input: Tensor,
    codes: Codes,
    weight: Tensor,
    weight_node: FakeQuantizeLayer,
    bias: Tensor | None,
    *,
    again: bool,
) -> tuple[Tensor, Computation | None]:
    """A layer's output on fake-quantized values, computed on codes, and, where ``again``, how to compute it again.

    Args:
        layer: for its geometry.
        input: float32 values on their grid; those of a convolution with a batch.
        codes: the values' own.
        weight: the layer's; a parameter, or computed from some.
        weight_node: observes the weight and quantizes it.
        bias: (O,), added in units of the accumulator; None for none.
    """
    values, state = _state(weight, weight_node)
    return layer_on_codes(input, values, bias, codes, weight.detach(), state, geometry_of(layer), again=again)


def _state(weight: Tensor, node: FakeQuantizeLayer) -> tuple[Tensor, WeightState]:
    """What a gradient of the weight goes to, and the weight's state."""
    estimator = node.estimator
    if node.learnable and not node.zero_point.requires_grad:
        require_float32(node.scale, node.name)
        return weight, WeightState(
            node.scheme,
            node.scale,
            node.zero_point,
            mask=estimator.saturated == "zero",
            gradient_clip=estimator.gradient_clip,
            learns=True,
        )
    if not _follows_weight(weight, node):
        # Whatever the node does to the weight, it does; what it has rounded is rounded again to the same codes.
        values = node(weight)
        return values, WeightState(node.scheme, node.scale.detach(), node.zero_point.detach())
    observer: Any = node.observer
    observes = node.observes
    state = WeightState(
        node.scheme,
        node.scale,
        node.zero_point,
        observer.state,
        observer.statistics.momentum,
        observes,
        node.is_observed and observer.statistics.momentum == 1,
        estimator.saturated == "zero",
        estimator.gradient_clip,
    )
    return weight, state


def _follows_weight(weight: Tensor, node: FakeQuantizeLayer) -> bool:
    """Whether one operator does to the weight what the node does: it is one as :func:`prepare` makes them, with fixed
    scales."""
    observer = node.observer
    if node.learnable or type(observer) is not MovingAverageObserver or observer.update_every != 1:
        return False
    # A mask is in the order of a dense tensor.
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def geometry_of(layer: nn.Module) -> ConvolutionGeometry | None:
    """Of a convolution that pads with zeros, in numbers."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    return ConvolutionGeometry(tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation), layer.groups)
