"""How the values of each tensor lie on its grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import arithmetic
from ...qat.fake_quantize_layer import FakeQuantizeLayer
from ...qat.qat_module_wrapper import QATModuleWrapper
from ...qat.weight_range import update_range
from ...verification.recording import quantized_layers
from ..calls import Calls, run
from ..local_errors import grid_ends, saturated
from ..own_errors import output_node
from ..switching import switch

_BINS = 96


@dataclass(frozen=True)
class TensorHistogram:
    """Counts of a tensor's finite values in bins of one width.

    Attributes:
        name: of the layer, operation or node.
        role: ``"output"``, ``"input"`` or ``"weight"``.
        grid: in words.
        lowest, highest: of the finite values: the ends of the outermost bins. A weight's are in steps of its channel.
        counts: of each bin.
        range_low, range_high: the ends of the grid, in the same unit.
        clipped_share: the share of the values outside of it, infinite ones among them.
    """

    name: str
    role: str
    grid: str
    lowest: float
    highest: float
    counts: tuple[int, ...]
    range_low: float
    range_high: float
    clipped_share: float

    @property
    def label(self) -> str:
        """What it is, in words."""
        return f"{self.name.removesuffix('_fake_quantize') or '(the model)'}: {self.role}"

    @property
    def centres(self) -> list[float]:
        """The middle of each bin."""
        width = (self.highest - self.lowest) / len(self.counts)
        return [self.lowest + (index + 0.5) * width for index in range(len(self.counts))]


def histograms_of(model: nn.Module, calls: Calls) -> tuple[TensorHistogram, ...]:
    """Of float values on these calls, and of weights; inside :func:`.in_analysis`, in the order in which they run.

    A weight that is computed, or that code hands to a function, is that of the first call. A tensor without any finite
    value has no histogram.
    """
    switch(model, on=False)
    modules = {name: model.get_submodule(name) for name in quantized_layers(model)}
    weights: dict[str, Tensor] = {}
    extremes: dict[tuple[str, str], tuple[float, float]] = {}
    counts: dict[tuple[str, str], Tensor] = {}
    outside: dict[tuple[str, str], int] = {}
    elements: dict[tuple[str, str], int] = {}

    def measure(key: tuple[str, str], values: Tensor, node: FakeQuantizeLayer) -> None:
        outside[key] = outside.get(key, 0) + saturated(node, values)
        elements[key] = elements.get(key, 0) + values.numel()
        finite = values[values.isfinite()]
        if finite.numel():
            low, high = extremes.get(key, (float("inf"), float("-inf")))
            extremes[key] = (min(low, float(finite.min())), max(high, float(finite.max())))

    def count(key: tuple[str, str], values: Tensor, node: FakeQuantizeLayer) -> None:
        if key in extremes:
            new = _counted(values[values.isfinite()], *extremes[key])
            counts[key] = counts[key] + new if key in counts else new

    for note in (measure, count):
        _observe(model, modules, calls, weights, note)
    found: list[TensorHistogram] = []
    for (name, role), values in counts.items():
        node = _nodes_of(modules[name])[role]
        low, high = (float(end) for end in grid_ends(node))
        found.append(
            TensorHistogram(
                name,
                role,
                str(node.scheme),
                *extremes[name, role],
                tuple(int(value) for value in values),
                low,
                high,
                outside[name, role] / elements[name, role],
            )
        )
    for name, module in modules.items():
        weight_node = module.weight_fake_quantize if isinstance(module, QATModuleWrapper) else None
        if weight_node is not None and name in weights:
            found.append(_of_weight(name, weight_node, weights[name]))
    return tuple(found)


def _nodes_of(module: nn.Module) -> dict[str, FakeQuantizeLayer]:
    """The nodes of a module's activations that data has reached, by role."""
    nodes = {"output": output_node(module)}
    if isinstance(module, QATModuleWrapper):
        nodes["input"] = module.input_fake_quantize
    return {role: node for role, node in nodes.items() if node is not None and node.is_initialized}


def _observe(
    model: nn.Module,
    modules: dict[str, nn.Module],
    calls: Calls,
    weights: dict[str, Tensor],
    note: Callable[[tuple[str, str], Tensor, FakeQuantizeLayer], None],
) -> None:
    def hook(name: str) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, QATModuleWrapper) and name not in weights:
                weights[name] = module.parameters_of_call(*args[1:])[0].detach()
            for role, node in _nodes_of(module).items():
                values = output if role == "output" else args[0]
                if isinstance(values, Tensor) and values.is_floating_point() and values.numel():
                    note((name, role), values.detach(), node)

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        for call in calls:
            run(model, call)
    finally:
        for handle in handles:
            handle.remove()


def _counted(values: Tensor, lowest: float, highest: float) -> Tensor:
    return torch.histc(values.float(), _BINS, lowest, highest).cpu().double()


def _of_weight(name: str, node: FakeQuantizeLayer, weight: Tensor) -> TensorHistogram:
    """In steps, so that channels with scales of their own share an axis."""
    update_range(node, weight)
    axis = node.scheme.resolve_channel_axis(weight.dim())
    steps = weight.float() / arithmetic.along_axis(node.scale.detach(), weight.dim(), axis)
    extremes = float(steps.min()), float(steps.max())
    low, high = float(node.scheme.quant_min), float(node.scheme.quant_max)
    clipped = float(((steps < low - 0.5) | (steps > high + 0.5)).double().mean())
    counts = tuple(int(value) for value in _counted(steps, *extremes))
    return TensorHistogram(name, "weight", str(node.scheme), *extremes, counts, low, high, clipped)
