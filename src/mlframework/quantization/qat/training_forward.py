"""The training forward of a wrapped layer: on codes where an operator computes it, else on the floats that they stand
for, through the user's own modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arithmetic, kernels
from ..graph.hooks import is_watched
from ..int8.operations import in_format_of
from ..kernels.differentiable.function import refuse_export_with_gradients
from ..kernels.differentiable.layer import Computation
from .attached_codes import Way
from .integer_product import integer_product, training_description
from .quantized_output import any_dropout_is_active, clipped_and_quantized, normalized_and_quantized
from .weight_range import range_of_weight
from .wrapped_layer import WrappedLayer


class TrainingForward(WrappedLayer):
    """What a :class:`.QATModuleWrapper` computes in training, and wherever it does not compute on integers alone."""

    def _train_forward(self, input: Tensor) -> Tensor:
        """The layer's output with quantization noise, differentiable."""
        if self.training:
            refuse_export_with_gradients()
        weight, bias = self._parameters_now()
        node = self.weight_fake_quantize
        if node is not None and self.training:
            if node.range_of is not None:
                node.range_of = None  # training sets the scale without comparing weights
        elif node is not None and node.quantizes and not node.observes:
            with range_of_weight(node, weight):
                return self._quantized_forward(input, weight, bias)
        return self._quantized_forward(input, weight, bias)

    def _quantized_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = self.input_fake_quantize(input) if self.input_fake_quantize is not None else input
        product = self._on_codes(values, weight, bias)
        if product is None:
            return self._follow(self._on_floats(values, weight, bias), None, None)
        output, computation = product
        addend = None
        if bias is not None and self._batch_norm[0] is not None:
            addend = arithmetic.along_axis(bias, output.dim(), 1).to(output.dtype)
            output = output + addend
        output = self._follow(output, computation, None if addend is None else addend.detach())
        device = output.device.type
        if self.output_fake_quantize is None and torch.is_autocast_enabled(device):
            return output.to(torch.get_autocast_dtype(device))
        return output if self.input_fake_quantize is None else in_format_of(input, output)

    def _on_codes(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Computation | None] | None:
        """The layer on the codes of its fake-quantized input and weight, and how to compute it again; or None."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if not self.integer_forward or source is None or weight_node is None or not weight_node.quantizes:
            return None
        if not self._input_is_on_grid() or not self._trains_on_integers(input, weight):
            return None
        if is_watched(self.layer, source, weight_node):  # a hook on a node may take values off its grid
            return None
        codes = source.codes_on_grid(input, Way(self, self.input_passes))
        own_bias = bias if self._batch_norm[0] is None else None
        return integer_product(self.layer, input, codes, weight, weight_node, own_bias, again=self.recompute)

    def _trains_on_integers(self, input: Tensor, weight: Tensor) -> bool:
        """Whether the layer has a form on integers here; planned once for what the answer depends on."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if source is None or weight_node is None or input.numel() == 0:
            return False
        if input.dim() != weight.dim() and weight.dim() > 2:  # a convolution without a batch
            return False
        description = training_description(self.layer, source, weight_node, input, weight)
        return description is not None and kernels.fuses(input) and kernels.trains_on_integers(description)

    def _input_is_on_grid(self) -> bool:
        """Whether what reaches the layer now is what a node quantized, moved about at the most."""
        source = self.input_source
        return source is not None and source.quantizes and not any_dropout_is_active(self._dropouts)

    def _follow(self, output: Tensor, computation: Computation | None, addend: Tensor | None) -> Tensor:
        """Batch normalization, activation and output node: in one step where that can be."""
        batch_norm, node = self._batch_norm[0], self.output_fake_quantize
        following = self.following
        activation = following[-1] if following and following[-1] is not batch_norm else None
        if node is not None:
            if batch_norm is None:
                fused = clipped_and_quantized(output, None, activation, self._clip, node)
            else:
                recomputes = computation is not None and _is_cheap(computation, output)
                again = computation if recomputes else None
                fused = normalized_and_quantized(output, again, addend, batch_norm, activation, self._clip, node)
            if fused is not None:
                return fused
        for module in following:
            output = module(output)
        return output if node is None else node(output)

    def _on_floats(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Calls the user's module with the fake-quantized weight, and the bias it has on integers, in its registry."""
        source = self.input_source
        if self.weight_fake_quantize is not None and (source is None or not source.lets_pass):
            weight = self.weight_fake_quantize(weight)
        if bias is not None and self._batch_norm[0] is None:
            bias = self._rounded_bias(bias)
        with self._in_registry(weight, bias):
            return self.layer(input)  # type: ignore[no-any-return]

    def _rounded_bias(self, bias: Tensor) -> Tensor:
        """The bias rounded to units of the accumulator, straight through, once input and weight have grids."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if source is None or weight_node is None or not weight_node.quantizes or not self._input_is_on_grid():
            return bias
        rounded = arithmetic.bias_on_grid(bias.detach().float(), (source.scale * weight_node.scale).detach())
        return rounded.to(bias.dtype) + (bias - bias.detach())


def _is_cheap(computation: Computation, output: Tensor) -> bool:
    """Whether quantizing a layer's weight again is little work beside the memory that keeping its output takes."""
    return computation.weight.numel() < output.nbytes
