"""The quantized layers of a prepared model: what each computes with, and whether its parameters can be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.layer_types import LayerType, layer_type_of
from ..qat.qat_module_wrapper import QATModuleWrapper
from .runs import evaluating, nodes_off, run

Watcher = Callable[["QuantizedLayer", Tensor], None]


@dataclass(eq=False)
class QuantizedLayer:
    """A layer that was reached, with every call of it.

    Attributes:
        name: of the first wrapper in the model.
        wrappers: one for each place that the layer is called at, in the order of the first call.
        weight: the Parameter; None where the weight is computed.
        bias: the Parameter; None where there is none, or where it is computed.
        has_computed_bias: whether it is.
        obstacle: why the weight cannot be changed; None where it can.
    """

    name: str
    wrappers: list[QATModuleWrapper]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    has_computed_bias: bool = False
    obstacle: str | None = None

    @property
    def wrapper(self) -> QATModuleWrapper:
        """Of the first call."""
        return self.wrappers[0]

    @property
    def layer(self) -> nn.Module:
        """Tells kind and geometry."""
        return self.wrapper.layer

    @property
    def kind(self) -> LayerType:
        """What quantizing it takes to know."""
        kind = layer_type_of(self.layer)
        assert kind is not None
        return kind

    @property
    def weight_node(self) -> FakeQuantizeLayer:
        """The node of the weight.

        Raises:
            AssertionError: there is none; such a layer has an ``obstacle``.
        """
        node = self.wrapper.weight_fake_quantize
        assert node is not None
        return node

    @property
    def float_weight(self) -> Tensor:
        """The weight, apart from autograd."""
        assert self.weight is not None
        return self.weight.detach()

    @property
    def batch_norm(self) -> Any:
        """The batch normalization that runs in the wrapper, or None."""
        return self.wrapper._batch_norm[0]

    def apply(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer of an input, with that weight and bias: before what follows in the wrapper, without hooks."""
        zeros = weight.new_zeros(weight.shape[self.kind.output_axis]) if bias is None else bias
        registry: dict[str, Any] = self.layer._parameters
        with self.wrapper._in_registry(weight, zeros if registry.get("bias") is not None else bias):
            return self.layer.forward(input)  # type: ignore[no-any-return]

    def mean_input(self, input: Tensor) -> Tensor:
        """The mean over samples, of linear layers over all positions, too; in the weight's dtype."""
        input = input.detach().to(self.float_weight.dtype)
        if self._is_linear:
            return input.reshape(-1, input.shape[-1]).mean(0)
        return input.mean(0) if input.dim() == self.float_weight.dim() else input

    def mean_output(self, mean_input: Tensor, weight: Tensor) -> Tensor:
        """The mean of each output channel, without bias: what comes of the mean input, since the layer is linear."""
        output = self.apply(mean_input, weight)
        return output if self._is_linear else output.flatten(1).mean(1)

    @property
    def _is_linear(self) -> bool:
        return self.kind.batch_norm is None or isinstance(self.layer, nn.Linear)


def quantized_layers(model: nn.Module, batch: Any) -> list[QuantizedLayer]:
    """The layers that a batch reaches, in the order in which they run."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[QATModuleWrapper, tuple[Any, ...]] = {}

    def note(wrapper: QATModuleWrapper, args: tuple[Any, ...]) -> None:
        calls.setdefault(wrapper, args[1:])

    wrappers = [module for module in names if isinstance(module, QATModuleWrapper)]
    handles = [wrapper.register_forward_pre_hook(note) for wrapper in wrappers]
    try:
        with evaluating(model), nodes_off(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    layers: dict[Any, QuantizedLayer] = {}
    for wrapper, given in calls.items():
        weight, bias = _parameters_of(wrapper, given)
        key = (id(weight), id(wrapper.weight_fake_quantize)) if isinstance(weight, nn.Parameter) else wrapper
        if key in layers:
            layers[key].wrappers.append(wrapper)
        else:
            own_weight = weight if isinstance(weight, nn.Parameter) else None
            own_bias = bias if isinstance(bias, nn.Parameter) else None
            is_computed = bias is not None and own_bias is None
            layers[key] = QuantizedLayer(names[wrapper], [wrapper], own_weight, own_bias, is_computed)
    for layer in layers.values():
        layer.obstacle = _obstacle(model, layer)
    return list(layers.values())


def _parameters_of(wrapper: QATModuleWrapper, given: tuple[Any, ...]) -> tuple[Any, Any]:
    """Weight and bias as the wrapper finds them: Parameters, tensors that are computed, or None."""
    if isinstance(wrapper, GivenWeightWrapper):
        return (*given, None, None)[:2]
    registry = wrapper.layer._parameters
    weight = registry.get("weight")
    bias = registry["bias"] if "bias" in registry else getattr(wrapper, "bias", None)
    return weight, bias


def _obstacle(model: nn.Module, layer: QuantizedLayer) -> str | None:
    if isinstance(layer.layer, nn.Embedding):
        return "it looks its weight up"
    if layer.weight is None:
        return "its weight is computed"
    if layer.wrapper.weight_fake_quantize is None:
        return "its weight is not quantized"
    holders = {
        id(module._parameters): module
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is layer.weight
    }
    others = [holder for key, holder in holders.items() if key not in {id(own._parameters) for own in layer.wrappers}]
    # A function is given the weight of a module that does not compute with it otherwise.
    is_given = any(isinstance(wrapper, GivenWeightWrapper) for wrapper in layer.wrappers)
    computes = any(isinstance(holder, (QATModuleWrapper, nn.Embedding)) for holder in others)
    if computes or len(others) > is_given:
        return "other modules share its weight"
    return None


@contextmanager
def watched_inputs(layers: list[QuantizedLayer], watcher: Watcher) -> Iterator[None]:
    """Hands what each of the layers is called with to a function, before the layer computes."""

    def hook_of(layer: QuantizedLayer) -> Callable[..., None]:
        def watch(wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else kwargs["input"]
            if isinstance(input, Tensor) and input.numel():
                watcher(layer, input)

        return watch

    handles = [
        wrapper.register_forward_pre_hook(hook_of(layer), with_kwargs=True)
        for layer in layers
        for wrapper in layer.wrappers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
