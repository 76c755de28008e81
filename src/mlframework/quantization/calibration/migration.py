r"""Scales that move from what makes a value into the layers that read it, with the float function unchanged.

A channel of a value may be multiplied by a positive number where its maker's weights are, and divided where its
readers' are: :math:`W_2\, f(W_1 x + b_1) = (W_2 D^{-1})\, f(D W_1 x + D b_1)` for a diagonal D and an f that is linear
or a ReLU (Nagel et al. 2019, arXiv:1906.04721, equations 5 to 8). The numbers are powers of two, so that floats are
multiplied without rounding, and the float function stays the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from .layers import QuantizedLayer, watched_inputs
from .own_parameters import own_parameters
from .report import MethodReport
from .runs import evaluating, nodes_off, run

_NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm)
_MOST = 2.0**10


@dataclass(eq=False)
class Edge:
    """A value on a grid, the module that makes it and the layers that read it.

    Attributes:
        name: the maker's in the model.
        producer: a quantized layer, or a normalization with an elementwise affine.
        readers: quantized layers.
        extents: (C,), the largest magnitude of each channel that the readers were given.
    """

    name: str
    producer: QuantizedLayer | nn.Module
    readers: list[QuantizedLayer]
    extents: Tensor | None = field(default=None, repr=False)

    def scaled_parameters(self) -> list[nn.Parameter]:
        """What the numbers are multiplied to and divided by."""
        return [*self._made_by(), *(reader.weight for reader in self.readers if reader.weight is not None)]

    def _made_by(self) -> list[nn.Parameter]:
        producer: Any = self.producer
        if isinstance(producer, QuantizedLayer) and producer.batch_norm is None:
            return [each for each in (producer.weight, producer.bias) if each is not None]
        norm = producer.batch_norm if isinstance(producer, QuantizedLayer) else producer
        return [each for each in (norm.weight, getattr(norm, "bias", None)) if each is not None]

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiplies the channels of the value by these, shape (C,)."""
        producer = self.producer
        axis = producer.kind.output_axis if isinstance(producer, QuantizedLayer) and producer.batch_norm is None else 0
        for parameter in self._made_by():
            parameter.mul_(_along(factors, parameter.dim(), axis if parameter.dim() > 1 else 0).to(parameter))
        for reader in self.readers:
            weight = reader.float_weight.movedim(reader.kind.output_axis, 0)
            groups = _groups(reader)
            of_group = factors.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
            divisors = of_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
            weight.div_(divisors.to(weight))


def input_channels(reader: QuantizedLayer) -> Tensor:
    """The layer's weight as (groups, outputs of a group, input channels of a group, size)."""
    weight, groups = reader.float_weight.movedim(reader.kind.output_axis, 0), _groups(reader)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _groups(reader: QuantizedLayer) -> int:
    return int(getattr(reader.layer, "groups", 1))


def _along(values: Tensor, dimensions: int, axis: int) -> Tensor:
    return values.reshape([-1 if dimension == axis else 1 for dimension in range(dimensions)])


def powers_of_two(factors: Tensor) -> Tensor:
    """The nearest ones, none beyond what floats bear."""
    return torch.exp2(torch.log2(factors.clamp(1 / _MOST, _MOST)).round())


def edges_of(model: nn.Module, layers: Sequence[QuantizedLayer], kind: type, report: MethodReport) -> list[Edge]:
    """The edges whose maker is of a kind, with notes of those that numbers cannot move along.

    Args:
        kind: :class:`QATModuleWrapper`, or ``nn.Module`` for normalizations.
    """
    names = {module: name for name, module in model.named_modules()}
    wrappers = [module for module in names if isinstance(module, QATModuleWrapper)]
    of_wrapper = {wrapper: layer for layer in layers for wrapper in layer.wrappers}
    makers = {wrapper.output_fake_quantize: wrapper for wrapper in wrappers}
    edges = []
    for node in names:
        if not isinstance(node, FakeQuantizeLayer) or not node.feeds_layers_alone:
            continue
        readers = [wrapper for wrapper in wrappers if wrapper.input_source is node]
        maker = makers.get(node) if kind is QATModuleWrapper else next(iter(node.made_by), None)
        if maker is None or not readers or not isinstance(maker, (QATModuleWrapper, *_NORMALIZATIONS)):
            continue
        name = names[maker]
        if not all(each in of_wrapper for each in (maker, *readers) if isinstance(each, QATModuleWrapper)):
            report.note(name, "no batch reaches it, or what reads it")
            continue
        producer = of_wrapper[maker] if isinstance(maker, QATModuleWrapper) else maker
        edge = Edge(name, producer, [of_wrapper[each] for each in readers])
        reason = _obstacle(edge)
        if reason is None:
            edges.append(edge)
        else:
            report.note(name, reason)
    return edges


def _obstacle(edge: Edge) -> str | None:
    producer: Any = edge.producer
    if isinstance(producer, QuantizedLayer):
        reason = _obstacle_of_layer(producer)
        low, high = producer.wrapper._clip
        if reason is None and (low not in (0, -math.inf) or high != math.inf):
            reason = (
                f"its activation clips at {high if high != math.inf else low:g}, where scales do not commute with it"
            )
        norm = producer.batch_norm
        if reason is None and norm is not None and norm.weight is None:
            reason = "batch normalization without weight and bias follows"
        if reason is None and any(_is_last(reader) != _is_last(producer) for reader in edge.readers):
            reason = "what reads it has its channels along another axis"
    else:
        reason = None if producer.weight is not None and producer.weight.dim() == 1 else "it has no weight of one axis"
        if reason is None and not all(_is_last(reader) for reader in edge.readers):
            reason = "what reads it has its channels along another axis"
    for reader in edge.readers:
        why = _obstacle_of_layer(reader)
        if why is not None:
            reason = reason or f"{reader.name} reads it: {why}"
    return reason


def _is_last(layer: QuantizedLayer) -> bool:
    return isinstance(layer.layer, nn.Linear) or layer.kind.batch_norm is None


def _obstacle_of_layer(layer: QuantizedLayer) -> str | None:
    if layer.obstacle is not None:
        return layer.obstacle
    if len(layer.wrappers) > 1:
        return "it is called at several places"
    if layer.has_computed_bias:
        return "its bias is computed"
    if not layer.weight_node.observer.enabled:
        return "the scale of its weight is held"
    return None


def measure_extents(model: nn.Module, edges: Sequence[Edge], batches: Sequence[Any]) -> None:
    """Sets ``extents``: what the float model gives the readers."""
    of_reader: dict[QuantizedLayer, list[Edge]] = {}
    for edge in edges:
        of_reader.setdefault(edge.readers[0], []).append(edge)

    def watch(layer: QuantizedLayer, input: Tensor) -> None:
        axis = input.dim() - 1 if _is_last(layer) else input.dim() - layer.float_weight.dim() + 1
        extents = input.detach().abs().movedim(axis, 0).flatten(1).amax(1)
        for edge in of_reader[layer]:
            edge.extents = extents if edge.extents is None else torch.maximum(edge.extents, extents)

    with evaluating(model), nodes_off(model), watched_inputs(list(of_reader), watch):
        for batch in batches:
            run(model, batch)


def float_results(model: nn.Module, batch: Any) -> list[Tensor]:
    """Of the model with its nodes off."""
    with evaluating(model), nodes_off(model):
        return [leaf.clone() for leaf in tree_leaves(run(model, batch)) if isinstance(leaf, Tensor)]


def migrate(
    model: nn.Module, layers: Sequence[QuantizedLayer], factors: dict[Edge, Tensor], batch: Any, report: MethodReport
) -> None:
    """Scales along edges; takes back, and notes, what changes the float function of a batch."""
    own = own_parameters(model, [parameter for edge in factors for parameter in edge.scaled_parameters()])
    for layer in layers:
        layer.weight = own.get(layer.weight, layer.weight) if layer.weight is not None else None
        layer.bias = own.get(layer.bias, layer.bias) if layer.bias is not None else None
    expected = float_results(model, batch)
    for edge, factor in factors.items():
        edge.scale(factor)
    faulty = [] if _same(expected, float_results(model, batch)) else _found_faulty(model, factors, batch, expected)
    for edge in factors:
        report.note(edge.name, "the float model would compute something else" if edge in faulty else None)
        changed = [each for each in (edge.producer, *edge.readers) if isinstance(each, QuantizedLayer)]
        for layer in changed:
            if layer.weight_node.learnable:  # an observed scale follows the weight by itself
                layer.weight_node.commit(layer.weight_node.observer.measure(layer.float_weight))


def _found_faulty(model: nn.Module, factors: dict[Edge, Tensor], batch: Any, expected: list[Tensor]) -> list[Edge]:
    for edge, factor in factors.items():
        edge.scale(1 / factor)
    faulty = []
    for edge, factor in factors.items():
        edge.scale(factor)
        if not _same(expected, float_results(model, batch)):
            edge.scale(1 / factor)
            faulty.append(edge)
    return faulty


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
