"""The layers of a page: what was prepared and what was measured, side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...preparation.report import ReportEntry
from ..explanation import LayerExplanation
from .collect import ReportData


@dataclass(frozen=True)
class Row:
    """One layer or operation: its account, and what was measured of it; ``name`` is that in the prepared model."""

    name: str
    entry: ReportEntry
    measured: LayerExplanation | None

    @property
    def kind(self) -> str:
        """What it is."""
        return self.entry.kind

    @property
    def is_integer(self) -> bool:
        """Whether it computes on integers."""
        return self.entry.quantized


def rows_of(data: ReportData) -> list[Row]:
    """In the order of the graph; what was measured of modules without an entry comes last."""
    measured = {layer.name: layer for layer in data.explanation.layers}
    rows = []
    for entry in data.preparation.entries:
        own = (name for name, layer in measured.items() if _is_of(entry, layer))
        name = entry.name if entry.name in measured else next(own, entry.name)
        rows.append(Row(name, entry, measured.pop(name, None)))
    for name, layer in measured.items():
        rows.append(Row(name, ReportEntry(name, layer.kind, layer.kind != "fake quantize", ""), layer))
    return rows


def _is_of(entry: ReportEntry, layer: LayerExplanation) -> bool:
    """Whether a module of the prepared model is what an entry tells of: its name with another number, or the node of
    its output; or what stands for the function that a module's code calls as a layer."""
    has_grid = entry.quantized or ", read as " in entry.detail
    base = re.sub(r"_\d+$", "", entry.name)
    if has_grid and re.fullmatch(rf"{re.escape(base)}(_\d+)?(_fake_quantize(_\d+)?)?", layer.name):
        return True
    owner, _, _ = layer.name.rpartition(".")
    return entry.quantized and owner == entry.name and layer.kind == entry.kind
