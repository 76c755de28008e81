"""A layer between fake-quantize nodes; in evaluation, the integer layer that it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..graph.hooks import has_user_hooks, is_watched
from ..int8.layers import Int8Layer
from ..int8.operations import in_format_of
from ..scheme_state import hint_at_reason
from .batch_norms import evaluation_form
from .computed_parameters import computed, evaluated, move_computation
from .config import QATConfig
from .fake_quantize_layer import FakeQuantizeLayer
from .integer_product import IntegerProduct, integer_product
from .integer_side import IntegerSide
from .layer_types import LAYER_TYPES, Clip, clip_of, layer_type_of, obstacle_of, takes_batch_norm
from .quantized_output import any_dropout_is_active, clipped_and_quantized, normalized_and_quantized
from .recomputation import as_in_forward, is_recomputing
from .traced_evaluation import traced_evaluation
from .weight_range import keep_loaded_scale, require_finite, update_range, weight_node


class QATModuleWrapper(IntegerSide):
    """Stands in a layer's place: the layer itself, with quantization noise on its input, its weight and its output.

    The wrapper holds the user's own module as ``layer`` and has its parameters and buffers for its own: the same
    Parameter objects under the same names (``conv1.weight`` stays ``conv1.weight`` in ``state_dict()``), and the
    layer's other attributes. The layer runs through its ``__call__``, so its hooks fire, with the fake-quantized
    weight in place of its own.

    A parameter may also be computed: by a parametrization, or by the hooks of pruning and of weight or spectral
    normalization, whether they were put on the layer before (they move to the wrapper) or on the wrapper. It is then
    the computed tensor that is quantized.

    In training, compiled kernels compute the layer on integer codes and return floats; what is kept for backward is the
    codes. Where they do not (an older processor or another kind, a layer or a padding they do not know, a hook that
    would not fire, under ``torch.compile``), the layer runs on the floats that the codes stand for: the same but for
    float32 rounding. A bias that no batch normalization follows is rounded to what evaluation adds.

    In evaluation mode without gradients the wrapper computes on integers, with the very layer that ``convert`` puts in
    its place (:meth:`to_integer`), and returns the result as floats on the grid. Hooks inside then see simulated
    values. The integer layer is kept until the mode is set or a tensor that it was made from holds other values,
    however they came there: every evaluation compares hashes.

    An observed scale of a weight is that of the weight at hand, in evaluation too, which updates the node's buffers in
    place. Switch the node's observer off to keep a scale.

    Args:
        layer: Linear, Conv1d, Conv2d, Conv3d, ConvTranspose2d or Embedding.
        config: grids, observers, estimator.
        batch_norm: batch normalization of the layer's output, run here; folded in for integers. Any module counts that
            is one in evaluation, by its own statistics; a clipping activation may be part of it.
        activation: ReLU, ReLU6 or Hardtanh that follows, run here; a choice of saturation for integers.
        shares_weight_of: the wrapper of another call of the same layer, which has the node of the weight and whatever
            computes it.

    Attributes:
        input_fake_quantize, weight_fake_quantize, output_fake_quantize: the nodes; each may be set to None. With every
            node None or disabled, the output is the layer's own, bit for bit.
        integer_forward: train on integer codes where compiled kernels do (:class:`QATConfig`).
        recompute: compute what a batch normalization normalizes again in backward, rather than keep it.

    Raises:
        TypeError: the layer is of no supported type, or cannot be quantized as it is.
        ValueError: the weight holds NaN or infinite values.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> wrapper = QATModuleWrapper(layer, QATConfig())
        >>> wrapper.weight is layer.weight
        True
        >>> wrapper(torch.randn(4, 3)).shape
        torch.Size([4, 2])
    """

    input_fake_quantize: FakeQuantizeLayer | None
    weight_fake_quantize: FakeQuantizeLayer | None
    output_fake_quantize: FakeQuantizeLayer | None
    layer: nn.Module

    def __init__(
        self,
        layer: nn.Module,
        config: QATConfig | None = None,
        *,
        batch_norm: nn.Module | None = None,
        activation: nn.Module | None = None,
        shares_weight_of: QATModuleWrapper | None = None,
    ) -> None:
        super().__init__()
        config = QATConfig() if config is None else config
        layer_type = layer_type_of(layer) if isinstance(layer, nn.Module) else None
        if layer_type is None:
            supported = ", ".join(kind.__name__ for kind in LAYER_TYPES)
            raise TypeError(f"layer must be one of {supported}, got {type(layer).__name__}")
        obstacle = obstacle_of(layer) if shares_weight_of is None else None
        if obstacle is not None:
            raise TypeError(f"layer {layer} cannot be quantized: {obstacle}")
        if batch_norm is not None and not takes_batch_norm(layer, batch_norm):
            raise TypeError(f"batch_norm {batch_norm} does not fold into {layer}")
        form = None if batch_norm is None else evaluation_form(batch_norm)
        clip = clip_of(activation if form is None or form.activation is None else form.activation)
        if clip is None:
            raise TypeError(f"activation must only clip (ReLU, ReLU6, Hardtanh), got {type(activation).__name__}")
        # The layer is no submodule, which would rename its parameters: the wrapper shares its registries instead.
        self.__dict__["layer"] = layer
        self.__dict__["_parameters"] = layer._parameters
        self.__dict__["_buffers"] = layer._buffers
        self.__dict__["_non_persistent_buffers_set"] = layer._non_persistent_buffers_set
        # In tuples, because other rooms of the model own (and name) these modules.
        self.following: tuple[nn.Module, ...] = tuple(m for m in (batch_norm, activation) if m is not None)
        self._batch_norm = (batch_norm,)
        self._input_source: tuple[FakeQuantizeLayer | None] = (None,)
        self._dropouts: tuple[nn.Module, ...] = ()
        self.integer_forward = config.integer_forward
        self.recompute = False
        self._clip: Clip = clip
        self._cached: tuple[Any, Int8Layer] | None = None
        self._other = () if shares_weight_of is None else (shares_weight_of._owner,)
        move_computation(layer, self._owner)
        weight = self.evaluated_weight()

        self.input_fake_quantize = None if layer_type.to_integer is None else activation_node(config)
        if shares_weight_of is None:
            require_finite(weight, "weight")
            self.weight_fake_quantize = weight_node(weight, config, layer_type.output_axis)
        else:
            self.weight_fake_quantize = shares_weight_of.weight_fake_quantize
        self.output_fake_quantize = activation_node(config, non_negative=clip[0] >= 0)
        for node in (self.input_fake_quantize, self.weight_fake_quantize):
            if node is not None:
                self._have_codes_kept(node)
        self.register_load_state_dict_post_hook(_keep_loaded_scale)  # type: ignore[no-untyped-call]
        self.to(weight.device)
        self.train(layer.training)

    @property
    def input_source(self) -> FakeQuantizeLayer | None:
        """The node that puts the layer's input on its grid: its own, or one before it in the model."""
        return self.input_fake_quantize if self.input_fake_quantize is not None else self._input_source[0]

    def take_input_from(self, source: FakeQuantizeLayer, dropouts: tuple[nn.Module, ...] = ()) -> None:
        """Names the node before this one that puts the input on its grid, for when there is no node of its own, and
        the dropouts between them, which take values off the grid in training."""
        self._input_source = (source,)
        self._dropouts = dropouts
        self._have_codes_kept(source)

    @contextmanager
    def stands_alone(self) -> Iterator[None]:
        """The wrapper as its layer alone, with a quantized weight, for code that calls by itself what follows."""
        node = self._modules["output_fake_quantize"]
        alone: dict[str, Any] = {
            "following": (),
            "_batch_norm": (None,),
            "_clip": (-math.inf, math.inf),
            "_input_source": (self.input_fake_quantize,),
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
    def _owner(self) -> QATModuleWrapper:
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

    def _have_codes_kept(self, node: FakeQuantizeLayer) -> None:
        if self.integer_forward and kernels.has_integer_layers():
            node.serves_integers = True

    @property
    def computes_integers(self) -> bool:
        """Whether a call now computes on integers: evaluation mode, no gradients, and every node switched on."""
        batch_norm = self._batch_norm[0]
        if self.training or torch.is_grad_enabled() or (batch_norm is not None and batch_norm.training):
            return False
        nodes = [self.input_source, self.weight_fake_quantize]
        if self.output_fake_quantize is not None:
            nodes.append(self.output_fake_quantize)
        return all(node is not None and node.quantizes for node in nodes)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, fake-quantized (or, on integers, dequantized): shape and dtype of the layer's own."""
        if is_recomputing():
            with as_in_forward([self.input_source, self.output_fake_quantize]):
                return self._simulate(input)
        if isinstance(self.layer, nn.Embedding) or not self.computes_integers:
            return self._simulate(input)
        if torch.compiler.is_compiling():
            return self._trace_integers(input)
        if has_user_hooks(self.layer, *self.following):
            self._simulate(input)
        return self._run_integers(input)

    def _simulate(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters_now()
        node = self.weight_fake_quantize
        if node is not None and self.training:
            if node.range_of is not None:
                node.range_of = None  # training sets the scale without comparing weights
        elif node is not None and node.quantizes and not node.observes:
            update_range(node, weight)
        values = self.input_fake_quantize(input) if self.input_fake_quantize is not None else input
        product = self._product(values, weight, bias)
        output = self._run_layer(values, weight, bias) if product is None else product.output
        output = self._run_following(output, product)
        if product is not None and self.output_fake_quantize is None and torch.is_autocast_enabled("cpu"):
            return output.to(torch.get_autocast_dtype("cpu"))
        return output if product is None or self.input_fake_quantize is None else in_format_of(input, output)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> IntegerProduct | None:
        """The layer on the codes of its fake-quantized input and weight, where compiled kernels do that."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if not self.integer_forward or source is None or weight_node is None or not weight_node.quantizes:
            return None
        if not self._input_is_on_grid() or not kernels.use_native(input):
            return None
        if is_watched(self.layer, source, weight_node):  # a hook on a node may take values off its grid
            return None
        batch_norm = self._batch_norm[0]
        own_bias = bias if batch_norm is None else None
        product = integer_product(self.layer, input, source, weight, weight_node, own_bias)
        if product is None or bias is None or batch_norm is None:
            return product
        return product.plus(arithmetic.along_axis(bias, product.output.dim(), 1))

    def _input_is_on_grid(self) -> bool:
        """Whether what reaches the layer now is what a node quantized, moved about at the most."""
        source = self.input_source
        return source is not None and source.quantizes and not any_dropout_is_active(self._dropouts)

    def _run_following(self, output: Tensor, product: IntegerProduct | None) -> Tensor:
        """Batch normalization, activation and output node: in one step where that can be."""
        batch_norm, node = self._batch_norm[0], self.output_fake_quantize
        activation = self.following[-1] if self.following and self.following[-1] is not batch_norm else None
        if node is not None:
            recomputed = product if self.recompute and product is not None and product.takes_less_again else None
            fused = (
                clipped_and_quantized(output, None, activation, self._clip, node)
                if batch_norm is None
                else normalized_and_quantized(recomputed, output, batch_norm, activation, self._clip, node)
            )
            if fused is not None:
                return fused
        for module in self.following:
            output = module(output)
        return output if node is None else node(output)

    def _run_layer(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Calls the user's module with the fake-quantized weight, and the bias it has on integers, in its registry."""
        source = self.input_source
        if self.weight_fake_quantize is not None and (source is None or not source.lets_pass):
            weight = self.weight_fake_quantize(weight)
        if bias is not None and self._batch_norm[0] is None:
            bias = self._simulated_bias(bias)
        with self._in_registry(weight, bias):
            return self.layer(input)  # type: ignore[no-any-return]

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

    def _simulated_bias(self, bias: Tensor) -> Tensor:
        """The bias rounded to units of the accumulator, straight through, once input and weight have grids."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if source is None or weight_node is None or not weight_node.quantizes or not self._input_is_on_grid():
            return bias
        rounded = arithmetic.bias_on_grid(bias.detach().float(), (source.scale * weight_node.scale).detach())
        return rounded.to(bias.dtype) + (bias - bias.detach())

    def _run_integers(self, input: Tensor) -> Tensor:
        source, output = self.input_source, self.output_fake_quantize
        assert source is not None
        codes = source.to_codes(input)
        result: Tensor = self._integer_layer()(codes)
        if output is not None:
            result = output.to_values(result)
        if self.input_fake_quantize is not None:  # alone between floats, where code may rely on the memory format
            result = in_format_of(input, result)
        return in_dtype_of(input, result)

    def _trace_integers(self, input: Tensor) -> Tensor:
        """The same integers in operations that ``torch.compile`` can trace."""
        source = self.input_source
        assert source is not None
        weights = self._folded(*self._parameters_now())
        result = traced_evaluation(self.layer, input, weights, source, self.output_fake_quantize, self._clip)
        return in_dtype_of(input, result)

    # --- standing in the layer's place ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> QATModuleWrapper:
        self._cached = None
        if mode and self.weight_fake_quantize is not None:
            self.weight_fake_quantize.range_of = None
        self.layer.train(mode)
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        # PyTorch expects anything of a submodule that is None.
        absent = tuple(f"{prefix}{name}." for name, module in self._modules.items() if module is None)
        unexpected: list[str] = args[3]
        unexpected += [key for key in state_dict if absent and key.startswith(absent)]
        hint_at_reason(unexpected, prefix)
        node = self.weight_fake_quantize
        comes = any(f"{prefix}{name}" in state_dict for name in self._parameters if name.startswith("weight"))
        if node is not None and comes and f"{prefix}weight_fake_quantize.scale" not in state_dict:
            # A float checkpoint: a learned or frozen scale does not follow by itself.
            node.commit(node.observer.measure(self.evaluated_weight()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["layer"], name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        bias = None if isinstance(self.layer, nn.Embedding) else self._evaluated_bias()
        with self._in_registry(self.evaluated_weight(), bias):
            following = [type(module).__name__ for module in self.following]
            return " -> ".join([f"layer={self.layer}", *following])


def _keep_loaded_scale(wrapper: QATModuleWrapper, incompatible_keys: object) -> None:
    if wrapper.weight_fake_quantize is not None:
        keep_loaded_scale(wrapper.weight_fake_quantize, wrapper.evaluated_weight())


def in_dtype_of(input: Tensor, result: Tensor) -> Tensor:
    """An evaluation's float32 result in its input's dtype; under autocast as it is, since half precision would lose the
    grid that the next layer reads."""
    return result if torch.is_autocast_enabled(input.device.type) else result.to(input.dtype)


def activation_node(config: QATConfig, non_negative: bool = False) -> FakeQuantizeLayer:
    """The fake-quantize node of an activation, per tensor."""
    scheme = config.non_negative_activation_scheme if non_negative else config.activation_scheme
    return FakeQuantizeLayer(
        scheme, config.activation_observer(), learnable=config.learnable, estimator=config.estimator
    )
