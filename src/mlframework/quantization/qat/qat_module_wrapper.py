"""A layer between fake-quantize nodes; in evaluation, the integer layer that it becomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..int8.folding import IntegerWeights, fold
from ..int8.layers import Int8Embedding, Int8Layer
from ..int8.operations import in_format_of
from ..scheme import QuantizationScheme
from .activation_observer import MovingAverageObserver
from .batch_norms import evaluation_form
from .config import QATConfig
from .fake_quantize_layer import FakeQuantizeLayer
from .hooks import has_user_hooks, is_watched
from .integer_product import IntegerProduct, integer_product
from .layer_types import LAYER_TYPES, Clip, clip_of, layer_type_of, obstacle_of, takes_batch_norm
from .quantized_output import any_dropout_is_active, clipped_and_quantized, normalized_and_quantized


class QATModuleWrapper(nn.Module):
    """Stands in a layer's place: the layer itself, with quantization noise on its input, its weight and its output.

    The wrapper holds the user's own module as ``layer`` and has its parameters and buffers for its own: the same
    Parameter objects under the same names (``conv1.weight`` stays ``conv1.weight`` in ``state_dict()``), and the
    layer's other attributes. The layer runs through its ``__call__``, so its hooks fire, with the fake-quantized
    weight in place of its own.

    In training, compiled kernels compute the layer on integer codes and return floats; what is kept for backward is the
    codes. Where they do not (an older processor or another kind, a layer or a padding they do not know, a hook that
    would not fire, under ``torch.compile``), the layer runs on the floats that the codes stand for: the same but for
    float32 rounding. A bias that no batch normalization follows is rounded to what evaluation adds.

    In evaluation mode without gradients the wrapper computes on integers, with the very layer that ``convert`` puts in
    its place (:meth:`to_integer`), and returns the result as floats on the grid. Hooks inside then see simulated
    values. The integer layer is kept until a tensor it was made from changes, the mode is set, or a forward with
    gradients runs; a change through ``.data`` between two evaluations goes unseen, so call ``eval()`` after one.

    Args:
        layer: Linear, Conv1d, Conv2d, Conv3d, ConvTranspose2d or Embedding.
        config: grids, observers, estimator.
        batch_norm: batch normalization of the layer's output, run here; folded in for integers. Any module counts that
            is one in evaluation, by its own statistics; a clipping activation may be part of it.
        activation: ReLU, ReLU6 or Hardtanh that follows, run here; a choice of saturation for integers.

    Attributes:
        input_fake_quantize, weight_fake_quantize, output_fake_quantize: the nodes; each may be set to None. With every
            node None or disabled, the output is the layer's own, bit for bit.
        integer_forward: train on integer codes where compiled kernels do (:class:`QATConfig`).
        recompute: compute what a batch normalization normalizes again in backward, rather than keep it.

    Raises:
        TypeError: the layer is of no supported type, or cannot be quantized as it is.

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
    ) -> None:
        super().__init__()
        config = QATConfig() if config is None else config
        layer_type = layer_type_of(layer) if isinstance(layer, nn.Module) else None
        if layer_type is None:
            supported = ", ".join(kind.__name__ for kind in LAYER_TYPES)
            raise TypeError(f"layer must be one of {supported}, got {type(layer).__name__}")
        obstacle = obstacle_of(layer)
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

        self.input_fake_quantize = None if layer_type.to_integer is None else activation_node(config)
        self.weight_fake_quantize = weight_node(layer, config, layer_type.output_axis)
        self.output_fake_quantize = activation_node(config, non_negative=clip[0] >= 0)
        for node in (self.input_fake_quantize, self.weight_fake_quantize):
            if node is not None:
                self._have_codes_kept(node)
        self.to(layer.weight.device)  # type: ignore[arg-type]
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
        return all(node is not None and node.fake_quantize_enabled and not node.calibrating for node in nodes)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, fake-quantized (or, on integers, dequantized): shape and dtype of the layer's own."""
        if isinstance(self.layer, nn.Embedding) or not self.computes_integers:
            return self._simulate(input)
        if torch.compiler.is_compiling():
            return self._trace_integers(input)
        if has_user_hooks(self.layer, *self.following):
            self._simulate(input)
        return self._run_integers(input)

    def _simulate(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self._cached is not None:
            self._cached = None  # fused optimizers change a weight without a trace in its version
        values = self.input_fake_quantize(input) if self.input_fake_quantize is not None else input
        product = self._product(values)
        output = self._run_layer(values) if product is None else product.output
        output = self._run_following(output, product)
        if product is not None and self.output_fake_quantize is None and torch.is_autocast_enabled("cpu"):
            return output.to(torch.get_autocast_dtype("cpu"))
        return output if product is None or self.input_fake_quantize is None else in_format_of(input, output)

    def _product(self, input: Tensor) -> IntegerProduct | None:
        """The layer on the codes of its fake-quantized input and weight, where compiled kernels do that."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if not self.integer_forward or source is None or weight_node is None or not weight_node.quantizes:
            return None
        if not self._input_is_on_grid() or not kernels.use_native(input):
            return None
        if is_watched(self.layer, source, weight_node):  # a hook on a node may take values off its grid
            return None
        bias: Tensor | None = self.layer._parameters["bias"]
        batch_norm = self._batch_norm[0]
        product = integer_product(self.layer, input, source, weight_node, bias if batch_norm is None else None)
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

    def _run_layer(self, input: Tensor) -> Tensor:
        """Calls the user's module with the fake-quantized weight, and the bias it has on integers, in its registry."""
        parameters = self.layer._parameters
        weight = parameters["weight"]
        assert weight is not None
        if self.weight_fake_quantize is not None:
            weight = self.weight_fake_quantize(weight)
        exchanged: dict[str, Any] = {"weight": weight}
        if parameters.get("bias") is not None and self._batch_norm[0] is None:
            exchanged["bias"] = self._simulated_bias(parameters["bias"])  # type: ignore[arg-type]
        exchanged = {name: tensor for name, tensor in exchanged.items() if tensor is not parameters[name]}
        own = {name: parameters[name] for name in exchanged}
        parameters.update(exchanged)
        try:
            return self.layer(input)  # type: ignore[no-any-return]
        finally:
            parameters.update(own)

    def _simulated_bias(self, bias: Tensor) -> Tensor:
        """The bias rounded to units of the accumulator, straight through, once input and weight have grids."""
        source, weight_node = self.input_source, self.weight_fake_quantize
        if source is None or weight_node is None or not weight_node.quantizes or not self._input_is_on_grid():
            return bias
        rounded = arithmetic.bias_on_grid(bias.detach().float(), (source.scale * weight_node.scale).detach())
        return rounded.to(bias.dtype) + (bias - bias.detach())

    # --- integers -------------------------------------------------------------------------------------------------

    def to_integer(self) -> Int8Layer | Int8Embedding:
        """The integer layer of the present weights, statistics and scales, batch normalization folded in.

        Raises:
            RuntimeError: a node has seen no data.
        """
        if isinstance(self.layer, nn.Embedding):
            codes, scale, _ = self._weight_codes()
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
            self._folded(),
            source.parameters_on_grid,
            None if output is None else output.parameters_on_grid,
            self._clip,
        )

    def _weight_codes(self) -> tuple[Tensor, Tensor, QuantizationScheme]:
        node = self.weight_fake_quantize
        if node is None:
            raise RuntimeError("weight_fake_quantize is None: the weight has no grid")
        return node.to_codes(self.layer.weight).detach(), node.scale.detach(), node.scheme  # type: ignore[arg-type]

    def _folded(self) -> IntegerWeights:
        source, layer_type = self.input_source, layer_type_of(self.layer)
        assert source is not None and layer_type is not None
        return fold(
            *self._weight_codes(),
            self.layer.bias,  # type: ignore[arg-type]
            source.scale.detach(),
            self._batch_norm[0],  # type: ignore[arg-type]
            layer_type.output_axis,
        )

    def _integer_layer(self) -> Int8Layer:
        nodes = (self.input_source, self.weight_fake_quantize, self.output_fake_quantize)
        tensors = [tensor for node in nodes if node is not None for tensor in (node.scale, node.zero_point)]
        tensors += [tensor for tensor in (self.layer.weight, self.layer.bias) if isinstance(tensor, Tensor)]
        batch_norm: Any = self._batch_norm[0]
        if batch_norm is not None:
            state = (batch_norm.weight, batch_norm.bias, batch_norm.running_mean, batch_norm.running_var)
            tensors += [tensor for tensor in state if tensor is not None]
        versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        key = (versions, None if batch_norm is None else batch_norm.eps)
        if self._cached is None or self._cached[0] != key:
            layer = self.to_integer()
            assert isinstance(layer, Int8Layer)
            self._cached = (key, layer)
        return self._cached[1]

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
        """The same integers in operations that ``torch.compile`` can trace: sums in float64, which is exact."""
        source, output, layer_type = self.input_source, self.output_fake_quantize, layer_type_of(self.layer)
        assert source is not None and layer_type is not None and layer_type.product is not None
        codes = source.to_codes(input)
        weights = self._folded()
        with torch.autocast(input.device.type, enabled=False):
            sums = layer_type.product(self.layer, codes.double() - source.code_of_zero, weights.codes.double())
        axis = sums.dim() - 1 - len(getattr(self.layer, "stride", ()))
        accumulator = sums.round().to(torch.int32) + arithmetic.along_axis(weights.bias, sums.dim(), axis)
        scale = source.scale * weights.scale
        if output is None:
            result = arithmetic.rescale_accumulator(accumulator, arithmetic.along_axis(scale, sums.dim(), axis))
            return in_dtype_of(input, result.clamp(*self._clip))
        zero_point = output.code_of_zero
        codes = arithmetic.requantize_accumulator(
            accumulator,
            arithmetic.along_axis(scale / output.scale, sums.dim(), axis),
            zero_point,
            *arithmetic.codes_of_clip(self._clip, output.scale, zero_point, output.scheme),
            output.scheme.dtype,
        )
        return in_dtype_of(input, output.to_values(codes))

    # --- standing in the layer's place ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> QATModuleWrapper:
        self._cached = None
        self.layer.train(mode)
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        node = self.weight_fake_quantize
        comes_alone = f"{prefix}weight" in state_dict and f"{prefix}weight_fake_quantize.scale" not in state_dict
        if node is not None and comes_alone:  # a float checkpoint: the range is that of the new weight
            node.commit(node.observer.measure(self.layer.weight))  # type: ignore[arg-type]

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
        following = [type(module).__name__ for module in self.following]
        return " -> ".join([f"layer={self.layer}", *following])


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


def weight_node(layer: nn.Module, config: QATConfig, output_axis: int) -> FakeQuantizeLayer:
    """The fake-quantize node of a layer's weight, on the range that the weight has now.

    Its statistics follow the newest weight alone, and are the same on every rank.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    axis = output_axis if config.per_channel_weights else None
    grid = config.weight_scheme
    scheme = QuantizationScheme(grid.bits, grid.signed, grid.symmetric, grid.narrow_range, axis)
    channels = 1 if axis is None else weight.shape[axis]
    node = FakeQuantizeLayer(
        scheme,
        MovingAverageObserver(momentum=1.0, channel_axis=axis, num_channels=channels),
        learnable=config.learnable,
        num_channels=channels,
        estimator=config.estimator,
    ).to(weight.device)
    node.reduces_over_ranks = False
    node.commit(node.observer.measure(weight))
    return node
