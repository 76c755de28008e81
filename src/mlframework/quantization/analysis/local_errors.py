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


@dataclass
class ErrorEnergies:
    """Sums of squares over calls and batches, by cause, and how many values lie outside of a grid."""

    signal: float = 0.0
    weight: float = 0.0
    clipped: float = 0.0
    rounded: float = 0.0
    total: float = 0.0
    outside: int = 0
    elements: int = 0

    def count(self, node: FakeQuantizeLayer, values: Tensor) -> None:
        """Counts which of these values lie outside of the node's grid."""
        self.outside += saturated(node, values)
        self.elements += values.numel()

    def split(self) -> ErrorSplit:
        """Relative to the signal."""
        return ErrorSplit(
            weight=relative(self.weight, self.signal),
            clipped=relative(self.clipped, self.signal),
            rounded=relative(self.rounded, self.signal),
            total=relative(self.total, self.signal),
            clipped_share=self.outside / self.elements if self.elements else 0.0,
        )


def add_layer_error(
    energies: ErrorEnergies, wrapper: QATModuleWrapper, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Adds a call of a layer with a float input: the error of its weight and of what enters it, at its output.

    The layer itself runs four or five times for it, and nothing else does.

    Args:
        energies: to add to.
        wrapper: the layer.
        input, weight, bias: what it is called with.

    Returns:
        The input on its grid: shape and dtype of ``input``.
    """
    node, source = wrapper.weight_fake_quantize, wrapper.input_source
    assert node is not None
    output = wrapper.float_output(input, weight, bias)
    quantized = quantized_weight(node, weight)
    error = squared_sum(wrapper.float_output(input, quantized, bias) - output)
    energies.signal += squared_sum(output)
    energies.weight += error
    if source is None or not input.is_floating_point():
        energies.total += error
        return input
    on_grid, within = fake_quantized(source, input), clamped_to_grid(source, input)
    clamped = output if within is input else wrapper.float_output(within, weight, bias)
    energies.clipped += squared_sum(clamped - output)
    energies.rounded += squared_sum(wrapper.float_output(on_grid, weight, bias) - clamped)
    energies.total += squared_sum(wrapper.float_output(on_grid, quantized, bias) - output)
    energies.count(source, input)
    return on_grid


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
