"""How far a model's outputs are from those of its float reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Loss = Callable[[Any, Any], "float | Tensor"]


def decibels(relative_error: float) -> float:
    r"""The signal-to-noise ratio :math:`-10 \log_{10} e` of a relative squared error.

    Example:
        >>> decibels(0.01), decibels(0.0)
        (20.0, inf)
    """
    if math.isnan(relative_error):
        return math.nan
    return -10 * math.log10(relative_error) if relative_error > 0 else math.inf


@dataclass(frozen=True)
class Measure:
    r"""Outputs of a model against its float reference, over all batches.

    Attributes:
        relative_error: :math:`\sum (y - \hat y)^2 / \sum y^2`, with sums over a tensor in all batches; the mean over
            the floating-point tensors that the model returns, so that none drowns the others. Where both are the same
            infinity, nothing is lost.
        agreement: the share of positions with the same argmax, where the outputs look like logits; else None.
        loss: the mean of the user's loss over the batches; None without one.
    """

    relative_error: float
    agreement: float | None = None
    loss: float | None = None

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio of the outputs in dB."""
        return decibels(self.relative_error)

    def to_dict(self) -> dict[str, float | None]:
        """Plain data."""
        return {"relative_error": self.relative_error, "snr": self.snr, "agreement": self.agreement, "loss": self.loss}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measure:
        """What :meth:`to_dict` returned."""
        return cls(data["relative_error"], data["agreement"], data["loss"])


class Comparison:
    """Sums up what batches show of a model against the reference's outputs.

    Args:
        loss: called with the model's outputs and the batch; a number or a tensor of one element.
    """

    def __init__(self, loss: Loss | None = None) -> None:
        self._loss = loss
        self._losses: list[float] = []
        self._energies: list[tuple[float, float]] = []
        self._agreeing = self._positions = 0

    @torch.no_grad()
    def add(self, outputs: Any, reference: Any, batch: Any) -> None:
        """Adds one batch: what the model returned, and what the reference did.

        Raises:
            ValueError: the loss is not one number.
        """
        pairs = list(zip(float_tensors(outputs), float_tensors(reference), strict=True))
        energies = [energies_of(one, other) for one, other in pairs]
        before = self._energies or [(0.0, 0.0)] * len(energies)
        self._energies = [(a + c, b + d) for (a, b), (c, d) in zip(before, energies, strict=True)]
        logits, expected = logits_of(outputs), logits_of(reference)
        if logits is not None and expected is not None:
            agrees = logits.argmax(-1) == expected.argmax(-1)
            self._agreeing += int(agrees.sum())
            self._positions += agrees.numel()
        if self._loss is not None:
            self._losses.append(_number(self._loss(outputs, batch)))

    def result(self) -> Measure:
        """The measure over all batches so far."""
        shares = [relative(error, signal) for error, signal in self._energies]
        return Measure(
            sum(shares) / len(shares) if shares else 0.0,
            self._agreeing / self._positions if self._positions else None,
            sum(self._losses) / len(self._losses) if self._losses else None,
        )


def float_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among what a model returns, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def logits_of(outputs: Any) -> Tensor | None:
    """The tensor of an output that looks like logits, classes along the last axis: what is called ``logits`` in it, or
    a single tensor (N, C) with at least two columns; None where there is none."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    tensors = float_tensors(outputs)
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] >= 2:
        return tensors[0]
    return None


def squared_sum(tensor: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(tensor.detach().double().square().sum())


def energies_of(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The energy of an error and that of the signal, in float64: infinities that are the same differ by nothing, and
    are no signal that an error could be a share of."""
    error = torch.where(actual == expected, 0, actual - expected)
    return squared_sum(error), squared_sum(expected.masked_fill(expected.isinf(), 0))


def relative(error: float, signal: float) -> float:
    """An error's energy as a share of a signal's; beside a signal of zeros, zero or infinity."""
    if signal > 0:
        return error / signal
    return 0.0 if error == 0 else math.inf


def _number(loss: float | Tensor) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return one number, got {got}") from error
