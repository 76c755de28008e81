"""The integer side of a wrapped layer: the integer layer that it becomes, kept for as long as what it is made from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..int8.folding import IntegerWeights, fold
from ..int8.layers import Int8Embedding, Int8Layer
from ..scheme import QuantizationScheme
from .fake_quantize_layer import FakeQuantizeLayer
from .layer_types import Clip, layer_type_of
from .weight_range import is_up_to_date, require_finite, update_range


class IntegerSide(nn.Module):
    """What a :class:`.QATModuleWrapper` computes with in evaluation, and what ``convert`` puts in its place."""

    layer: nn.Module
    weight_fake_quantize: FakeQuantizeLayer | None
    output_fake_quantize: FakeQuantizeLayer | None
    _batch_norm: tuple[nn.Module | None]
    _clip: Clip
    _cached: tuple[Any, Int8Layer] | None

    @property
    def input_source(self) -> FakeQuantizeLayer | None:
        """The node that puts the layer's input on its grid."""
        raise NotImplementedError

    def evaluated_weight(self) -> Tensor:
        """The weight as evaluation has it, apart from the graph."""
        raise NotImplementedError

    def _evaluated_bias(self) -> Tensor | None:
        raise NotImplementedError

    def _parameters_now(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are at this call."""
        raise NotImplementedError

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
            codes, scale, _ = self._weight_codes(weight)
            return Int8Embedding(codes, scale.clone())
        layer_type = layer_type_of(self.layer)
        assert layer_type is not None and layer_type.to_integer is not None
        source = self.input_source
        if source is None:
            raise RuntimeError(
                "input_fake_quantize is None and take_input_from() named no node: the input's grid is unknown"
            )
        output = self.output_fake_quantize
        return layer_type.to_integer(
            self.layer,
            self._folded(weight, bias),
            source.parameters_on_grid,
            None if output is None else output.parameters_on_grid,
            self._clip,
        )

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
        update_range(node, weight)
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
