"""Scales, ranges and integer codes over training, for a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
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
        flips: of each layer by name, the share of its weights whose integer code is another than at the record before.
        returns: of each layer by name, the share of its weights that are back at the code of two records ago and had
            left it in between: they oscillate (Nagel et al. 2022).

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
        self.returns: dict[str, list[float]] = {name: [] for name in self._wrappers}
        self._steps_taken = 0
        self._codes: dict[str, tuple[Tensor, Tensor]] = {}  # of the last two records

    @torch.no_grad()
    def step(self) -> None:
        """Counts one training step, and records where it is due."""
        self._steps_taken += 1
        if (self._steps_taken - 1) % self.every:
            return
        self.steps.append(self._steps_taken)
        for name, node in self._nodes.items():
            self.scales[name].append(float(node.scale.median()))
            if name in self.ranges:
                lowest, highest = grid_ends(node)
                self.ranges[name].append((float(lowest), float(highest)))
        for name, wrapper in self._wrappers.items():
            self._record_codes(name, wrapper)

    def _record_codes(self, name: str, wrapper: QATModuleWrapper) -> None:
        node = wrapper.weight_fake_quantize
        if node is None or not node.is_initialized:
            self.flips[name].append(0.0)
            self.returns[name].append(0.0)
            return
        codes = node.to_codes(wrapper.evaluated_weight().detach())
        last, before = self._codes.get(name, (codes, codes))
        changed = codes != last
        returned = changed & (codes == before)
        self.flips[name].append(float(changed.float().mean()))
        self.returns[name].append(float(returned.float().mean()))
        self._codes[name] = (codes, last)

    @property
    def oscillation(self) -> dict[str, float]:
        """The mean share of each layer's weights that oscillate, over all records."""
        return {name: sum(shares) / len(shares) if shares else 0.0 for name, shares in self.returns.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        return {
            "steps": list(self.steps),
            "scales": {name: list(values) for name, values in self.scales.items()},
            "ranges": {name: [list(ends) for ends in values] for name, values in self.ranges.items()},
            "flips": {name: list(values) for name, values in self.flips.items()},
            "returns": {name: list(values) for name, values in self.returns.items()},
        }
