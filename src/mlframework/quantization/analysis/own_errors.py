"""What a module of a prepared model adds to the error by itself, given a float input, and how its output is spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation
from .local_errors import ErrorSplit, clamped_to_grid, fake_quantized, quantized_weight, saturated
from .measures import relative, squared_sum


class OwnErrors:
    """Adds up, over calls and batches, what one module's nodes do to float values.

    Of a layer: what its weight's rounding changes, and what the grids of its output, and of its input where it has a
    node of its own for that, clip and round. Of an operation, or of a node that stands free: what its grid does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._signal = self._weight = self._clipped = self._rounded = self._total = 0.0
        self._saturated = self._elements = 0
        self._largest = 0.0
        self._channel_ranges: Tensor | None = None
        self._error_sums: Tensor | None = None
        self._rows = 0

    def add(self, args: tuple[Any, ...], output: Tensor) -> None:
        """Adds one call of the module with its nodes switched off: its arguments, and what it returned."""
        quantized = output
        module = self.module
        if isinstance(module, QATModuleWrapper):
            quantized = self._add_layer(module, args, output)
            node = module.output_fake_quantize
        else:
            node = module.output_fake_quantize if isinstance(module, QATOperation) else module  # type: ignore[assignment]
        self._signal += squared_sum(output)
        if node is not None and node.is_initialized:
            self._add_grid(node, output, output)
            quantized = fake_quantized(node, quantized)
        self._total += squared_sum(quantized - output)
        self._add_spread(output, quantized)

    def _add_layer(self, wrapper: QATModuleWrapper, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The layer's output with its own weight and input on their grids, before the output's."""
        input = args[0]
        weight, bias = wrapper.parameters_of_call(*args[1:])
        node, quantized = wrapper.weight_fake_quantize, weight
        if node is not None and node.is_initialized:
            quantized = quantized_weight(node, weight)
            self._weight += squared_sum(wrapper.float_output(input, quantized, bias) - output)
        own = wrapper.input_fake_quantize
        if own is not None and own.is_initialized and input.is_floating_point():
            within = wrapper.float_output(clamped_to_grid(own, input), weight, bias)
            on_grid = fake_quantized(own, input)
            self._clipped += squared_sum(within - output)
            self._rounded += squared_sum(wrapper.float_output(on_grid, weight, bias) - within)
            self._saturated += saturated(own, input)
            self._elements += input.numel()
            input = on_grid
        return wrapper.float_output(input, quantized, bias)

    def _add_grid(self, node: FakeQuantizeLayer, values: Tensor, output: Tensor) -> None:
        within = clamped_to_grid(node, values)
        self._clipped += squared_sum(within - output)
        self._rounded += squared_sum(fake_quantized(node, values) - within)
        self._saturated += saturated(node, values)
        self._elements += values.numel()

    def _add_spread(self, output: Tensor, quantized: Tensor) -> None:
        rows = output.detach().movedim(self._channel_axis(output), -1).flatten(0, -2) if output.dim() > 1 else output
        if rows.dim() < 2:
            rows = rows.reshape(-1, 1)
        errors = (quantized - output).detach().double()
        errors = errors.movedim(self._channel_axis(output), -1).reshape(rows.shape)
        ranges, sums = rows.abs().amax(0).double(), errors.sum(0)
        if self._channel_ranges is None or self._error_sums is None:
            self._channel_ranges, self._error_sums = ranges, sums
        elif self._channel_ranges.shape == ranges.shape:
            self._channel_ranges = torch.maximum(self._channel_ranges, ranges)
            self._error_sums = self._error_sums + sums
        self._rows += rows.shape[0]
        self._largest = max(self._largest, float(ranges.max()))

    def _channel_axis(self, output: Tensor) -> int:
        """Axis 1 where there are pictures, signals or volumes; else the last."""
        layer = self.module.layer if isinstance(self.module, QATModuleWrapper) else None
        if isinstance(layer, (nn.Linear, nn.Embedding)) or output.dim() < 2:
            return -1
        return 1 if layer is not None or output.dim() == 4 else -1

    @property
    def split(self) -> ErrorSplit:
        """The error by cause, relative to the output's energy."""
        return ErrorSplit(
            weight=relative(self._weight, self._signal),
            clipped=relative(self._clipped, self._signal),
            rounded=relative(self._rounded, self._signal),
            total=relative(self._total, self._signal),
            clipped_share=self._saturated / self._elements if self._elements else 0.0,
        )

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
        return relative(self._largest, (self._signal / elements) ** 0.5) if elements else 0.0

    @property
    def mean_share(self) -> float:
        """The share of the error's energy that a constant for every channel, its mean, makes up."""
        if self._error_sums is None or self._total == 0:
            return 0.0
        return float(self._error_sums.square().sum()) / self._rows / self._total
