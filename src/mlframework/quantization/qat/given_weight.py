"""A layer whose weight a model's own code hands to a function, as ``F.conv2d(x, self.weight)`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..int8.layers import Int8Layer
from .config import QATConfig
from .qat_module_wrapper import QATModuleWrapper

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

# The functions that are layers: the names of their arguments in order, and their kind.
FUNCTIONS: dict[Any, tuple[tuple[str, ...], type[nn.Module]]] = {
    F.linear: (("input", "weight", "bias"), nn.Linear),
    F.conv1d: (_CONVOLUTION, nn.Conv1d),
    F.conv2d: (_CONVOLUTION, nn.Conv2d),
    F.conv3d: (_CONVOLUTION, nn.Conv3d),
    F.conv_transpose2d: (_TRANSPOSED, nn.ConvTranspose2d),
}


def arguments_of_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(FUNCTIONS[function][0], args, strict=False)), **kwargs}


def layer_of_call(
    function: Callable[..., Any], weight: torch.Size, has_bias: bool, settings: Mapping[str, Any]
) -> nn.Module:
    """A layer that computes what a call of the function computes; its own parameters are on the meta device.

    Args:
        function: one of :data:`FUNCTIONS`.
        weight: the shape of its weight.
        settings: its further arguments by name, numbers all of them.
    """
    kind = FUNCTIONS[function][1]
    if kind is nn.Linear:
        return nn.Linear(weight[1], weight[0], has_bias, device="meta")
    size = tuple(weight[2:])
    # One number may stand for all the dimensions, also in a tuple.
    settings = {
        name: tuple(value) * (len(size) if len(value) == 1 else 1) if isinstance(value, (tuple, list)) else value
        for name, value in settings.items()
    }
    groups = settings.get("groups", 1)
    channels = (weight[0], weight[1] * groups) if kind is nn.ConvTranspose2d else (weight[1] * groups, weight[0])
    return kind(*channels, size, bias=has_bias, device="meta", **settings)


class GivenWeightWrapper(QATModuleWrapper):
    """Stands in the place of a function that is a layer: quantizes the weight and the bias that it is called with.

    The parameters stay where the model has them, under their own names, and a weight that the model computes is
    computed by the model. ``layer`` tells the kind and the geometry, and has no parameters but during a call.

    Args:
        layer: from :func:`layer_of_call`.
        weight, bias: as they are now; the weight's grid starts from it.
        config, batch_norm, activation: as for :class:`QATModuleWrapper`.
    """

    _evaluated: dict[str, Tensor]
    _given: tuple[Tensor, ...] = ()

    @property
    def given_weight(self) -> nn.Parameter | None:
        """The Parameter that the last forward was called with; None where it was a computed tensor."""
        weight = self._given[0] if self._given else None
        return weight if isinstance(weight, nn.Parameter) else None

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        config: QATConfig | None = None,
        *,
        batch_norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        own: dict[str, Any] = layer._parameters
        own.update(weight=weight.detach(), bias=None if bias is None else bias.detach())
        super().__init__(layer, config, batch_norm=batch_norm, activation=activation)
        own.update(weight=None, bias=None)

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The layer's output with that weight and bias: as :meth:`QATModuleWrapper.forward`."""
        own: dict[str, Any] = self.layer._parameters
        own["weight"], own["bias"] = weight, bias
        if not kernels.is_traced() and isinstance(weight, nn.Parameter):
            self._given = (weight,)  # in a tuple so that nn.Module does not register it, where it would be saved twice
        try:
            return super().forward(input)
        finally:
            own["weight"] = own["bias"] = None

    def keep(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes a weight and a bias for the layer's own from now on, for :meth:`to_integer`."""
        own: dict[str, Any] = self.layer._parameters
        own["weight"], own["bias"] = weight, bias

    def _integer_layer(self) -> Int8Layer:
        # A computed tensor is another one in each call: the integer layer is kept for as long as its values stay.
        own: dict[str, Any] = self.layer._parameters
        for name, tensor in own.items():
            if tensor is None or isinstance(tensor, nn.Parameter):
                continue
            known = self._evaluated.get(name)
            if known is not None and known.shape == tensor.shape and torch.equal(known, tensor):
                own[name] = known
            else:
                self._evaluated[name] = tensor
        return super()._integer_layer()

    def train(self, mode: bool = True) -> GivenWeightWrapper:
        self._evaluated = {}
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_evaluated": {}, "_given": ()}
