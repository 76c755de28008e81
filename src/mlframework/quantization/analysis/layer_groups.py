"""The layers of a prepared model as a configuration selects them: all wrappers of one name have one width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from ..qat.config import QATConfig
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.given_weight import GivenWeightWrapper
from ..qat.layer_types import layer_type_of
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation


@dataclass(frozen=True)
class LayerGroup:
    """What one name in ``QATConfig(overrides=...)`` stands for: a layer at all its call sites, or the functions that
    the code of one module calls as layers.

    Attributes:
        name: qualified name of the layer, or of the module that calls the functions.
        wrappers: in the order of the model, by their names.
        own_inputs: nodes that put the input on its grid and that nothing else reads: what is float if the group is.
    """

    name: str
    wrappers: dict[str, QATModuleWrapper] = field(default_factory=dict)
    own_inputs: tuple[FakeQuantizeLayer, ...] = ()

    @property
    def first(self) -> QATModuleWrapper:
        """The wrapper of the first call site."""
        return next(iter(self.wrappers.values()))

    @property
    def kind(self) -> str:
        """The type of the layer."""
        return type(self.first.layer).__name__

    @property
    def config(self) -> QATConfig:
        """What the layer was prepared with."""
        return self.first.quantization_config

    @property
    def weight_nodes(self) -> tuple[FakeQuantizeLayer, ...]:
        """The nodes of its weights, each once."""
        nodes = (wrapper.weight_fake_quantize for wrapper in self.wrappers.values())
        return tuple({id(node): node for node in nodes if node is not None}.values())


def layer_groups(model: nn.Module) -> tuple[LayerGroup, ...]:
    """The quantized layers of a prepared model that data has reached, in the order of the model.

    Raises:
        ValueError: no node of the model has seen data, or there is no quantized layer in it.
    """
    nodes = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    if not nodes:
        raise ValueError("model must be a prepared model, got one without any FakeQuantizeLayer")
    found: dict[object, tuple[str, dict[str, QATModuleWrapper]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QATModuleWrapper) or not _is_reached(module):
            continue
        owner = name.rpartition(".")[0]
        key: object = owner if isinstance(module, GivenWeightWrapper) else id(module.layer)
        group = found.setdefault(key, (owner if isinstance(module, GivenWeightWrapper) else name, {}))
        group[1][name] = module
    if not found:
        raise ValueError("model must be calibrated or trained first: no quantized layer in it has seen data")
    readers = _readers(model)
    return tuple(LayerGroup(name, wrappers, _own_inputs(wrappers, readers)) for name, wrappers in found.values())


def in_order(groups: Iterable[LayerGroup], called: Iterable[str]) -> tuple[LayerGroup, ...]:
    """The groups in the order in which their wrappers were called first, without wrappers that never were.

    Args:
        called: names of wrappers, in that order.
    """
    order = {name: index for index, name in enumerate(called)}
    ran = [
        replace(group, wrappers={name: group.wrappers[name] for name in group.wrappers if name in order})
        for group in groups
    ]
    return tuple(
        sorted(
            (group for group in ran if group.wrappers),
            key=lambda group: min(order[name] for name in group.wrappers),
        )
    )


def activation_nodes(model: nn.Module) -> dict[str, FakeQuantizeLayer]:
    """The nodes of a model that are no weight's and that data has reached, by name."""
    weights = {id(each.weight_fake_quantize) for each in model.modules() if isinstance(each, QATModuleWrapper)}
    return {
        name: node
        for name, node in model.named_modules()
        if isinstance(node, FakeQuantizeLayer) and id(node) not in weights and node.is_initialized
    }


def owner_of_activation(name: str) -> tuple[str, str]:
    """Of a node's name: what the activation belongs to, and whether it is its ``"input"`` or its ``"output"``."""
    owner, _, last = name.rpartition(".")
    if last in ("input_fake_quantize", "output_fake_quantize"):
        return owner, last.removesuffix("_fake_quantize")
    return name.removesuffix("_fake_quantize"), "output"


def output_axis(wrapper: QATModuleWrapper) -> int:
    """The axis of the layer's weight along which the output's channels lie."""
    layer_type = layer_type_of(wrapper.layer)
    assert layer_type is not None
    return layer_type.output_axis


def _is_reached(wrapper: QATModuleWrapper) -> bool:
    source = wrapper.input_source
    if wrapper.weight_fake_quantize is None:
        return False
    return source is None or source.is_initialized


def _readers(model: nn.Module) -> dict[int, set[int]]:
    """For each node, by identity, the wrappers and operations that read what it puts on a grid."""
    readers: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, QATModuleWrapper):
            sources: tuple[FakeQuantizeLayer | None, ...] = (module.input_source,)
        elif isinstance(module, QATOperation):
            sources = module.sources
        else:
            continue
        for source in sources:
            if source is not None:
                readers.setdefault(id(source), set()).add(id(module))
    return readers


def _own_inputs(wrappers: dict[str, QATModuleWrapper], readers: dict[int, set[int]]) -> tuple[FakeQuantizeLayer, ...]:
    own = {id(wrapper) for wrapper in wrappers.values()}
    sources = [wrapper.input_source for wrapper in wrappers.values()]
    return tuple(
        {id(source): source for source in sources if source is not None and readers[id(source)] <= own}.values()
    )
