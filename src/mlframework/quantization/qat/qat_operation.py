"""An operation on quantized tensors, with a node after it; in evaluation, the same on codes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import arithmetic
from ..graph.hooks import has_user_hooks
from ..int8.integer_operation import Addition, Grid, IntegerOperation
from ..int8.lookup import Lookup
from ..int8.operations import Int8Operation
from ..kernels.differentiable.function import refuse_export_with_gradients
from ..kernels.operators.declaration import records_gradients
from .attached_codes import Way
from .config import QATConfig
from .fake_quantize_layer import FakeQuantizeLayer
from .integer_evaluation import in_dtype_of
from .layer_types import Clip, clip_of
from .qat_module_wrapper import activation_node
from .quantized_output import any_dropout_is_active, clipped_and_quantized, looked_up
from .recomputation import as_in_forward, is_recomputing


class QATOperation(nn.Module):
    """Stands in the place of an operation other than a layer (a sum, a concatenation, an activation, ...) and of the
    clipping activation that follows.

    In evaluation mode without gradients it computes on codes, as :class:`Int8Operation` does, and returns floats on
    the grid.

    Args:
        config: grid, observer, estimator of the result.
        operation: what to compute.
        sources: for each operand the node that puts it on its grid, somewhere before in the model.
        activation: ReLU, ReLU6 or Hardtanh that follows, where the operation ``clips``.
        non_negative: the result is known to be.
        dropouts: what lies between the nodes and the operands, and takes values off their grids in training.

    Attributes:
        input_passes: the modules that the first operand comes from and by, where it is what its node returned, by the
            model's graph; None where it is not.

    Raises:
        TypeError: the activation does more than clip, or the operation takes none.
    """

    def __init__(
        self,
        config: QATConfig,
        operation: IntegerOperation,
        sources: Sequence[FakeQuantizeLayer],
        activation: nn.Module | None = None,
        *,
        non_negative: bool = False,
        dropouts: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        clip = clip_of(activation)
        if clip is None:
            raise TypeError(f"activation must only clip (ReLU, ReLU6, Hardtanh), got {type(activation).__name__}")
        if activation is not None and not operation.clips:
            raise TypeError(f"activation must be None for a {operation.kind}, got {type(activation).__name__}")
        self.operation = operation
        # In tuples so that nn.Module does not register them; they are registered elsewhere.
        self.sources = tuple(sources)
        self.dropouts = tuple(dropouts)
        self._input_passes: tuple[tuple[nn.Module, ...] | None] = (None,)
        if isinstance(operation, Lookup):
            self.sources[0].serves_integers = True
        self._activation = (activation,)
        self._clip: Clip = clip
        node = activation_node(config, non_negative or clip[0] >= 0)
        self.output_fake_quantize = node.to(self.sources[0].scale.device)
        if isinstance(operation, Addition) and node.learnable:
            for source in self.sources:  # whose codes are a quarter of what a learned grid keeps for its gradient
                source.serves_integers = True

    @property
    def input_passes(self) -> tuple[nn.Module, ...] | None:
        return self._input_passes[0]

    @input_passes.setter
    def input_passes(self, modules: tuple[nn.Module, ...] | None) -> None:
        self._input_passes = (modules,)

    @property
    def input_source(self) -> FakeQuantizeLayer:
        """The node that puts the first operand on its grid."""
        return self.sources[0]

    @property
    def computes_integers(self) -> bool:
        """Whether a call now computes on codes: evaluation mode, no gradients, and every node switched on."""
        if self.training or records_gradients():
            return False
        nodes = (*self.sources, self.output_fake_quantize)
        return all(node.quantizes for node in nodes)

    def forward(self, *operands: Tensor) -> Tensor:
        """The operation's result, fake-quantized (or, of codes, dequantized)."""
        if is_recomputing():
            with as_in_forward([*self.sources, self.output_fake_quantize], *operands):
                return self._forward(*operands)
        return self._forward(*operands)

    def _forward(self, *operands: Tensor) -> Tensor:
        if self.training:
            refuse_export_with_gradients()
        integers = self.computes_integers
        if integers and not has_user_hooks(*self.operation.modules(), *self._activation):
            return self._on_codes(*operands)
        codes = self._codes(*operands) if integers else ()  # first: an in-place activation changes its operand
        if not integers:
            fused = self._in_one_step(*operands)
            if fused is not None:
                return fused
        result = self.operation.on_values(*operands)
        if self._activation[0] is not None:
            result = self._activation[0](result)
        return self._values_of(codes, result) if integers else self.output_fake_quantize(result)

    def _in_one_step(self, *operands: Tensor) -> Tensor | None:
        """The operation in training with what follows it, where one kernel does all of that."""
        node = self.output_fake_quantize
        if isinstance(self.operation, Addition):
            left, right = operands
            return clipped_and_quantized(left, right, self._activation[0], self._clip, node)
        if (
            isinstance(self.operation, Lookup)
            and self.sources[0].quantizes
            and not any_dropout_is_active(self.dropouts)
        ):
            return looked_up(operands[0], self.sources[0], self.operation, node, Way(self, self.input_passes))
        return None

    def to_integer(self) -> Int8Operation:
        """The operation on codes with the present scales.

        Raises:
            RuntimeError: a node has seen no data.
        """
        inputs = [source.parameters_on_grid for source in self.sources]
        return Int8Operation(self.operation, inputs, self.output_fake_quantize.parameters_on_grid, self._clip)

    def _on_codes(self, *operands: Tensor) -> Tensor:
        return self._values_of(self._codes(*operands), operands[0])

    def _codes(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return tuple(source.to_codes(operand) for source, operand in zip(self.sources, operands, strict=True))

    def _values_of(self, codes: tuple[Tensor, ...], like: Tensor) -> Tensor:
        output = self.output_fake_quantize
        output.require_initialized()
        inputs = [Grid.of(source.scale, source.code_of_zero, source.scheme) for source in self.sources]
        grid = Grid.of(output.scale, output.code_of_zero, output.scheme)
        constants = self.operation.constants(inputs, grid)
        result = self.operation.on_codes(codes, constants, grid, arithmetic.codes_of_clip(self._clip, *grid))
        return in_dtype_of(like, output.to_values(result))

    def extra_repr(self) -> str:
        activation = "" if self._activation[0] is None else f" -> {type(self._activation[0]).__name__}"
        return f"{self.operation}{activation}"
