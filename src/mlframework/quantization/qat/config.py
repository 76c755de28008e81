"""What to quantize, and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..scheme import QuantizationScheme
from ..targets import TARGETS, Target
from .activation_observer import ActivationObserver
from .straight_through_estimator import StraightThroughEstimator

Selector = str | type[nn.Module]

_REDUCED_BITS = 7


@dataclass(frozen=True)
class QATConfig:
    """How a model is quantized, for :func:`prepare` and :class:`QATModuleWrapper`.

    Layers are selected by qualified name (``"features.0"``, or a shell pattern such as ``"features.*"``) or by type
    (``nn.Linear``).

    Args:
        target: the engine whose grids to use: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, ``"executorch"`` or
            ``"litert"``.
        weight_bits: width of the weights' codes, 2 to 8.
        activation_bits: width of the activations' codes, 2 to 8.
        reduce_range: keep weights within 7 bits, for engines on x86 processors without VNNI instructions, which add
            pairs of uint8 x int8 products in 16 bits. 2 * 255 * 127 = 64,770 saturates there and silently gives wrong
            results; 2 * 255 * 63 = 32,130 fits into 32,767. Results are then right on every processor, for one bit of
            the weights' resolution. Processors with VNNI, and this library anywhere, sum 8-bit products exactly.
            ONNX Runtime's quantizer gives the name the same meaning; torch.ao's x86 configuration
            (``get_default_qat_qconfig("x86")``) takes the bit from the activations instead. All weights follow,
            tables of embeddings too (which are not multiplied: override ``nn.Embedding`` to keep them at 8 bits).
        per_channel_weights: a scale for every output channel of a weight; otherwise one for the whole weight.
        learnable: scales and zero points are trained by the optimizer (LSQ, LSQ+) from where the first batch sets them.
        activation_observer: makes the observer of an activation. By default, training follows a
            :class:`MovingAverageObserver`, and :func:`calibrate` chooses the range of least squared error
            (:class:`HistogramObserver`), from which training then goes on.
        estimator: what passes backward.
        quantize_last_linear: also quantize the output of a linear layer that is the model's result.
        integer_forward: linear layers and convolutions train on integer codes forward, where compiled kernels do that
            (and straight through in float backward); otherwise on the floats that the codes stand for.
        overrides: another configuration for selected layers; of several that match, the first counts.
        skip: layers that stay float.

    Raises:
        TypeError: a field is not of its type.
        ValueError: an unknown target, or bits out of range.

    Example:
        >>> config = QATConfig(weight_bits=4, skip=("head",), overrides={"stem.*": QATConfig()})
        >>> config.for_layer("stem.0", nn.Conv2d(3, 8, 3)).weight_scheme.bits
        8
        >>> config.for_layer("head", nn.Linear(8, 2)) is None
        True
        >>> str(QATConfig(reduce_range=True).weight_scheme)
        'int7 [-63, 63] symmetric, per channel 0'
    """

    target: str = "onnxruntime"
    weight_bits: int = 8
    activation_bits: int = 8
    reduce_range: bool = False
    per_channel_weights: bool = True
    learnable: bool = False
    activation_observer: Callable[[], ActivationObserver] | None = None
    estimator: StraightThroughEstimator = field(default_factory=StraightThroughEstimator)
    quantize_last_linear: bool = False
    integer_forward: bool = True
    overrides: Mapping[Selector, QATConfig] = field(default_factory=dict, hash=False)  # a mapping has no hash
    skip: tuple[Selector, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise TypeError(f"target must be a str, got {self.target!r}")
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(sorted(TARGETS))}, got {self.target!r}")
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ValueError(f"{name} must be an int between 2 and 8, got {bits!r}")
        for name in ("reduce_range", "per_channel_weights", "learnable", "quantize_last_linear", "integer_forward"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        makes_observer = callable(self.activation_observer)
        if self.activation_observer is not None and (
            not makes_observer or isinstance(self.activation_observer, ActivationObserver)
        ):
            raise TypeError(
                "activation_observer must make a new observer at each call (a class or functools.partial), "
                f"got {self.activation_observer!r}"
            )
        if not isinstance(self.estimator, StraightThroughEstimator):
            raise TypeError(f"estimator must be a StraightThroughEstimator, got {self.estimator!r}")
        if isinstance(self.skip, (str, type)) or not isinstance(self.skip, Collection):
            raise TypeError(f"skip must be a tuple of names, patterns or types, got {self.skip!r}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must be a mapping from names, patterns or types, got {self.overrides!r}")
        object.__setattr__(self, "skip", tuple(self.skip))  # any collection will do; a tuple has a hash
        for selector in (*self.overrides, *self.skip):
            if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
                raise TypeError(f"overrides and skip must select by name, pattern or module type, got {selector!r}")
        for selector, config in self.overrides.items():
            if not isinstance(config, QATConfig):
                raise TypeError(f"overrides[{selector!r}] must be a QATConfig, got {type(config).__name__}")
            if config.target != self.target:
                raise ValueError(f"overrides[{selector!r}] must be for target {self.target!r}, got {config.target!r}")

    @classmethod
    def for_target(cls, target: str, **fields: Any) -> QATConfig:
        """The configuration for an engine; ``fields`` are those of the class.

        Example:
            >>> str(QATConfig.for_target("tensorrt").activation_scheme)
            'int8 [-128, 127] symmetric, per tensor'
        """
        return cls(target=target, **fields)

    @property
    def _grids(self) -> Target:
        weight_bits = min(self.weight_bits, _REDUCED_BITS) if self.reduce_range else self.weight_bits
        return TARGETS[self.target].with_bits(self.activation_bits, weight_bits)

    @property
    def activation_scheme(self) -> QuantizationScheme:
        """The grid of activations of either sign."""
        return self._grids.activation

    @property
    def non_negative_activation_scheme(self) -> QuantizationScheme:
        """The grid of activations that are never negative."""
        return self._grids.non_negative_activation

    @property
    def weight_scheme(self) -> QuantizationScheme:
        """The grid of weights; per channel, its axis 0 stands for the output's channels."""
        return self._grids.weight

    def for_layer(self, name: str, layer: nn.Module) -> QATConfig | None:
        """The configuration that a layer gets: its override, this one, or None where it is skipped."""
        if any(_selects(selector, name, layer) for selector in self.skip):
            return None
        for selector, config in self.overrides.items():
            if _selects(selector, name, layer):
                return config
        return self

    def unused_selectors(self, layers: Mapping[str, nn.Module]) -> list[Selector]:
        """Selectors of ``overrides`` and ``skip`` that match none of these layers (a typing mistake, most likely)."""
        return [
            selector
            for selector in (*self.overrides, *self.skip)
            if not any(_selects(selector, name, layer) for name, layer in layers.items())
        ]


def _selects(selector: Selector, name: str, layer: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector)
    return isinstance(layer, selector)
