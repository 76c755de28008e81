"""The layers that can be quantized: along which axis their weight has channels, and their integer counterpart."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..int8.folding import BATCH_NORMS, IntegerWeights
from ..int8.layers import Int8Convolution, Int8ConvTranspose2d, Int8Layer, Int8Linear
from ..kernels import ConvolutionGeometry
from ..parameters import QuantizationParameters
from .batch_norms import evaluation_form, plain_batch_norm
from .computed_parameters import has_unknown_computation

Clip = tuple[float, float]


class Application(NamedTuple):
    """How a layer applies its weight.

    Attributes:
        kind: the integer layer.
        geometry: of a convolution; None for a linear layer.
        padding, padding_mode: what is added around the input beforehand, as :class:`Int8Convolution` takes it.
        output_padding: of a transposed convolution; None for any other.
        has_inputs_first: whether the weight of a linear layer lies as (in_features, out_features).
    """

    kind: type[Int8Linear] | type[Int8Convolution] | type[Int8ConvTranspose2d]
    geometry: ConvolutionGeometry | None = None
    padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] | None = None
    has_inputs_first: bool = False

    def to_integer(
        self,
        weights: IntegerWeights,
        input: QuantizationParameters,
        output: QuantizationParameters | None,
        clip: Clip,
    ) -> Int8Layer:
        """The integer layer with these weights."""
        if self.geometry is None:
            return Int8Linear(self.oriented(weights), input, output, clip)
        if self.output_padding is not None:
            return Int8ConvTranspose2d(weights, input, output, clip, self.geometry, self.output_padding)
        return Int8Convolution(weights, input, output, clip, self.geometry, self.padding, self.padding_mode)

    def oriented(self, weights: IntegerWeights) -> IntegerWeights:
        """The weights as the integer layer has them."""
        return weights._replace(codes=weights.codes.t()) if self.has_inputs_first else weights


@dataclass(frozen=True)
class LayerType:
    """What quantizing a kind of layer takes to know.

    Attributes:
        output_axis: the axis of the weight along which the output's channels lie.
        batch_norm: the batch normalization that can fold into it, if any.
        application: how a layer of the kind applies its weight; None for an embedding, which multiplies nothing.
    """

    output_axis: int
    batch_norm: type[nn.Module] | None
    application: Callable[[Any], Application] | None


def _linear(layer: nn.Module) -> Application:
    return Application(Int8Linear)


def _linear_with_inputs_first(layer: nn.Module) -> Application:
    return Application(Int8Linear, has_inputs_first=True)


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Application:
    padding = layer.padding
    explicit: tuple[int, ...] = ()
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        explicit = tuple(layer._reversed_padding_repeated_twice)
        padding = (0,) * len(layer.kernel_size)
    geometry = ConvolutionGeometry(tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups)
    return Application(Int8Convolution, geometry, explicit, layer.padding_mode)


def _transposed(layer: nn.ConvTranspose2d) -> Application:
    assert not isinstance(layer.padding, str)
    geometry = ConvolutionGeometry(tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation), layer.groups)
    return Application(Int8ConvTranspose2d, geometry, output_padding=tuple(layer.output_padding))


LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(0, nn.BatchNorm1d, _linear),
    nn.Conv1d: LayerType(0, nn.BatchNorm1d, _convolution),
    nn.Conv2d: LayerType(0, nn.BatchNorm2d, _convolution),
    nn.Conv3d: LayerType(0, nn.BatchNorm3d, _convolution),
    nn.ConvTranspose2d: LayerType(1, nn.BatchNorm2d, _transposed),
    nn.Embedding: LayerType(0, None, None),
}


def _known_types() -> dict[type[nn.Module], LayerType]:
    """All of them, and GPT-2's linear layer, whose weight lies the other way round, where that is imported."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is None:
        return LAYER_TYPES
    return {
        **LAYER_TYPES,
        transformers.Conv1D: LayerType(1, None, _linear_with_inputs_first),
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
