"""The integer evaluation of a wrapped layer: the integer layer that it becomes, kept for as long as what it is made
from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..int8.folding import IntegerWeights, fold
from ..int8.layers import Int8Embedding, Int8Layer, padded
from ..int8.operations import in_format_of
from ..kernels.operators.declaration import records_gradients
from ..kernels.operators.integer_layers import OutputGrid, integer_layer
from ..scheme import QuantizationScheme
from .layer_types import Application, layer_type_of
from .weight_range import is_up_to_date, range_of_weight, require_finite
from .wrapped_layer import WrappedLayer


class IntegerEvaluation(WrappedLayer):
    """What a :class:`.QATModuleWrapper` computes with in evaluation, and what ``convert`` puts in its place."""

    @property
    def computes_integers(self) -> bool:
        """Whether a call now computes on integers: evaluation mode, no gradients, and every node switched on."""
        batch_norm = self._batch_norm[0]
        if self.training or records_gradients() or (batch_norm is not None and batch_norm.training):
            return False
        nodes = [self.input_source, self.weight_fake_quantize]
        if self.output_fake_quantize is not None:
            nodes.append(self.output_fake_quantize)
        return all(node is not None and node.quantizes for node in nodes)

    def to_integer(self) -> Int8Layer | Int8Embedding:
        """The integer layer of the present weights, statistics and scales, batch normalization folded in.

        Raises:
            RuntimeError: a node has seen no data.
            ValueError: a parameter holds NaN or infinite values.
        """
        return self._integer_form(self.evaluated_weight(), self._evaluated_bias())

    def _integer_form(self, weight: Tensor, bias: Tensor | None) -> Int8Layer | Int8Embedding:
        self._require_finite(weight, bias)
        if isinstance(self.layer, nn.Embedding):
            codes, scale, scheme = self._weight_codes(weight)
            return Int8Embedding(codes, scale.clone(), scheme)
        source = self.input_source
        if source is None:
            raise RuntimeError(
                "input_fake_quantize is None and take_input_from() named no node: the input's grid is unknown"
            )
        output = self.output_fake_quantize
        return self._application().to_integer(
            self._folded(weight, bias),
            source.parameters_on_grid,
            None if output is None else output.parameters_on_grid,
            self._clip,
        )

    def _application(self) -> Application:
        layer_type = layer_type_of(self.layer)
        assert layer_type is not None and layer_type.application is not None
        return layer_type.application(self.layer)

    def _require_finite(self, weight: Tensor, bias: Tensor | None) -> None:
        node = self.weight_fake_quantize
        name = "" if node is None else node.name.removesuffix("weight_fake_quantize")
        require_finite(weight, f"{name}weight")
        require_finite(bias, f"{name}bias")
        for part, tensor in self._batch_norm_state().items():
            require_finite(tensor, f"{part} of the batch normalization after {name.removesuffix('.') or self.layer}")

    def _batch_norm_state(self) -> dict[str, Tensor]:
        batch_norm: Any = self._batch_norm[0]
        if batch_norm is None:
            return {}
        state = {name: getattr(batch_norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def _weight_codes(self, weight: Tensor) -> tuple[Tensor, Tensor, QuantizationScheme]:
        node = self.weight_fake_quantize
        if node is None:
            raise RuntimeError("weight_fake_quantize is None: the weight has no grid")
        with range_of_weight(node, weight):
            return node.to_codes(weight).detach(), node.scale.detach(), node.scheme

    def _folded(self, weight: Tensor, bias: Tensor | None) -> IntegerWeights:
        source, layer_type = self.input_source, layer_type_of(self.layer)
        assert source is not None and layer_type is not None
        return fold(
            *self._weight_codes(weight),
            bias,
            source.scale.detach(),
            self._batch_norm[0],  # type: ignore[arg-type]
            layer_type.output_axis,
        )

    def _integer_layer(self) -> Int8Layer:
        weight, bias = self._parameters_now()
        node = self.weight_fake_quantize
        assert node is not None
        key = self._key(weight, bias)
        if self._cached is None or self._cached[0] != key or not is_up_to_date(node, key[0][0]):
            layer = self._integer_form(weight, bias)
            assert isinstance(layer, Int8Layer)
            self._cached = (self._key(weight, bias), layer)  # which may have changed the scale of the weight
        return self._cached[1]

    def _key(self, weight: Tensor, bias: Tensor | None) -> tuple[tuple[int, ...], float | None]:
        """What the integer layer is made from, the weight first."""
        tensors = [weight] if bias is None else [weight, bias]
        for node in (self.input_source, self.weight_fake_quantize, self.output_fake_quantize):
            if node is not None:  # in every call, where a module's own look-up is slow
                state: dict[str, Any] = node._parameters if node.learnable else node._buffers
                tensors += (state["scale"], state["zero_point"])
        batch_norm: Any = self._batch_norm[0]
        tensors += self._batch_norm_state().values()
        return kernels.fingerprints(tensors), None if batch_norm is None else batch_norm.eps

    def _evaluate(self, input: Tensor) -> Tensor:
        """The layer's output on integers, dequantized."""
        source, output = self.input_source, self.output_fake_quantize
        assert source is not None
        codes = source.to_codes(input)
        reads_nothing = kernels.is_traced() or torch._C._are_functorch_transforms_active()
        result: Tensor = self._in_graph(codes) if reads_nothing else self._integer_layer()(codes)
        if output is not None:
            result = output.to_values(result)
        if self.input_fake_quantize is not None:  # alone between floats, where code may rely on the memory format
            result = in_format_of(input, result)
        return in_dtype_of(input, result)

    def _in_graph(self, codes: Tensor) -> Tensor:
        """What the integer layer computes, of weights folded in the same graph: a compiler reads nothing back, nor does
        a transform of ``torch.func``."""
        source, output, application = self.input_source, self.output_fake_quantize, self._application()
        assert source is not None
        weights = application.oriented(self._folded(*self._parameters_now()))
        if application.padding:
            codes = padded(codes, source.code_of_zero, application.padding, application.padding_mode)
        scale, grid = source.scale * weights.scale, None
        if output is not None:
            scale, zero_point = scale / output.scale, output.code_of_zero
            ends = arithmetic.codes_of_clip(self._clip, output.scale, zero_point, output.scheme)
            grid = OutputGrid(zero_point, *ends, output.scheme.dtype)
        has_batch = application.geometry is None or codes.dim() == weights.codes.dim()
        result = integer_layer(
            codes if has_batch else codes[None],
            source.code_of_zero,
            weights.codes,
            weights.bias,
            scale,
            grid,
            self._clip,
            application.geometry,
            application.output_padding,
        )
        return result if has_batch else result[0]


def in_dtype_of(input: Tensor, result: Tensor) -> Tensor:
    """An evaluation's float32 result in its input's dtype; under autocast as it is, since half precision would lose the
    grid that the next layer reads."""
    return result if torch.is_autocast_enabled(input.device.type) else result.to(input.dtype)
