"""The sum of two quantized tensors, with a node after it; in evaluation, a sum of codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import arithmetic
from ..int8.operations import Int8Add
from .config import QATConfig
from .fake_quantize_layer import FakeQuantizeLayer
from .hooks import has_user_hooks
from .layer_types import Clip, clip_of
from .qat_module_wrapper import activation_node, in_dtype_of


class QATAdd(nn.Module):
    """Stands in the place of ``left + right`` and the activation that follows.

    In evaluation mode without gradients it adds codes as :class:`Int8Add` does, and returns floats on the grid.

    Args:
        config: grid, observer, estimator of the sum.
        left_source, right_source: the nodes that put the operands on their grids, somewhere before in the model.
        activation: ReLU, ReLU6 or Hardtanh that follows.
    """

    def __init__(
        self,
        config: QATConfig,
        left_source: FakeQuantizeLayer,
        right_source: FakeQuantizeLayer,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        clip = clip_of(activation)
        if clip is None:
            raise TypeError(f"activation must only clip (ReLU, ReLU6, Hardtanh), got {type(activation).__name__}")
        # In tuples, because other rooms of the model own (and name) these modules.
        self.sources = (left_source, right_source)
        self._activation = (activation,)
        self._clip: Clip = clip
        self.output_fake_quantize = activation_node(config, non_negative=clip[0] >= 0).to(left_source.scale.device)

    @property
    def computes_integers(self) -> bool:
        """Whether a call now adds codes: evaluation mode, no gradients, and every node switched on."""
        if self.training or torch.is_grad_enabled():
            return False
        nodes = (*self.sources, self.output_fake_quantize)
        return all(node.fake_quantize_enabled and not node.calibrating for node in nodes)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The sum, fake-quantized (or, of codes, dequantized); the operands broadcast."""
        integers = self.computes_integers
        if integers and not has_user_hooks(*self._activation):
            return self._add_codes(left, right)
        total = left + right
        if self._activation[0] is not None:
            total = self._activation[0](total)
        return self._add_codes(left, right) if integers else self.output_fake_quantize(total)

    def to_integer(self) -> Int8Add:
        """The addition of codes with the present scales.

        Raises:
            RuntimeError: a node has seen no data.
        """
        left, right = (source.parameters_on_grid for source in self.sources)
        return Int8Add(left, right, self.output_fake_quantize.parameters_on_grid, self._clip)

    def _add_codes(self, left: Tensor, right: Tensor) -> Tensor:
        left_source, right_source = self.sources
        output = self.output_fake_quantize
        codes = left_source.to_codes(left), right_source.to_codes(right)
        output.require_initialized()
        left_ratio, right_ratio, constant = arithmetic.add_constants(
            left_source.scale,
            left_source.code_of_zero,
            right_source.scale,
            right_source.code_of_zero,
            output.scale,
            output.code_of_zero,
        )
        lowest, highest = (
            arithmetic.code_of_value(end, output.scale, output.code_of_zero, output.scheme) for end in self._clip
        )
        total = arithmetic.add_codes(
            codes[0], left_ratio, codes[1], right_ratio, constant, lowest, highest, output.scheme.dtype
        )
        return in_dtype_of(left, output.to_values(total))

    def extra_repr(self) -> str:
        return "" if self._activation[0] is None else f"-> {type(self._activation[0]).__name__}"
