"""What the command prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from .comparison import OutputComparison
from .inspection import Inspection


def table_of(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> Table:
    """A table; columns of numbers are aligned to the right."""
    right = set(numbers)
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def tables_of_inspection(inspection: Inspection) -> list[Table]:
    """Layers, and other operations where there are any."""
    layers = [
        (
            layer.name,
            layer.operator,
            "integer" if layer.is_integer else "float",
            f"{layer.weights:,} {layer.weight_grid}" if layer.weights else "-",
            layer.input_grid or "-",
            layer.output_grid,
            f"{layer.multiply_adds:,}",
        )
        for layer in inspection.layers
    ]
    header = ("layer", "operator", "computes", "weights", "input", "output", "multiply-adds")
    tables = [table_of("Layers", header, layers, numbers=(6,))]
    if inspection.operations:
        rows = [(kind, str(integer), str(floats)) for kind, (integer, floats) in inspection.operations.items()]
        tables.append(table_of("Other operations", ("operator", "on codes", "on floats"), rows, numbers=(1, 2)))
    return tables


def facts_of_inspection(inspection: Inspection) -> list[str]:
    """What stayed float, how large the file is, and what it says of itself; a line each."""
    floats = [layer.name for layer in inspection.layers if not layer.is_integer]
    share = f"{inspection.float_multiply_adds:.1%} of the multiply-adds, {inspection.float_weights:.1%} of the weights"
    lines = [
        f"float: {', '.join(floats)} ({share})" if floats else "float: no layer",
        f"size: {_bytes(inspection.size)}; weights and biases as float32 would be {_bytes(inspection.float_size)}",
        f"opset {inspection.opset}, IR version {inspection.ir_version}, by {inspection.producer or 'an unknown one'}",
        f"target: {inspection.target or 'not noted'}",
    ]
    if inspection.sizes_of_one:
        lines.append(f"multiply-adds are of {', '.join(f'{size} = 1' for size in inspection.sizes_of_one)}")
    return lines


def table_of_comparison(comparisons: Iterable[OutputComparison]) -> Table:
    """A row for each output."""
    rows = [
        (
            each.name,
            "x".join(map(str, each.shape)),
            "no difference" if each.signal_to_noise == math.inf else f"{each.signal_to_noise:.1f} dB",
            f"{each.largest:.4g}",
            "-" if each.agreement is None else f"{each.agreement:.1%}",
        )
        for each in comparisons
    ]
    header = ("output", "shape", "signal to noise", "largest difference", "same largest class")
    return table_of("Outputs", header, rows, numbers=(2, 3, 4))


def _bytes(size: int) -> str:
    return (
        f"{size:,} bytes"
        if size < 10_000
        else f"{size / 1000:,.0f} kB"
        if size < 10_000_000
        else f"{size / 1e6:,.0f} MB"
    )
