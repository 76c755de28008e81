"""What every layer's quantization costs: the result of ``analyze_sensitivity``."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..qat.config import QATConfig
from ..tables import html_table, text_table
from .local_errors import ErrorSplit
from .measures import Measure

_PARTS = ("weight", "clipped", "rounded")
_HEADER = ("layer", "kind", "bits", "alone dB", "all but it dB", "gain dB", *_PARTS)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer with weights of one width.

    Attributes:
        name: what selects it in a configuration: the layer's qualified name, or that of the module whose code calls
            functions that are layers.
        kind: the layer's type.
        bits: the width of its weight. The input has the grid that it was prepared with.
        weights: elements of its weights.
        scales: how many scales these have.
        alone: the outputs where it alone is quantized (its weight, and what enters it where activations were measured,
            too), and everything else is float.
        all_but: the outputs where everything is quantized, with all weights at ``bits``, but its weight, and its input
            where nothing else reads that.
        split: the layer's own error at its output, by cause.
    """

    name: str
    kind: str
    bits: int
    weights: int
    scales: int
    alone: Measure
    all_but: Measure
    split: ErrorSplit

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {name: getattr(self, name) for name in ("name", "kind", "bits", "weights", "scales")}
        return {
            **own,
            "alone": self.alone.to_dict(),
            "all_but": self.all_but.to_dict(),
            "split": self.split.to_dict(),
        }


@dataclass(frozen=True)
class ActivationSensitivity:
    """One activation on the grid that it was prepared with.

    Attributes:
        name: of the layer or operation whose output (or input) it is.
        role: ``"output"`` or ``"input"``.
        bits: of its codes.
        alone: the outputs where it alone is on its grid, and everything else is float.
        all_but: the outputs where everything else is as prepared.
    """

    name: str
    role: str
    bits: int
    alone: Measure
    all_but: Measure

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {name: getattr(self, name) for name in ("name", "role", "bits")}
        return {**own, "alone": self.alone.to_dict(), "all_but": self.all_but.to_dict()}


@dataclass(frozen=True)
class SensitivityReport:
    """Layer by layer, in the order in which they run, each at every width, and the activations; ``str()`` is a table
    of each.

    Attributes:
        layers: what was measured of layers.
        activations: what was measured of activations; empty where it was not asked for.
        prepared: the outputs with everything quantized as prepared.
        quantized: the outputs with everything quantized and all weights of one width, by that width.
        reference_loss: the user's loss of the float reference; None without one.
        target: the engine that the model was prepared for.
        other_bytes: of parameters and buffers that are no weight of a quantized layer.
        configs: what each layer was prepared with, by name.
    """

    layers: tuple[LayerSensitivity, ...]
    activations: tuple[ActivationSensitivity, ...]
    prepared: Measure
    quantized: Mapping[int, Measure]
    reference_loss: float | None
    target: str
    other_bytes: int
    configs: Mapping[str, QATConfig] = field(repr=False)

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths that were measured."""
        return tuple(self.quantized)

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, in the order in which they run."""
        return tuple(dict.fromkeys(layer.name for layer in self.layers))

    def at(self, bits: int) -> tuple[LayerSensitivity, ...]:
        """The layers at one width.

        Raises:
            ValueError: that width was not measured.
        """
        if bits not in self.quantized:
            raise ValueError(f"bits must be one of the widths measured, {self.bits}, got {bits!r}")
        return tuple(layer for layer in self.layers if layer.bits == bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :mod:`json` writes it."""
        return {
            "target": self.target,
            "reference_loss": self.reference_loss,
            "other_bytes": self.other_bytes,
            "quantized": {str(bits): measure.to_dict() for bits, measure in self.quantized.items()},
            "prepared": self.prepared.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "activations": [activation.to_dict() for activation in self.activations],
        }

    def _has(self, measure: str) -> bool:
        return bool(self.layers) and getattr(self.layers[0].alone, measure) is not None

    @property
    def _header(self) -> tuple[str, ...]:
        agreement = ("agreement",) if self._has("agreement") else ()
        loss = ("loss",) if self._has("loss") else ()
        return (*_HEADER[:4], *agreement, *loss, *_HEADER[4:])

    def _row(self, layer: LayerSensitivity) -> tuple[str, ...]:
        split = layer.split
        return (
            layer.name or "(the model)",
            layer.kind,
            str(layer.bits),
            *_measured(layer.alone, layer.all_but, self.quantized[layer.bits]),
            *(f"{part:.1e}" if part else "0" for part in (split.weight, split.clipped, split.rounded)),
        )

    def _activation_row(self, activation: ActivationSensitivity) -> tuple[str, ...]:
        measured = _measured(activation.alone, activation.all_but, self.prepared)
        return (activation.name or "(the model)", activation.role, str(activation.bits), *measured)

    @property
    def _notes(self) -> list[str]:
        notes = [] if self.activations else ["alone: the weight, on inputs in float"]
        notes.append(f"everything as prepared: {_in_words(self.prepared)}")
        notes += [f"everything at {bits} bits: {_in_words(measure)}" for bits, measure in self.quantized.items()]
        if self.reference_loss is not None:
            notes.append(f"float: loss {self.reference_loss:.5g}")
        return notes

    @property
    def _tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        header = self._header
        tables = [(header, list(map(self._row, self.layers)))]
        if self.activations:
            of_activations = ("activation", "role", *header[2 : -len(_PARTS)])
            tables.append((of_activations, list(map(self._activation_row, self.activations))))
        return tables

    def __str__(self) -> str:
        tables = [text_table(header, rows, numbers=range(2, len(header))) for header, rows in self._tables]
        return "\n".join(["\n\n".join(tables), *self._notes])

    def _repr_html_(self) -> str:
        tables = [html_table(header, rows, numbers=range(2, len(header))) for header, rows in self._tables]
        return "".join(tables) + "".join(f"<p>{html.escape(note)}</p>" for note in self._notes)


def _measured(alone: Measure, all_but: Measure, everything: Measure) -> tuple[str, ...]:
    """The columns of what was measured."""
    agreement = () if alone.agreement is None else (f"{alone.agreement:.4f}",)
    loss = () if alone.loss is None else (f"{alone.loss:.5g}",)
    gain = all_but.snr - everything.snr
    return (f"{alone.snr:.1f}", *agreement, *loss, f"{all_but.snr:.1f}", f"{gain:+.1f}")


def _in_words(measure: Measure) -> str:
    parts = [f"{measure.snr:.1f} dB"]
    if measure.agreement is not None:
        parts.append(f"agreement {measure.agreement:.4f}")
    if measure.loss is not None:
        parts.append(f"loss {measure.loss:.5g}")
    return ", ".join(parts)
