"""What was quantized, what stayed float, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..tables import html_table, text_table

NEVER_REACHED = "the forward never reaches it"
SKIPPED = "skipped by the configuration"
UNCALLED = "its weight is read without a call"
ALONE = "alone, between floats"


@dataclass(frozen=True)
class Share:
    """A part of a whole, both counted."""

    quantized: int
    total: int

    @property
    def fraction(self) -> float:
        """Between 0 and 1; all of nothing is 1."""
        return self.quantized / self.total if self.total else 1.0

    def __str__(self) -> str:
        return f"{self.fraction:.1%}"


@dataclass(frozen=True)
class ReportEntry:
    """One layer or operation: its qualified name, its kind, whether it computes on integers, and how (or why not).

    An operation that computes in float may still have its output on a grid, for the layers that read it.
    ``multiply_adds`` are those of the example, of layers and of modules that are run by their own code.
    """

    name: str
    kind: str
    quantized: bool
    detail: str
    multiply_adds: int = 0


@dataclass(frozen=True)
class PreparationReport:
    """The account that :func:`prepare` gives of a model; ``str()`` is a table.

    Attributes:
        entries: layers and operations, in the order of the graph.
        target: the engine that the model was prepared for.
        weights: how many elements of its weights are quantized, of all but those that the configuration skips.
        multiply_adds: how many of those that the model does on the example are of integers, of all but those that the
            configuration skips.
    """

    entries: tuple[ReportEntry, ...]
    target: str
    weights: Share
    multiply_adds: Share

    @property
    def quantized(self) -> tuple[ReportEntry, ...]:
        """What computes on integers after conversion."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def left_float(self) -> tuple[ReportEntry, ...]:
        """What stays float, with the reason."""
        return tuple(entry for entry in self.entries if not entry.quantized)

    @property
    def shares(self) -> str:
        """Both shares, in words."""
        return f"{self.weights} of the weights and {self.multiply_adds} of the multiply-adds"

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (entry.name, entry.kind, "int8" if entry.quantized else "float", entry.detail) for entry in self.entries
        ]

    @property
    def _summary(self) -> list[str]:
        skipped = any(entry.detail.startswith(SKIPPED) for entry in self.left_float)
        return [
            f"{len(self.quantized)} quantized, {len(self.left_float)} float",
            f"{self.shares} are quantized{', not counting what the configuration skips' if skipped else ''}",
        ]

    def __str__(self) -> str:
        return "\n".join([text_table(_HEADER, self._rows), *self._summary])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows, notes=self._summary)


_HEADER = ("name", "kind", "", "how, or why not")


def preparation_report(model: nn.Module) -> PreparationReport:
    """What :func:`prepare` quantized in that model and what it left float, and why.

    Raises:
        TypeError: the model was not made by :func:`prepare`.
    """
    report = getattr(model, "preparation_report", None)
    if not isinstance(report, PreparationReport):
        raise TypeError(f"model must be a prepared model, got {type(model).__name__}")
    return report
