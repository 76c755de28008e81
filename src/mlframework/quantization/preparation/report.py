"""What was quantized, what stayed float, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

NEVER_REACHED = "the forward never reaches it"


@dataclass(frozen=True)
class ReportEntry:
    """One layer or operation: its qualified name, its kind, whether it computes on integers, and how (or why not).

    An operation that computes in float may still have its output on a grid, for the layers that read it.
    """

    name: str
    kind: str
    quantized: bool
    detail: str


@dataclass(frozen=True)
class PreparationReport:
    """The account that :func:`prepare` gives of a model; ``str()`` is a table.

    Attributes:
        entries: layers and operations, in the order of the graph.
        target: the engine that the model was prepared for.
    """

    entries: tuple[ReportEntry, ...]
    target: str

    @property
    def quantized(self) -> tuple[ReportEntry, ...]:
        """What computes on integers after conversion."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def left_float(self) -> tuple[ReportEntry, ...]:
        """What stays float, with the reason."""
        return tuple(entry for entry in self.entries if not entry.quantized)

    def __str__(self) -> str:
        header = ReportEntry("name", "kind", True, "how, or why not")
        rows = [("", header), *(("int8" if entry.quantized else "float", entry) for entry in self.entries)]
        widths = [max(len(entry.name) for _, entry in rows), max(len(entry.kind) for _, entry in rows)]
        lines = [
            f"{entry.name:<{widths[0]}}  {entry.kind:<{widths[1]}}  {status:<5}  {entry.detail}".rstrip()
            for status, entry in rows
        ]
        lines.append(f"{len(self.quantized)} quantized, {len(self.left_float)} float")
        return "\n".join(lines)


def preparation_report(model: nn.Module) -> PreparationReport:
    """What :func:`prepare` quantized in that model and what it left float, and why.

    Raises:
        TypeError: the model was not made by :func:`prepare`.
    """
    report = getattr(model, "preparation_report", None)
    if not isinstance(report, PreparationReport):
        raise TypeError(f"model must be a prepared model, got {type(model).__name__}")
    return report
