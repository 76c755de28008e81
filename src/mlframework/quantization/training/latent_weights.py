"""The weights that a prepared model trains and quantizes, and the grid of each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import arithmetic
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.qat_module_wrapper import QATModuleWrapper


class LatentWeight(NamedTuple):
    """A float weight that training moves, of which the forward sees what its node rounds it to.

    Attributes:
        name: of the layer in the model.
        weight: the Parameter.
        node: quantizes it.
    """

    name: str
    weight: nn.Parameter
    node: FakeQuantizeLayer

    @property
    def scale(self) -> Tensor:
        """The grid's present step, broadcasting against the weight; apart from the graph."""
        return arithmetic.along_axis(self.node.scale.detach(), self.weight.dim(), self._axis)

    @property
    def zero_point(self) -> Tensor:
        """The code of zero, broadcasting against the weight."""
        return arithmetic.along_axis(self.node.code_of_zero.detach(), self.weight.dim(), self._axis)

    @property
    def codes(self) -> Tensor:
        """The integers that the weight rounds to now, in float32."""
        scheme = self.node.scheme
        codes = arithmetic.unsaturated_codes(self.weight.detach().float(), self.scale, self.zero_point)
        return codes.clamp_(scheme.quant_min, scheme.quant_max)

    def values(self, codes: Tensor) -> Tensor:
        """What integers stand for on the present grid: the centres of their bins."""
        return (codes - self.zero_point) * self.scale

    @property
    def _axis(self) -> int | None:
        return self.node.scheme.resolve_channel_axis(self.weight.dim())


def latent_weights(model: nn.Module) -> list[LatentWeight]:
    """The weights that are Parameters in training and are quantized, each once, whatever shares it.

    Weights that are computed for every forward (by a parametrization, or by a hook) are none. What a model's code hands
    to a function (``F.conv2d(x, self.weight)``) is known after a first forward with the Parameters that the model has
    now.
    """
    own = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    weights: list[LatentWeight] = []
    for name, module in model.named_modules():
        if not isinstance(module, QATModuleWrapper) or module.weight_fake_quantize is None:
            continue
        given = isinstance(module, GivenWeightWrapper)
        weight = module.given_weight if given else module._parameters.get("weight")
        if weight is None or not weight.requires_grad or id(weight) in seen:
            continue
        if id(weight) not in own:  # the model got another since; this one may be the float model's
            continue
        seen.add(id(weight))
        weights.append(LatentWeight(name, weight, module.weight_fake_quantize))
    return weights


def require_quantized_layers(model: nn.Module) -> None:
    """Refuses a model that is not prepared, or in which nothing is quantized.

    Raises:
        ValueError: there is no quantized layer.
    """
    if not any(isinstance(module, QATModuleWrapper) for module in model.modules()):
        raise ValueError("model must be a prepared model with quantized layers, got none")
