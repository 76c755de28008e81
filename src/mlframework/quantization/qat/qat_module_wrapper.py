"""A layer between fake-quantize nodes; in evaluation, the integer layer that it becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..graph.hooks import has_user_hooks
from ..state_check import check_state
from .batch_norms import evaluation_form
from .computed_parameters import move_computation
from .config import QATConfig
from .fake_quantize_layer import FakeQuantizeLayer
from .histogram_observer import HistogramObserver
from .integer_evaluation import IntegerEvaluation
from .layer_types import LAYER_TYPES, clip_of, layer_type_of, obstacle_of, takes_batch_norm
from .recomputation import as_in_forward, is_recomputing
from .training_forward import TrainingForward
from .weight_range import keep_loaded_scale, require_finite, set_range, weight_node


class QATModuleWrapper(TrainingForward, IntegerEvaluation):
    """Stands in a layer's place: the layer itself, with quantization noise on its input, its weight and its output.

    The wrapper holds the user's own module as ``layer`` and has its parameters and buffers for its own: the same
    Parameter objects under the same names (``conv1.weight`` stays ``conv1.weight`` in ``state_dict()``), and the
    layer's other attributes. The layer runs through its ``__call__``, so its hooks fire, with the fake-quantized
    weight in place of its own.

    A parameter may also be computed: by a parametrization, or by the hooks of pruning and of weight or spectral
    normalization, whether they were put on the layer before (they move to the wrapper) or on the wrapper. It is then
    the computed tensor that is quantized.

    In training, compiled kernels compute the layer on integer codes and return floats; what is kept for backward is the
    codes. Where they do not (another device, a layer or a padding they do not know, a hook that would not fire), the
    layer runs on the floats that the codes stand for: the same but for float32 rounding. A bias that no batch
    normalization follows is rounded to what evaluation adds.

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
        self.quantization_config = config  # for analyses, which try other widths
        self.__dict__["_parameters"] = layer._parameters
        self.__dict__["_buffers"] = layer._buffers
        self.__dict__["_non_persistent_buffers_set"] = layer._non_persistent_buffers_set
        self.following = tuple(module for module in (batch_norm, activation) if module is not None)
        self._batch_norm = (batch_norm,)
        self._input_source = (None,)
        self.input_passes = ()
        self._dropouts = ()
        self.integer_forward = config.integer_forward
        self.recompute = False
        self._clip = clip
        self._cached = None
        self._loads_float = False  # whether the state that is being loaded has the weight and not its scale
        self._other = () if shares_weight_of is None else (shares_weight_of._owner,)
        move_computation(layer, self._owner)
        weight = self.evaluated_weight()

        self.input_fake_quantize = None if layer_type.application is None else activation_node(config)
        if shares_weight_of is None:
            require_finite(weight, "weight")
            self.weight_fake_quantize = weight_node(weight, config, layer_type.output_axis)
        else:
            self.weight_fake_quantize = shares_weight_of.weight_fake_quantize
        self.output_fake_quantize = activation_node(config, non_negative=clip[0] >= 0)
        if self.input_fake_quantize is not None:
            self._have_codes_kept(self.input_fake_quantize)
        self.register_load_state_dict_post_hook(_settle_loaded_scale)  # type: ignore[no-untyped-call]
        self.to(weight.device)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, fake-quantized (or, on integers, dequantized): shape and dtype of the layer's own."""
        if is_recomputing():
            with as_in_forward([self.input_source, self.output_fake_quantize], input):
                return self._train_forward(input)
        if isinstance(self.layer, nn.Embedding) or not self.computes_integers:
            return self._train_forward(input)
        if has_user_hooks(self.layer, *self.following):
            self._train_forward(input)
        return self._evaluate(input)

    # --- standing in the layer's place ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> QATModuleWrapper:
        self._cached = None
        if mode and self.weight_fake_quantize is not None:
            self.weight_fake_quantize.range_of = None
        self.layer.train(mode)
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix, *args)
        self._cached = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        # PyTorch expects anything of a submodule that is None.
        absent = tuple(f"{prefix}{name}." for name, module in self._modules.items() if module is None)
        unexpected: list[str] = args[3]
        unexpected += [key for key in state_dict if absent and key.startswith(absent)]
        weights = (f"{prefix}weight", f"{prefix}parametrizations.weight")
        own = f"{prefix}weight_fake_quantize."
        comes = any(key.startswith(weights) and not key.startswith(own) for key in state_dict)
        self._loads_float = comes and f"{own}scale" not in state_dict

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["layer"], name)

    def __getstate__(self) -> dict[str, Any]:
        # What makes observers may be a lambda, which does not pickle, and has made them.
        config = replace(self.quantization_config, activation_observer=None, overrides={}, skip=())
        return {**self.__dict__, "_cached": None, "quantization_config": config}

    def extra_repr(self) -> str:
        bias = None if isinstance(self.layer, nn.Embedding) else self._evaluated_bias()
        with self._in_registry(self.evaluated_weight(), bias):
            following = [type(module).__name__ for module in self.following]
            return " -> ".join([f"layer={self.layer}", *following])


def _settle_loaded_scale(wrapper: QATModuleWrapper, incompatible_keys: object) -> None:
    """When all of the wrapper is loaded, what computes its weight too."""
    node = wrapper.weight_fake_quantize
    if node is None:
        return
    if wrapper._loads_float:  # a learned or frozen scale does not follow by itself
        set_range(node, wrapper.evaluated_weight())
    else:
        keep_loaded_scale(node, wrapper.evaluated_weight())


def activation_node(config: QATConfig, non_negative: bool = False) -> FakeQuantizeLayer:
    """The fake-quantize node of an activation, per tensor."""
    scheme = config.non_negative_activation_scheme if non_negative else config.activation_scheme
    observer = None if config.activation_observer is None else config.activation_observer()
    node = FakeQuantizeLayer(scheme, observer, learnable=config.learnable, estimator=config.estimator)
    node.calibration_observer = HistogramObserver if observer is None else None
    return node
