"""Scales, ranges and integer codes over training, for a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..training.oscillation import OscillationFrequency
from .local_errors import grid_ends


class QuantizationHistory:
    """Records how the grids of a prepared model move while it trains. Call :meth:`step` after every optimizer step.

    Reading a grid waits for its device; ``every`` spaces the records.

    Args:
        model: a prepared model.
        every: steps from one record to the next.

    Attributes:
        steps: of the records, counted from 1.
        scales: of each node by name, the scale at each record: its median over channels.
        ranges: of each node that is not a weight's by name, the lowest and the highest value on its grid.
        flips: of each layer by name, the share of its weights whose integer code is another than at the record before
            (than at the beginning, for the first).
        oscillating: of each layer by name, the share of its weights that oscillate at each record, as an
            :class:`OscillationFreezer` counts it (Nagel et al. 2022): a moving average of how often their codes turned
            round is above 0.005. Records stand for steps where ``every`` spaces them.

    Raises:
        ValueError: ``every`` is no positive number of steps, or the model is not prepared.

    Example:
        >>> prepared = prepare(nn.Linear(8, 2), QATConfig(), (torch.randn(1, 8),))
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
        >>> history = QuantizationHistory(prepared)
        >>> for _ in range(3):
        ...     prepared(torch.randn(16, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     history.step()
        >>> history.steps, len(history.flips[""])
        ([1, 2, 3], 3)
    """

    def __init__(self, model: nn.Module, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every!r}")
        self._nodes = {name: node for name, node in model.named_modules() if isinstance(node, FakeQuantizeLayer)}
        if not self._nodes:
            raise ValueError("model must be a prepared model, got one without any FakeQuantizeLayer")
        self._wrappers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QATModuleWrapper) and isinstance(module._parameters.get("weight"), Tensor)
        }
        self._weight_nodes = {
            id(module.weight_fake_quantize) for module in model.modules() if isinstance(module, QATModuleWrapper)
        }
        self.every = every
        self.steps: list[int] = []
        self.scales: dict[str, list[float]] = {name: [] for name in self._nodes}
        self.ranges: dict[str, list[tuple[float, float]]] = {
            name: [] for name, node in self._nodes.items() if id(node) not in self._weight_nodes
        }
        self.flips: dict[str, list[float]] = {name: [] for name in self._wrappers}
        self.oscillating: dict[str, list[float]] = {name: [] for name in self._wrappers}
        self._steps_taken = 0
        self._frequencies: dict[str, OscillationFrequency] = {}
        for name in self._wrappers:
            codes = self._codes_of(name)
            if codes is not None:
                self._frequencies[name] = OscillationFrequency(codes)

    @torch.no_grad()
    def step(self) -> None:
        """Counts one training step, and records where it is due."""
        self._steps_taken += 1
        if (self._steps_taken - 1) % self.every:
            return
        self.steps.append(self._steps_taken)
        for name, node in self._nodes.items():
            self.scales[name].append(median_scale(node))
            if name in self.ranges:
                lowest, highest = grid_ends(node)
                self.ranges[name].append((float(lowest), float(highest)))
        for name in self._wrappers:
            self._record_codes(name)

    def _codes_of(self, name: str) -> Tensor | None:
        wrapper = self._wrappers[name]
        node = wrapper.weight_fake_quantize
        if node is None or not node.is_initialized:
            return None
        return node.to_codes(wrapper.evaluated_weight().detach())

    def _record_codes(self, name: str) -> None:
        codes = self._codes_of(name)
        if codes is None:
            self.flips[name].append(0.0)
            self.oscillating[name].append(0.0)
            return
        frequency = self._frequencies.setdefault(name, OscillationFrequency(codes))
        self.flips[name].append(float((codes != frequency.last_codes).float().mean()))
        frequency.update(codes)
        self.oscillating[name].append(float(frequency.oscillating.float().mean()))

    @property
    def oscillation(self) -> dict[str, float]:
        """The share of each layer's weights that oscillate at the last record."""
        return {name: shares[-1] if shares else 0.0 for name, shares in self.oscillating.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        return {
            "steps": list(self.steps),
            "scales": {name: list(values) for name, values in self.scales.items()},
            "ranges": {name: [list(ends) for ends in values] for name, values in self.ranges.items()},
            "flips": {name: list(values) for name, values in self.flips.items()},
            "oscillating": {name: list(values) for name, values in self.oscillating.items()},
        }


def median_scale(node: FakeQuantizeLayer) -> float:
    """The scale of a node as one number: its median over channels."""
    return float(node.scale.median())
