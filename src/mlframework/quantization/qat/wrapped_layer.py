"""A layer with its fake-quantize nodes: what the training forward and the integer evaluation of a wrapper both read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..int8.layers import Int8Layer
from .computed_parameters import computed, evaluated, move_computation
from .config import QATConfig
from .fake_quantize_layer import FakeQuantizeLayer
from .layer_types import Clip


class WrappedLayer(nn.Module):
    """The layer, its parameters as they are at a call, and where its input gets its grid.

    Attributes:
        layer: the user's own module. It is no submodule, which would rename its parameters.
        config: what the layer was prepared with.
        input_fake_quantize, weight_fake_quantize, output_fake_quantize: the nodes; None for none.
        following: the modules that run after the layer, batch normalization first.
        integer_forward: train on integer codes where that can be.
        recompute: compute what a batch normalization normalizes again in backward, rather than keep it.
        input_passes: the modules that the input comes from and by, where it is what the node that gives it its grid
            returned, by the model's graph; None where it is not.
    """

    input_fake_quantize: FakeQuantizeLayer | None
    weight_fake_quantize: FakeQuantizeLayer | None
    output_fake_quantize: FakeQuantizeLayer | None
    layer: nn.Module
    config: QATConfig
    following: tuple[nn.Module, ...]
    integer_forward: bool
    recompute: bool
    # In tuples so that nn.Module does not register them; they are registered elsewhere.
    _batch_norm: tuple[nn.Module | None]
    _input_source: tuple[FakeQuantizeLayer | None]
    _input_passes: tuple[tuple[nn.Module, ...] | None]
    _dropouts: tuple[nn.Module, ...]
    _other: tuple[WrappedLayer, ...]
    _clip: Clip
    _cached: tuple[Any, Int8Layer] | None

    @property
    def input_source(self) -> FakeQuantizeLayer | None:
        """The node that puts the layer's input on its grid: its own, or one before it in the model."""
        return self.input_fake_quantize if self.input_fake_quantize is not None else self._input_source[0]

    def take_input_from(self, source: FakeQuantizeLayer, dropouts: tuple[nn.Module, ...] = ()) -> None:
        """Names the node before this one that puts the input on its grid, for when there is no node of its own.

        Args:
            source: the node.
            dropouts: those between them, which take values off the grid in training.
        """
        self._input_source = (source,)
        self.input_passes = None  # as far as is known
        self._dropouts = dropouts
        self._have_codes_kept(source)

    def _have_codes_kept(self, node: FakeQuantizeLayer) -> None:
        if self.integer_forward:
            node.serves_integers = True

    @property
    def input_passes(self) -> tuple[nn.Module, ...] | None:
        return self._input_passes[0]

    @input_passes.setter
    def input_passes(self, modules: tuple[nn.Module, ...] | None) -> None:
        self._input_passes = (modules,)

    @contextmanager
    def stands_alone(self) -> Iterator[None]:
        """The wrapper as its layer alone, with a quantized weight, for code that calls by itself what follows."""
        node = self._modules["output_fake_quantize"]
        alone: dict[str, Any] = {
            "following": (),
            "_batch_norm": (None,),
            "_clip": (-math.inf, math.inf),
            "_input_source": (self.input_fake_quantize,),
            "_input_passes": ((),),
            "_dropouts": (),
            "_cached": None,
        }
        own = {name: vars(self)[name] for name in alone}
        vars(self).update(alone)
        self._modules["output_fake_quantize"] = None
        try:
            yield
        finally:
            vars(self).update({**own, "_cached": None})
            self._modules["output_fake_quantize"] = node

    @property
    def _owner(self) -> WrappedLayer:
        """The wrapper that has what computes the parameters: this one, or that of another call of the layer."""
        return self._other[0] if self._other else self

    def evaluated_weight(self) -> Tensor:
        """The weight as evaluation has it: the Parameter, or what is computed from some, apart from the graph."""
        weight: Tensor = evaluated(self._owner, "weight")
        return weight

    def float_layer(self) -> nn.Module:
        """The layer, to go on without the wrapper: what is computed becomes Parameters of it."""
        for name, tensor in (("weight", self.evaluated_weight()), ("bias", self._evaluated_bias())):
            if tensor is not None and name not in self.layer._parameters:
                self.layer._parameters[name] = nn.Parameter(tensor.detach().clone())
        return self.layer

    def _evaluated_bias(self) -> Tensor | None:
        return None if isinstance(self.layer, nn.Embedding) else evaluated(self._owner, "bias")

    def _parameters_now(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are at this call."""
        bias = None if isinstance(self.layer, nn.Embedding) else self._parameter("bias")
        return self._parameter("weight"), bias

    def _parameter(self, name: str) -> Any:
        parameters = self.layer._parameters
        if name in parameters:
            return parameters[name]
        owner = self._owner
        if self.layer._modules or name in vars(self.layer):
            move_computation(self.layer, owner)  # what was put on the layer, rather than on the wrapper
        return getattr(owner, name) if owner is self else computed(owner, name)

    def float_output(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer and what follows it compute on floats with these parameters: no node and no hook runs."""
        with self._in_registry(weight, bias):
            output: Tensor = self.layer.forward(input)
        for module in self.following:
            output = module.forward(output)
        return output

    def parameters_of_call(self, *given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a call of the wrapper. ``given`` is what comes after the input, where the model's code
        hands its own parameters over."""
        if given:
            weight, bias = (*given, None)[:2]
            assert weight is not None
            return weight, bias
        return self._parameters_now()

    @contextmanager
    def _in_registry(self, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        """The layer with these tensors for its parameters."""
        registry: dict[str, Any] = self.layer._parameters
        exchanged: dict[str, Any] = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        own = {name: registry[name] for name in exchanged if name in registry}
        registry.update(exchanged)
        try:
            yield
        finally:
            for name in exchanged:
                del registry[name]
            registry.update(own)
