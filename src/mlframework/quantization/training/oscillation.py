r"""Weights that oscillate between two integers, and what helps (Nagel et al., 2022, arXiv:2203.11086).

Through the straight-through estimator the gradient of a weight depends on the integer it is rounded to, and may point
across the boundary from either side: the weight then jumps to and fro until training ends, and is left on either side
by chance. With few bits, and most of all in depthwise convolutions, batch statistics follow the jumps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import require_fields
from .latent_weights import LatentWeight, latent_weights, require_quantized_layers

OSCILLATES = 0.005  # the frequency from which a weight counts as oscillating (the paper's table 2)
MOMENTUM = 0.01  # of the averages of frequencies


def dampening_loss(model: nn.Module) -> Tensor:
    r"""Pulls every weight to the centre of its bin (Nagel et al., 2022, equation 5).

    .. math:: L = \sum \big(\hat w - \mathrm{clip}(w,\ (q_{min} - z)\,s,\ (q_{max} - z)\,s)\big)^2

    summed over all quantized weights, where :math:`\hat w`, the value that :math:`w` is rounded to, is a constant.
    Weights beyond the ends of the grid have no gradient. Add it to the loss with a factor that grows during training,
    so that weights move freely at first; the paper lets it grow along a cosine.

    Args:
        model: a prepared model.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: there is no quantized weight in training.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(weight_bits=4), (torch.randn(1, 4),))
        >>> loss = prepared(torch.randn(8, 4)).square().mean() + 1e-2 * dampening_loss(prepared)
    """
    weights = latent_weights(model)
    if not weights:
        raise ValueError("model must hold quantized weights in training, got none that a forward has used")
    return torch.stack([_distance_from_centres(weight) for weight in weights]).sum()


def _distance_from_centres(weight: LatentWeight) -> Tensor:
    scheme = weight.node.scheme
    ends = [(end - weight.zero_point) * weight.scale for end in (scheme.quant_min, scheme.quant_max)]
    clipped = weight.weight.float().clamp(*ends)
    return (weight.values(weight.codes) - clipped).square().sum()


class OscillationFreezer:
    r"""Freezes weights that oscillate, at the integer where they were most of the time (algorithm 1 of the paper).

    After every optimizer step, a weight whose integer changed, against the direction of its last change, has oscillated
    (:math:`o = 1`, equation 6); its frequency and its integer are averaged,

    .. math:: f \leftarrow m\, o + (1 - m)\, f, \qquad \bar q \leftarrow m\, q + (1 - m)\, \bar q,

    and where :math:`f` exceeds the threshold, the weight stays at the centre of the bin :math:`\mathrm{rne}(\bar q)`
    from then on. The float weights themselves are set, so that state dicts, conversion and export see nothing new. All
    of it counts in integers: scales that are learned, or follow their weights, may move meanwhile.

    Args:
        model: a prepared model.
        steps: how many steps training takes.
        threshold: at the first step and at the last, with a cosine between them. Late in training fewer oscillations
            are left, and those count.
        momentum: :math:`m`, the weight of the newest step.

    Raises:
        ValueError: a number is out of range, or the model has no quantized layers.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(weight_bits=4), (torch.randn(1, 4),))
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
        >>> freezer = OscillationFreezer(prepared, steps=3)
        >>> for _ in range(3):
        ...     prepared(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     freezer.step()
        >>> freezer.frozen()
        {'': 0.0}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        threshold: tuple[float, float] = (0.04, 0.01),
        momentum: float = MOMENTUM,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive int, got {steps!r}")
        if len(threshold) != 2 or not all(end > 0 for end in threshold):
            raise ValueError(f"threshold must be two positive numbers, got {threshold!r}")
        if not 0 < momentum < 1:
            raise ValueError(f"momentum must be between 0 and 1, got {momentum!r}")
        require_quantized_layers(model)
        self.model = model
        self.steps = steps
        self.first_threshold, self.last_threshold = threshold
        self.momentum = momentum
        self.steps_taken = 0
        self._trackers: dict[str, _Tracker] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._track()

    @property
    def threshold(self) -> float:
        """The frequency above which weights freeze now."""
        progress = min(self.steps_taken / self.steps, 1.0)
        span = self.first_threshold - self.last_threshold
        return self.last_threshold + span * 0.5 * (1 + math.cos(math.pi * progress))

    @torch.no_grad()
    def step(self) -> None:
        """Counts what the optimizer's step changed, freezes, and puts frozen weights back."""
        for tracker in self._trackers.values():
            tracker.freeze(self.momentum, self.threshold)
        self._track()
        self.steps_taken += 1

    def oscillating(self) -> dict[str, float]:
        """The share of the weights of every layer, by its name, that oscillate now and are not frozen."""
        return _shares({name: tracker.oscillating for name, tracker in self._trackers.items()})

    def frozen(self) -> dict[str, float]:
        """The share of the weights of every layer, by its name, that are frozen."""
        return _shares({name: tracker.is_frozen for name, tracker in self._trackers.items()})

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on: the number of steps and, for every layer, tensors of the shape of its weight."""
        layers = {name: tracker.state() for name, tracker in self._trackers.items()}
        return {"steps_taken": self.steps_taken, "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: it is of other layers, and nothing has changed.
        """
        require_freezer_state(self, state_dict)
        self._loaded = dict(state_dict["layers"])
        self._trackers.clear()
        self._track()
        self.steps_taken = int(state_dict["steps_taken"])

    def _track(self) -> None:
        """Begins to track the weights that are known, some only after a first forward."""
        for weight in latent_weights(self.model):
            if weight.name not in self._trackers:
                tracker = self._trackers[weight.name] = _Tracker(weight)
                if weight.name in self._loaded:
                    tracker.load(self._loaded.pop(weight.name))


def require_freezer_state(freezer: OscillationFreezer, state_dict: Any) -> None:
    """Refuses a state that the freezer cannot go on from.

    Raises:
        ValueError: it is no such state, or of layers that the model does not have.
    """
    require_fields(state_dict, {"steps_taken": 0, "layers": {}}, "state_dict")
    steps, layers = state_dict["steps_taken"], state_dict["layers"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps_taken must be a number of steps, got {steps!r}")
    own = set(dict(freezer.model.named_modules()))
    if not isinstance(layers, Mapping) or not own.issuperset(layers):
        others = sorted(set(layers) - own) if isinstance(layers, Mapping) else layers
        raise ValueError(f"state_dict must be of layers of the model, got {others}")
    shapes = {weight.name: weight.weight.shape for weight in latent_weights(freezer.model)}
    for layer, tensors in layers.items():
        require_fields(tensors, dict.fromkeys(_Tracker.tensors), f"state_dict's {layer or 'layer'}")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.shape != shapes.get(layer, tensor.shape):
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
                raise ValueError(f"{layer}'s {name} must be of shape {tuple(shapes.get(layer, ()))}, got {got}")


def _shares(selected: dict[str, Tensor]) -> dict[str, float]:
    if not selected:
        return {}
    shares = torch.stack([mask.float().mean() for mask in selected.values()]).tolist()
    return dict(zip(selected, shares, strict=True))


class OscillationFrequency:
    """How often the integers of a layer's weights turn round (equations 6 and 7 of the paper).

    Args:
        codes: the integers at the start.

    Attributes:
        last_codes: int16, as of the last update.
        last_direction: int8, which way each went when it last changed.
        frequency: float32, the moving average of how often it changed against that.
    """

    def __init__(self, codes: Tensor) -> None:
        self.last_codes = codes.to(torch.int16)  # int8 and uint8 alike
        self.last_direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)

    @property
    def oscillating(self) -> Tensor:
        """Which of the weights oscillate: bool, of their shape."""
        return self.frequency > OSCILLATES

    def update(self, codes: Tensor, momentum: float = MOMENTUM) -> None:
        """Counts a step that led to these integers."""
        codes = codes.to(torch.int16)
        direction = torch.sign(codes - self.last_codes).to(torch.int8)
        turned = direction * self.last_direction < 0
        self.frequency.lerp_(turned.float(), momentum)
        self.last_direction = torch.where(direction != 0, direction, self.last_direction)
        self.last_codes.copy_(codes)


class _Tracker(OscillationFrequency):
    """One layer's integers: where they were most of the time, and which of them are frozen."""

    tensors = ("last_codes", "last_direction", "frequency", "average", "is_frozen")

    def __init__(self, weight: LatentWeight) -> None:
        codes = weight.codes
        super().__init__(codes)
        self.weight = weight
        self.average = codes
        self.is_frozen = torch.zeros_like(codes, dtype=torch.bool)

    @property
    def oscillating(self) -> Tensor:
        return super().oscillating & ~self.is_frozen

    def freeze(self, momentum: float, threshold: float) -> None:
        """Counts a step, freezes what oscillates more often than the threshold, and puts frozen weights back."""
        codes = torch.where(self.is_frozen, self.last_codes.float(), self.weight.codes)
        self.update(codes, momentum)
        self.average.lerp_(codes, momentum)
        freezing = (self.frequency > threshold) & ~self.is_frozen
        codes = torch.where(freezing, self.average.round(), codes)
        self.is_frozen |= freezing
        self.last_codes.copy_(codes)
        latent = self.weight.weight
        latent.copy_(torch.where(self.is_frozen, self.weight.values(codes).to(latent.dtype), latent))

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in self.tensors}

    def load(self, state: dict[str, Tensor]) -> None:
        for name in self.tensors:
            getattr(self, name).copy_(state[name])
