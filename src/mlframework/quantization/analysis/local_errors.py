"""A layer's own error, taken apart: its weight's, what the range of its input clips, what the rounding of it adds."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from .. import arithmetic
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.weight_range import update_range
from .measures import relative, squared_sum


@dataclass(frozen=True)
class ErrorSplit:
    r"""The squared error at a layer's output, relative to the output's energy, by what causes it.

    With :math:`L(x, w)` the layer with the batch normalization and the activation that run with it, of the float
    input: ``weight`` is the energy of :math:`L(x, \hat w) - L(x, w)`, ``clipped`` that of
    :math:`L(\operatorname{clamp}(x), w) - L(x, w)`, where the input is clamped to the ends of its grid, and ``rounded``
    that of :math:`L(\hat x, w) - L(\operatorname{clamp}(x), w)`. They add up to ``total``, all of it at once, as far as
    the three are uncorrelated.

    Attributes:
        weight, clipped, rounded, total: relative energies.
        clipped_share: the share of the input's elements outside of the grid.
    """

    weight: float = 0.0
    clipped: float = 0.0
    rounded: float = 0.0
    total: float = 0.0
    clipped_share: float = 0.0

    @property
    def cause(self) -> str:
        """The largest of the three: ``"weight"``, ``"clipped"`` or ``"rounded"``; ``"none"`` without an error."""
        parts = {"weight": self.weight, "clipped": self.clipped, "rounded": self.rounded}
        largest = max(parts, key=parts.__getitem__)
        return largest if parts[largest] > 0 else "none"

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


class LocalErrors:
    """Adds up the energies of a layer's errors over calls and batches."""

    def __init__(self) -> None:
        self._signal = self._weight = self._clipped = self._rounded = self._total = 0.0
        self._saturated = self._elements = 0

    def add(
        self, wrapper: QATModuleWrapper, input: Tensor, weight: Tensor, bias: Tensor | None, node: FakeQuantizeLayer
    ) -> Tensor:
        """Adds a call with a float input, and runs the layer four or five times for it.

        Args:
            wrapper: the layer.
            input, weight, bias: what it is called with.
            node: of the weight.

        Returns:
            The input on its grid: shape and dtype of ``input``.
        """
        output = wrapper.float_output(input, weight, bias)
        quantized = quantized_weight(node, weight)
        self._signal += squared_sum(output)
        self._weight += squared_sum(wrapper.float_output(input, quantized, bias) - output)
        source = wrapper.input_source
        if source is None or not input.is_floating_point():
            self._total = self._weight
            return input
        on_grid = fake_quantized(source, input)
        clamped = clamped_to_grid(source, input)
        within = output if clamped is input else wrapper.float_output(clamped, weight, bias)
        self._clipped += squared_sum(within - output)
        self._rounded += squared_sum(wrapper.float_output(on_grid, weight, bias) - within)
        self._total += squared_sum(wrapper.float_output(on_grid, quantized, bias) - output)
        self._saturated += saturated(source, input)
        self._elements += input.numel()
        return on_grid

    def result(self) -> ErrorSplit:
        """The split of what was added."""
        return ErrorSplit(
            weight=relative(self._weight, self._signal),
            clipped=relative(self._clipped, self._signal),
            rounded=relative(self._rounded, self._signal),
            total=relative(self._total, self._signal),
            clipped_share=self._saturated / self._elements if self._elements else 0.0,
        )


def quantized_weight(node: FakeQuantizeLayer, weight: Tensor) -> Tensor:
    """A weight on the grid that evaluation puts it on, whether the node is switched on or not."""
    update_range(node, weight)
    return fake_quantized(node, weight)


def fake_quantized(node: FakeQuantizeLayer, values: Tensor) -> Tensor:
    """Values on the grid of a node, whether it is switched on or not; dtype of ``values``."""
    return node.to_values(node.to_codes(values)).to(values.dtype)


def grid_ends(node: FakeQuantizeLayer, dimensions: int = 1) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value on the grid of a node, shaped to broadcast against a tensor."""
    scale, zero_point = node.scale.detach(), node.code_of_zero.detach()
    lowest, highest = ((code - zero_point) * scale for code in (node.scheme.quant_min, node.scheme.quant_max))
    axis = node.scheme.resolve_channel_axis(dimensions)
    return arithmetic.along_axis(lowest, dimensions, axis), arithmetic.along_axis(highest, dimensions, axis)


def clamped_to_grid(node: FakeQuantizeLayer, values: Tensor) -> Tensor:
    """Values within the ends of the grid; ``values`` itself where all of them are."""
    lowest, highest = (end.to(values.dtype) for end in grid_ends(node, values.dim()))
    if not bool(((values < lowest) | (values > highest)).any()):
        return values
    return values.clamp(lowest, highest)


def saturated(node: FakeQuantizeLayer, values: Tensor) -> int:
    """How many values lie more than half a step outside of the grid."""
    lowest, highest = grid_ends(node, values.dim())
    half = arithmetic.along_axis(node.scale.detach() / 2, values.dim(), node.scheme.resolve_channel_axis(values.dim()))
    return int(((values < lowest - half) | (values > highest + half)).sum())
