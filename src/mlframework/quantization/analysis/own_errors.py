"""What a module of a prepared model adds to the error by itself, given a float input, and how its output is spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from .local_errors import ErrorEnergies, ErrorSplit, clamped_to_grid, fake_quantized, quantized_weight
from .measures import relative, squared_sum


class OwnErrors:
    """Adds up, over calls and batches, what one module's nodes do to float values.

    Of a layer: what its weight's rounding changes, and what the grids of its output, and of its input where it has a
    node of its own for that, clip and round. Of an operation, or of a node that stands free: what its grid does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._energies = ErrorEnergies()
        self._largest = 0.0
        self._channel_ranges: Tensor | None = None
        self._error_sums: Tensor | None = None
        self._rows = 0

    def add(self, args: tuple[Any, ...], output: Tensor) -> None:
        """Adds one call of the module with its nodes switched off: its arguments, and what it returned."""
        quantized, module = output, self.module
        if isinstance(module, QATModuleWrapper):
            quantized = self._add_layer(module, args, output)
        node = output_node(module)
        self._energies.signal += squared_sum(output)
        if node is not None and node.is_initialized:
            within = clamped_to_grid(node, output)
            self._energies.clipped += squared_sum(within - output)
            self._energies.rounded += squared_sum(fake_quantized(node, output) - within)
            self._energies.count(node, output)
            quantized = fake_quantized(node, quantized)
        self._energies.total += squared_sum(quantized - output)
        self._add_spread(output, quantized)

    def _add_layer(self, wrapper: QATModuleWrapper, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The layer's output with its own weight and input on their grids, before the output's."""
        input, energies = args[0], self._energies
        weight, bias = wrapper.parameters_of_call(*args[1:])
        node, quantized = wrapper.weight_fake_quantize, weight
        if node is not None and node.is_initialized:
            quantized = quantized_weight(node, weight)
            energies.weight += squared_sum(wrapper.float_output(input, quantized, bias) - output)
        own = wrapper.input_fake_quantize
        if own is not None and own.is_initialized and input.is_floating_point():
            within = wrapper.float_output(clamped_to_grid(own, input), weight, bias)
            on_grid = fake_quantized(own, input)
            energies.clipped += squared_sum(within - output)
            energies.rounded += squared_sum(wrapper.float_output(on_grid, weight, bias) - within)
            energies.count(own, input)
            input = on_grid
        return wrapper.float_output(input, quantized, bias)

    def _add_spread(self, output: Tensor, quantized: Tensor) -> None:
        values = self._in_rows(output)
        errors = self._in_rows((quantized - output).double())
        ranges, sums = values.abs().amax(0).double(), errors.sum(0)
        if self._channel_ranges is None or self._error_sums is None:
            self._channel_ranges, self._error_sums = ranges, sums
        elif self._channel_ranges.shape == ranges.shape:
            self._channel_ranges = torch.maximum(self._channel_ranges, ranges)
            self._error_sums = self._error_sums + sums
        self._rows += values.shape[0]
        self._largest = max(self._largest, float(ranges.max()))

    def _in_rows(self, tensor: Tensor) -> Tensor:
        """Of shape (positions, channels)."""
        if tensor.dim() < 2:
            return tensor.detach().reshape(-1, 1)
        return tensor.detach().movedim(self._channel_axis(tensor), -1).flatten(0, -2)

    def _channel_axis(self, output: Tensor) -> int:
        """Axis 1 where there are pictures, signals or volumes; else the last."""
        layer = self.module.layer if isinstance(self.module, QATModuleWrapper) else None
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            return -1
        return 1 if layer is not None or output.dim() == 4 else -1

    @property
    def split(self) -> ErrorSplit:
        """The error by cause, relative to the output's energy."""
        return self._energies.split()

    @property
    def channel_ratio(self) -> float:
        """The largest magnitude of any channel of the output, as a multiple of the channels' median; 1 of a single
        channel."""
        if self._channel_ranges is None or len(self._channel_ranges) < 2:
            return 1.0
        return relative(self._largest, float(self._channel_ranges.median()))

    @property
    def peak(self) -> float:
        """The largest magnitude of the output, as a multiple of its root mean square."""
        elements = self._rows * (1 if self._channel_ranges is None else len(self._channel_ranges))
        return relative(self._largest, (self._energies.signal / elements) ** 0.5) if elements else 0.0

    @property
    def mean_share(self) -> float:
        """The share of the error's energy that a constant for every channel, its mean, makes up."""
        if self._error_sums is None or self._energies.total == 0:
            return 0.0
        return float(self._error_sums.square().sum()) / self._rows / self._energies.total


def output_node(module: nn.Module) -> FakeQuantizeLayer | None:
    """The node that puts a module's output on its grid; None where it stays float."""
    if isinstance(module, (QATModuleWrapper, QATOperation)):
        return module.output_fake_quantize
    return module if isinstance(module, FakeQuantizeLayer) else None
