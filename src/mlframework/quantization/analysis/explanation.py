"""Where along the network the error comes in: the result of ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..tables import html_table, text_table
from .local_errors import ErrorSplit
from .measures import Measure, decibels

_HEADER = ("layer", "kind", "dB", "own dB", "of error", "weight", "clipped", "rounded", "constant", "clipped share")
_HALF = 0.5
LARGEST = 3  # how many layers are to blame where errors add up


@dataclass(frozen=True)
class LayerExplanation:
    """One layer, operation or node of the model.

    Attributes:
        name: qualified name in the prepared model.
        kind: the layer's type, or what the operation is.
        error: of its output in the quantized network, as a relative squared error against the float one.
        own: the error that it makes by itself of a float input: its weight's, and that of the grid of its output.
        channel_ratio: the largest range of a channel of its output, as a multiple of the channels' median.
        peak: the largest magnitude of its output, as a multiple of its root mean square.
        mean_share: the share of its own error that a constant for each channel makes up.
        weight_bits, activation_bits: widths of its weight, and of its output (or input); None without a grid.
        advice: what usually helps; None where the layer is not to blame.
    """

    name: str
    kind: str
    error: float
    own: ErrorSplit
    channel_ratio: float
    peak: float
    mean_share: float
    weight_bits: int | None = None
    activation_bits: int | None = None
    advice: str | None = None

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio of its output in the quantized network, in dB."""
        return decibels(self.error)

    @property
    def own_snr(self) -> float:
        """What the ratio would be with a float input, in dB."""
        return decibels(self.own.total)

    @property
    def own_share(self) -> float:
        """Its own error as a share of the error of its output, where errors are uncorrelated; 1 at the most."""
        return min(1.0, self.own.total / self.error) if self.error > 0 else 0.0

    def breaks(self, threshold: float) -> bool:
        """Whether its output is below that ratio in dB and at least half of the error is its own."""
        return self.snr < threshold and self.own_share >= _HALF

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "snr": self.snr,
            "own_snr": self.own_snr,
            "own": self.own.to_dict(),
            "channel_ratio": self.channel_ratio,
            "peak": self.peak,
            "mean_share": self.mean_share,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Explanation:
    """Layer by layer, in the order in which they run; ``str()`` is a table with what usually helps below.

    Attributes:
        layers: all that puts values on a grid, and layers whose output is float.
        outputs: the model's outputs against the float network's.
        threshold: the signal-to-noise ratio in dB below which an output counts as broken.
        trained: whether weights were trained since, so that what training changed counts as an error, too.
    """

    layers: tuple[LayerExplanation, ...]
    outputs: Measure
    threshold: float
    trained: bool = False

    @property
    def first_break(self) -> LayerExplanation | None:
        """The first layer whose output is below the threshold and that makes at least half of its error by itself.

        None where no output is that bad, or where errors of many layers add up to it.
        """
        return next((layer for layer in self.layers if layer.breaks(self.threshold)), None)

    @property
    def bad(self) -> tuple[LayerExplanation, ...]:
        """The layers that :meth:`~LayerExplanation.breaks` holds for, or that a float input would not save; where the
        outputs are below the threshold without any of these, the three of the largest errors of their own. Each has an
        advice."""
        return tuple(layer for layer in self.layers if layer.advice is not None)

    @property
    def advices(self) -> dict[str, list[str]]:
        """What usually helps, with the names of the layers that it is for."""
        found: dict[str, list[str]] = {}
        for layer in self.bad:
            assert layer.advice is not None
            found.setdefault(layer.advice, []).append(layer.name or "(the model)")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        first = self.first_break
        return {
            "outputs": self.outputs.to_dict(),
            "threshold": self.threshold,
            "trained": self.trained,
            "first_break": None if first is None else first.name,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @property
    def verdict(self) -> str:
        """One sentence: where it breaks."""
        outputs = f"the outputs are at {self.outputs.snr:.1f} dB"
        first = self.first_break
        if first is not None:
            return f"{outputs}; the first layer that breaks is {first.name} at {first.snr:.1f} dB"
        if all(layer.snr >= self.threshold for layer in self.layers):
            return f"{outputs}; no layer is below {self.threshold:g} dB"
        largest = sorted(self.layers, key=lambda layer: layer.own_snr)[:LARGEST]
        names = ", ".join(f"{layer.name} ({layer.own_snr:.1f} dB)" for layer in largest)
        return f"{outputs}; no single layer breaks, errors add up; the largest of their own: {names}"

    @property
    def _notes(self) -> list[str]:
        notes = [self.verdict, *(f"{', '.join(names)}: {advice}" for advice, names in self.advices.items())]
        if self.trained:
            notes.append("the weights were trained since: what training changed counts as an error, too")
        return notes

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                layer.name or "(the model)",
                layer.kind,
                f"{layer.snr:.1f}",
                f"{layer.own_snr:.1f}",
                f"{layer.own_share:.0%}",
                *(f"{part:.1e}" if part else "0" for part in (layer.own.weight, layer.own.clipped, layer.own.rounded)),
                f"{layer.mean_share:.0%}",
                f"{layer.own.clipped_share:.2%}",
            )
            for layer in self.layers
        ]

    def __str__(self) -> str:
        table = text_table(_HEADER, self._rows, numbers=range(2, len(_HEADER)))
        return "\n".join([table, *self._notes])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows, numbers=range(2, len(_HEADER)), notes=self._notes)
