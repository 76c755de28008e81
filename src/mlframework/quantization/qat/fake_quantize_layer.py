"""A point of the model that is quantized: observer, scale, zero point and fake quantization."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import arithmetic, kernels
from ..kernels.differentiable.function import refuse_export_with_gradients
from ..kernels.differentiable.layer import Codes
from ..parameters import QuantizationParameters
from ..precision import keep_float32
from ..scheme import QuantizationScheme
from ..scheme_state import grid_faults, register_scheme, save_schemes, without_schemes
from ..state_check import check_state, faults_where
from .activation_observer import ActivationObserver, BatchStatistics, MovingAverageObserver
from .attached_codes import Way, attach_codes, attached_codes, codes_anew
from .averaged_parameters import INITIAL_SCALE, some_had_none, take_initial_values_out
from .fake_quantize_operation import fake_quantize_tensor
from .functional_transforms import require_own_level
from .host_value import HostValue
from .observer_synchronizer import ObserverSynchronizer, is_distributed, reduce_over_ranks
from .recomputation import State, as_in_forward, is_recomputing
from .scale_projection import project_optimizer_steps
from .sharding import copy_replicated, require_float32, require_writable
from .straight_through_estimator import StraightThroughEstimator


class FakeQuantizeLayer(nn.Module):
    """Observes what passes, keeps ``scale`` and ``zero_point`` for it, and fake-quantizes it.

    In training mode every batch is observed first and then quantized with the parameters that follow from it. (Inside
    a model made by :func:`prepare`, updates land together when the model's forward ends: a batch is quantized with what
    earlier ones have shown, and the first is only observed.) In evaluation mode nothing is observed, and before any
    data values pass as they are, with one warning to a model. A recomputation (activation checkpointing) observes
    nothing and computes as the forward did that it repeats; of a layer outside of a prepared model, with the present
    parameters, which are the same if backward follows its forward.

    With ``learnable=True`` the first batch sets the parameters and from then on the optimizer does (LSQ, LSQ+);
    attribute names, state-dict keys and shapes are the same both ways, from construction on. An optimizer step changes
    a learned scale by a factor of two at the most, so that no learning rate can carry it to zero.

    Args:
        scheme: the grid; signed 8-bit symmetric per tensor by default.
        observer: what sets the range; a :class:`MovingAverageObserver` by default.
        learnable: ``scale`` and, on affine grids, ``zero_point`` are trained by the optimizer.
        layer: a module to wrap: its output is what is observed and quantized.
        num_channels: channels along ``scheme.channel_axis``.
        estimator: what passes backward.

    Attributes:
        scale, zero_point: float32, shape (1,) or (num_channels,); ``nn.Parameter`` if learnable, otherwise buffers.
        initialized: float32 buffer of shape (1,): 1 if they come from data, else 0. In an average of models it is the
            share of those that had data: from one half on, the values from before any data are taken out of the
            average of scales and zero points at its first use.
        observer: the observer; ``observer.enabled`` switches it.
        calibration_observer: makes the one that :func:`calibrate` uses in its place; None for itself.
        fake_quantize_enabled: False lets values pass as they are.

    Raises:
        TypeError: an argument is not of its type, or the input is not floating point.
        ValueError: observer, channels and scheme disagree.
        RuntimeError: training without an observer before any data was seen; loading the state of another scheme, or
            scales and zero points that no grid has.

    Example:
        >>> layer = FakeQuantizeLayer(QuantizationScheme(bits=2, narrow_range=True))
        >>> layer(torch.tensor([-1.0, 0.4, 0.6]))
        tensor([-1.,  0.,  1.])
        >>> layer.scale
        tensor([1.])
    """

    scale: Tensor
    zero_point: Tensor
    initialized: Tensor
    grid: QuantizationScheme
    former_dtypes = MappingProxyType({"initialized": torch.uint8})  # which states once had

    def __init__(
        self,
        scheme: QuantizationScheme | None = None,
        observer: ActivationObserver | None = None,
        learnable: bool = False,
        layer: nn.Module | None = None,
        *,
        num_channels: int = 1,
        estimator: StraightThroughEstimator | None = None,
    ) -> None:
        super().__init__()
        scheme = QuantizationScheme() if scheme is None else scheme
        if not isinstance(scheme, QuantizationScheme):
            raise TypeError(f"scheme must be a QuantizationScheme, got {type(scheme).__name__}")
        if observer is None:
            observer = MovingAverageObserver(channel_axis=scheme.channel_axis, num_channels=num_channels)
        if not isinstance(observer, ActivationObserver):
            raise TypeError(f"observer must be an ActivationObserver, got {type(observer).__name__}")
        if not isinstance(learnable, bool):
            raise TypeError(f"learnable must be a bool, got {learnable!r}")
        if estimator is not None and not isinstance(estimator, StraightThroughEstimator):
            raise TypeError(f"estimator must be a StraightThroughEstimator, got {type(estimator).__name__}")
        if layer is not None and not isinstance(layer, nn.Module):
            raise TypeError(f"layer must be a module or None, got {type(layer).__name__}")
        if observer.channel_axis != scheme.channel_axis:
            raise ValueError(
                f"observer must watch the scheme's channel_axis {scheme.channel_axis}, got {observer.channel_axis}"
            )
        if observer.num_channels != num_channels:
            raise ValueError(f"observer must have num_channels={num_channels}, got {observer.num_channels}")
        self.scheme = scheme
        self.observer = observer
        self.calibration_observer: Callable[[], ActivationObserver] | None = None
        self.learnable = learnable
        self.layer = layer
        self.estimator = StraightThroughEstimator() if estimator is None else estimator
        self.name = ""  # for messages; prepare() sets it
        self.fake_quantize_enabled = True
        self.calibrating = False
        self.serves_integers = False  # a layer that reads the values may compute on their codes
        self.codes_lost = 0  # how many times a layer had to make codes anew: its input was a view, or changed
        self.synchronizer: ObserverSynchronizer | None = None
        self.synchronizer_index = 0
        self.reduces_over_ranks = True
        # The fingerprint of the weight in evaluation that the scale is of, or LOADED (weight_range).
        self.range_of: int | str | None = None
        # The buffer with that scale, in the place of which a call may have another one; in a tuple, so that nn.Module
        # does not register it a second time.
        self.range_in: tuple[Tensor, ...] = ()
        self.has_warned = False
        # By the model's graph: whether layers alone read the values, each in its channel; and the module making these
        # for the node alone, in a tuple so that nn.Module does not register it: it is registered elsewhere.
        self.feeds_layers_alone = False
        self.made_by: tuple[nn.Module, ...] = ()

        scale = torch.full((num_channels,), INITIAL_SCALE)
        zero_point = torch.full((num_channels,), float(scheme.symmetric_zero_point))
        if learnable:
            self.scale = nn.Parameter(scale)
            self.zero_point = nn.Parameter(zero_point, requires_grad=not scheme.symmetric)
            project_optimizer_steps(self)
        else:
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero_point)
        self.register_buffer("initialized", torch.zeros(1))
        self._initialized = HostValue(self.initialized, 0.0)
        register_scheme(self, "grid", scheme)

    @property
    def is_initialized(self) -> bool:
        """Whether ``scale`` and ``zero_point`` come from data (or :meth:`set_parameters`)."""
        known: HostValue = self.__dict__["_initialized"]
        buffer: Any = self._buffers["initialized"]
        share = known.read(buffer)
        if share == 1.0:
            return True
        if share < 0.5 and not self.training:  # a copy that evaluates may have been given its buffers in any way
            share = known.read(buffer, anew=True)
        return self._settled(share)

    @property
    def lets_pass(self) -> bool:
        """Whether the next forward is an evaluation before any data."""
        if self.training or self.calibrating or kernels.is_traced():
            return False
        return not self.is_initialized

    @property
    def state(self) -> State:
        """A copy of the buffers that :meth:`commit` changes and a forward reads."""
        buffers: dict[str, Any] = self._buffers
        names: tuple[str, ...] = () if self.learnable else ("scale", "zero_point")
        if not self.is_initialized:
            names += ("initialized",)
        return {name: buffers[name].clone() for name in names}

    @property
    def state_when_recomputing(self) -> State | None:
        """What the buffers held in the forward that is being recomputed; None where they hold it still."""
        return None if self.synchronizer is None else self.synchronizer.history.state_of(self.synchronizer_index)

    @property
    def observes(self) -> bool:
        """Whether the next forward feeds the observer."""
        return self.is_observed and not is_recomputing()

    @property
    def is_observed(self) -> bool:
        """Whether the next forward feeds the observer, or is a recomputation of one that did."""
        if self.calibrating:
            return True
        if not self.training or not self.observer.enabled:
            return False
        return not (self.learnable and self.fake_quantize_enabled and self.is_initialized)

    @property
    def quantizes(self) -> bool:
        """Whether the next forward puts values on the grid, rather than letting them pass."""
        return self.fake_quantize_enabled and not self.calibrating and self.is_initialized

    @property
    def parameters_on_grid(self) -> QuantizationParameters:
        """A copy of scale and zero point as evaluation uses them; a learned zero point is rounded."""
        self.require_initialized()
        return QuantizationParameters(self.scale.detach().clone(), self.code_of_zero.detach(), self.scheme)

    @property
    def code_of_zero(self) -> Tensor:
        """The zero point as a code of the grid: a learned one is rounded."""
        return arithmetic.grid_zero_point(self.zero_point, self.scheme)

    def to_codes(self, values: Tensor) -> Tensor:
        """Quantizes with the present scale and zero point.

        Raises:
            RuntimeError: no data has set them.
        """
        self.require_initialized()
        return kernels.quantize(values, self.scale, self.code_of_zero, self.scheme)

    def codes_on_grid(self, values: Tensor, way: Way | None = None) -> Codes:
        """The codes of values that this node has quantized, and that came to the caller that way."""
        codes = attached_codes(values, way)
        if codes is None:
            if not kernels.is_traced():
                self.codes_lost += 1
            codes = codes_anew(values, self.scale, self.zero_point, self.scheme)
        return codes

    def to_values(self, codes: Tensor) -> Tensor:
        """Dequantizes, to float32."""
        return kernels.dequantize(codes, self.scale, self.code_of_zero, self.scheme.channel_axis)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Values on the grid: shape, dtype and memory format of ``input`` (of the wrapped layer's output)."""
        if is_recomputing():
            with as_in_forward([self], input):
                return self._quantized(input, *args, **kwargs)
        return self._quantized(input, *args, **kwargs)

    def _quantized(self, input: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.training:
            refuse_export_with_gradients()
        output = input if self.layer is None else self.layer(input, *args, **kwargs)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"input must be a floating-point tensor, got {got}")
        axis = self.scheme.resolve_channel_axis(output.dim())
        if axis is not None and output.shape[axis] != self.scale.numel():
            raise ValueError(
                f"input must have {self.scale.numel()} channels along axis {axis}, got shape {tuple(output.shape)}"
            )
        if output.numel() == 0:  # nothing to learn a range from, and nothing to round
            return output
        observes = self.observes
        if observes:
            self.observe(output)
        if self.calibrating or not self.fake_quantize_enabled:
            return output
        is_initialized = self.is_initialized
        # A compiler cannot read it, and what is learned changes in the graph, if this is the first batch.
        if not is_initialized and (not kernels.is_traced() or (self.learnable and observes)):
            return self._without_data(output, observes)
        # In every step, where a module's own look-up is slow.
        state: dict[str, Any] = self._parameters if self.learnable else self._buffers
        if self.learnable:
            require_float32(state["scale"], self.name)
        grid = state["scale"], state["zero_point"], self.scheme
        if not is_initialized:  # as far as a compiler knows, for which nothing may be read back
            values, _, _ = fake_quantize_tensor(output, *grid, self.estimator, axis)
            return torch.where(kernels.snapshot(self.initialized) >= 0.5, values, output)
        values, codes, own_grid = fake_quantize_tensor(output, *grid, self.estimator, axis, codes=self.serves_integers)
        if codes is not None and own_grid is not None:
            return attach_codes(values, codes, own_grid)
        return values

    def _without_data(self, output: Tensor, observes: bool) -> Tensor:
        """What the layer returns before any data: its input."""
        if not self.training:
            self._warn_of_no_data()
        elif observes or is_recomputing():  # the model's first batch: it takes effect when all ranks have shown theirs
            # DistributedDataParallel wants every parameter to take part in every step.
            return output + 0 * (self.scale.sum() + self.zero_point.sum()) if self.learnable else output
        else:
            self.require_initialized()
        return output

    def _warn_of_no_data(self) -> None:
        warned = self if self.synchronizer is None else self.synchronizer
        if not warned.has_warned:
            warned.has_warned = True
            warnings.warn(
                f"{self.name or 'this layer'} has seen no data: what no data has reached evaluates in float until the "
                "model is trained or calibrated",
                UserWarning,
                stacklevel=2,
            )

    def observe(self, input: Tensor) -> None:
        """Folds a tensor into the statistics: now, or when the model's forward ends."""
        require_own_level(input, self.observer.batches, self.name)
        if self.synchronizer is not None:
            self.synchronizer.defer(self.synchronizer_index, self.observer.measure(input))
            return
        if self.reduces_over_ranks and kernels.is_traced():
            kernels.refuse_recomputation(self.observer.batches)
        if self.reduces_over_ranks and is_distributed():
            self.commit(*reduce_over_ranks([self.observer.measure(input)]))
        elif not self._commit_at_once(input, self.scheme.resolve_channel_axis(input.dim()), is_measured=False):
            self.commit(self.observer.measure(input))

    def commit(self, statistics: BatchStatistics) -> None:
        """Folds measured statistics in and, where due, recomputes the parameters from them."""
        if self._commit_at_once(statistics.extremes, None, is_measured=True):
            return
        self.observer.update(statistics)
        if self.calibrating:
            return
        if not self.is_initialized and kernels.is_traced():  # it may be, but cannot be read
            first = self.initialized < 0.5
            self.update_parameters(first if self.learnable else first | self.observer.due())
            return
        due = True if not self.is_initialized else self.observer.due()
        if isinstance(due, Tensor):
            self.update_parameters(due)
        elif due:
            self.update_parameters()

    def _commit_at_once(self, batch: Tensor, axis: int | None, *, is_measured: bool) -> bool:
        """:meth:`commit` in one call, which does it for the observer that most layers have, or not at all."""
        observer = self._modules["observer"]
        state: dict[str, Any] = self._buffers
        if self.calibrating or self.learnable or not isinstance(observer, MovingAverageObserver):
            return False
        is_initialized = self.is_initialized
        done = observer.update_with_parameters(
            batch,
            axis,
            state["scale"],
            state["zero_point"],
            self.scheme,
            is_measured=is_measured,
            due=not is_initialized,
        )
        if done and not is_initialized:
            self._mark_initialized()
        return done

    @torch.no_grad()
    def update_parameters(self, due: Tensor | None = None) -> None:
        """Recomputes ``scale`` and ``zero_point`` from the observer, in place.

        ``due``, a bool tensor where given, says whether to take the new values over.
        """
        scale, zero_point = arithmetic.range_to_scale_and_zero_point(*self.observer.range(self.scheme), self.scheme)
        if due is not None:
            scale, zero_point = torch.where(due, scale, self.scale), torch.where(due, zero_point, self.zero_point)
        self._set(scale, zero_point)
        if not self.is_initialized:
            self._mark_initialized()

    @torch.no_grad()
    def set_parameters(self, parameters: QuantizationParameters) -> None:
        """Takes known parameters over, as if data had shown them.

        Raises:
            TypeError: they are no QuantizationParameters.
            ValueError: they are of another scheme or shape, or move the zero point of a symmetric scheme.
        """
        if not isinstance(parameters, QuantizationParameters):
            raise TypeError(f"parameters must be QuantizationParameters, got {type(parameters).__name__}")
        if parameters.scheme != self.scheme or parameters.scale.shape != self.scale.shape:
            raise ValueError(
                f"parameters must be of scheme {self.scheme} and shape {tuple(self.scale.shape)}, "
                f"got {parameters.scheme} and {tuple(parameters.scale.shape)}"
            )
        fixed = self.scheme.symmetric_zero_point
        if self.scheme.symmetric and bool((parameters.zero_point != fixed).any()):
            raise ValueError(f"zero_point must be {fixed} on a symmetric grid, got {parameters.zero_point.tolist()}")
        self._set(parameters.scale, parameters.zero_point)
        self.initialized.fill_(1)

    def _settled(self, share: float) -> bool:
        """Whether ``initialized``, which is that share, says that there was data; an average of models, of which that
        share had data, is made one of those alone."""
        if some_had_none(share) and not kernels.is_traced():
            take_initial_values_out(self.scale, self.zero_point, self.scheme, share)
            self._mark_initialized()
        return share >= 0.5

    def _set(self, scale: Tensor, zero_point: Tensor) -> None:
        if self.learnable:
            require_writable(self, self.scale, self.name)
        copy_replicated(self.scale, scale)
        copy_replicated(self.zero_point, zero_point)

    def reset(self) -> None:
        """Forgets all data: the next training batch is the first."""
        self.observer.reset()
        self.initialized.zero_()
        self.range_of = None

    def require_initialized(self) -> None:
        """Raises RuntimeError where no data has set the parameters."""
        if not self.is_initialized:
            raise RuntimeError(
                f"{self.name or 'this layer'} has seen no data, which its scale and zero point come from: "
                "train or calibrate first"
            )

    def _mark_initialized(self) -> None:
        self.initialized.fill_(1)
        self._initialized.set(self.initialized, 1.0)

    def train(self, mode: bool = True) -> FakeQuantizeLayer:
        self._settled(self._initialized.read(self.initialized, anew=True))  # for a compiler, which cannot
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantizeLayer:
        if self.layer is not None:
            self.layer._apply(fn, recurse)  # type: ignore[no-untyped-call]
        is_own = bool(self.range_in) and self.range_in[0] is self.scale
        super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
        self.range_in = (self.scale,) if is_own else ()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix, *args)
        before = self.initialized.clone()
        super()._load_from_state_dict(without_schemes(self, state_dict, prefix, args[2]), prefix, *args)
        # A state that lacks the scale, or has another number of them, must not pass for data.
        own = {f"{prefix}{name}": getattr(self, name) for name in ("scale", "zero_point", "initialized")}
        if not all(getattr(state_dict.get(key), "shape", None) == tensor.shape for key, tensor in own.items()):
            self.initialized.copy_(before)
        self.range_of = None
        self._initialized.read(self.initialized)

    def state_faults(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Grid, scale and zero point, and what says whether they come from data (an average of models may round it)."""
        yield from grid_faults(self, state, prefix)
        yield from faults_where(
            state, f"{prefix}initialized", self.initialized, lambda flag: (flag > -0.5) & (flag < 1.5), "be 0 or 1"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_schemes(self, destination, prefix)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.learnable:
            project_optimizer_steps(self)

    def extra_repr(self) -> str:
        parts = [str(self.scheme)]
        if self.learnable:
            parts.append("learnable")
        if not self.fake_quantize_enabled:
            parts.append("disabled")
        return ", ".join(parts)
