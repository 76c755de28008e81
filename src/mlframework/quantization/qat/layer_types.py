"""The layers that can be quantized: along which axis their weight has channels, and their integer counterpart."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..int8.folding import BATCH_NORMS, IntegerWeights
from ..int8.layers import Int8Convolution, Int8ConvTranspose2d, Int8Layer, Int8Linear
from ..kernels import ConvolutionGeometry
from ..parameters import QuantizationParameters
from .batch_norms import evaluation_form, plain_batch_norm
from .computed_parameters import has_unknown_computation

Clip = tuple[float, float]
MakeInteger = Callable[
    [nn.Module, IntegerWeights, QuantizationParameters, "QuantizationParameters | None", Clip], Int8Layer
]


@dataclass(frozen=True)
class LayerType:
    """What quantizing a kind of layer takes to know.

    Attributes:
        output_axis: the axis of the weight along which the output's channels lie.
        batch_norm: the batch normalization that can fold into it, if any.
        to_integer: makes its integer layer; None for an embedding, which multiplies nothing.
        product: the operation alone, without bias, on given values and weights; None for an embedding.
    """

    output_axis: int
    batch_norm: type[nn.Module] | None
    to_integer: MakeInteger | None
    product: Callable[[Any, Tensor, Tensor], Tensor] | None


def _to_linear(
    layer: nn.Module,
    weights: IntegerWeights,
    input: QuantizationParameters,
    output: QuantizationParameters | None,
    clip: Clip,
) -> Int8Layer:
    return Int8Linear(weights, input, output, clip)


def _to_linear_from_transposed(
    layer: nn.Module,
    weights: IntegerWeights,
    input: QuantizationParameters,
    output: QuantizationParameters | None,
    clip: Clip,
) -> Int8Layer:
    return Int8Linear(weights._replace(codes=weights.codes.t()), input, output, clip)


def _to_convolution(
    layer: nn.Module,
    weights: IntegerWeights,
    input: QuantizationParameters,
    output: QuantizationParameters | None,
    clip: Clip,
) -> Int8Layer:
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    padding = layer.padding
    explicit: tuple[int, ...] = ()
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        explicit = tuple(layer._reversed_padding_repeated_twice)
        padding = (0,) * len(layer.kernel_size)
    geometry = ConvolutionGeometry(layer.stride, padding, layer.dilation, layer.groups)
    return Int8Convolution(weights, input, output, clip, geometry, explicit, layer.padding_mode)


def _to_transposed(
    layer: nn.Module,
    weights: IntegerWeights,
    input: QuantizationParameters,
    output: QuantizationParameters | None,
    clip: Clip,
) -> Int8Layer:
    assert isinstance(layer, nn.ConvTranspose2d)
    assert not isinstance(layer.padding, str)
    geometry = ConvolutionGeometry(layer.stride, layer.padding, layer.dilation, layer.groups)
    return Int8ConvTranspose2d(weights, input, output, clip, geometry, tuple(layer.output_padding))


def _linear_product(layer: nn.Linear, values: Tensor, weight: Tensor) -> Tensor:
    return F.linear(values, weight)


def _product_with_transposed(layer: nn.Module, values: Tensor, weight: Tensor) -> Tensor:
    return values @ weight


def _convolution_product(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, values: Tensor, weight: Tensor) -> Tensor:
    sums: Tensor = layer._conv_forward(values, weight, None)
    return sums


def _transposed_product(layer: nn.ConvTranspose2d, values: Tensor, weight: Tensor) -> Tensor:
    geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return F.conv_transpose2d(values, weight, None, *geometry)  # type: ignore[arg-type]


LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(0, nn.BatchNorm1d, _to_linear, _linear_product),
    nn.Conv1d: LayerType(0, nn.BatchNorm1d, _to_convolution, _convolution_product),
    nn.Conv2d: LayerType(0, nn.BatchNorm2d, _to_convolution, _convolution_product),
    nn.Conv3d: LayerType(0, nn.BatchNorm3d, _to_convolution, _convolution_product),
    nn.ConvTranspose2d: LayerType(1, nn.BatchNorm2d, _to_transposed, _transposed_product),
    nn.Embedding: LayerType(0, None, None, None),
}


def _known_types() -> dict[type[nn.Module], LayerType]:
    """All of them, and GPT-2's linear layer, whose weight lies the other way round, where that is imported."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is None:
        return LAYER_TYPES
    return {
        **LAYER_TYPES,
        transformers.Conv1D: LayerType(1, None, _to_linear_from_transposed, _product_with_transposed),
    }


# Activations that only clip: a quantized output saturates in their place.
_CLIPS: dict[type[nn.Module], Callable[[nn.Module], Clip]] = {
    nn.ReLU: lambda module: (0.0, math.inf),
    nn.ReLU6: lambda module: (0.0, 6.0),
    nn.Hardtanh: lambda module: (float(module.min_val), float(module.max_val)),  # type: ignore[arg-type]
}


def layer_type_of(layer: nn.Module) -> LayerType | None:
    """The kind of a layer that can be quantized; None for anything else, subclasses that compute otherwise too."""
    for kind, layer_type in _known_types().items():
        if isinstance(layer, kind) and all(
            getattr(type(layer), method, None) is getattr(kind, method, None) for method in ("forward", "_conv_forward")
        ):
            return layer_type
    return None


def obstacle_of(layer: nn.Module) -> str | None:
    """Why a layer of a known type cannot be quantized all the same; None where it can."""
    if isinstance(layer._parameters.get("weight"), nn.parameter.UninitializedParameter):
        return "it has no weight yet: run it once first"
    for name in ("weight", "bias"):
        if has_unknown_computation(layer, name):
            return f"a hook computes its {name}: register a parametrization (torch.nn.utils.parametrize) instead"
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:
        return "a transposed convolution with groups has no integer form"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm rewrites its weight in forward"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "a sparse gradient does not pass through a quantized weight"
    return None


def clip_of(activation: nn.Module | None) -> Clip | None:
    """The interval that an activation clips to (infinite ends for no activation); None where it does more than clip."""
    if activation is None:
        return (-math.inf, math.inf)
    make = _CLIPS.get(type(activation))
    return None if make is None else make(activation)


def takes_batch_norm(layer: nn.Module, batch_norm: nn.Module) -> bool:
    """Whether that batch normalization, with the activation inside of it if there is one, folds into that layer."""
    layer_type = layer_type_of(layer)
    if layer_type is None or layer_type.batch_norm is None:
        return False
    form = evaluation_form(batch_norm)
    if form is None or clip_of(form.activation) is None or batch_norm.running_mean is None:
        return False
    own = plain_batch_norm(batch_norm) or batch_norm
    return isinstance(own, (layer_type.batch_norm, nn.SyncBatchNorm)) or not isinstance(own, BATCH_NORMS)
