"""The command's own commands, which print tables and end with 1 where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..export.encodings import check_version
from ..export.export_encodings import encodings_path, write_encodings
from ..export.file import check_writable
from ..verification.compare import VerificationError
from .comparison import compared
from .demo import demonstration
from .files import arrays_in, loaded
from .inspection import inspected
from .tables import facts_of_inspection, table_of, table_of_comparison, tables_of_inspection

app = typer.Typer(
    help="Quantized ONNX files: what is in them, how they compare, and their encodings.",
    no_args_is_help=True,
    add_completion=False,
)

_WIDTH = 160

_ModelPath = Annotated[
    Path, typer.Argument(help="An ONNX file with quantize and dequantize nodes.", show_default=False)
]


@app.command("inspect")
def inspect_(model: _ModelPath) -> None:
    """Show layers with their grids, what stayed float, and the size of a file."""
    with _errors_in_words():
        inspection = inspected(model)
    console = _console()
    for table in tables_of_inspection(inspection):
        console.print(table)
    for line in facts_of_inspection(inspection):
        console.print(line, highlight=False, markup=False)


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="The float ONNX file.", show_default=False)],
    quantized: Annotated[Path, typer.Argument(help="The quantized ONNX file.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="An .npz file with an array for each input, by its name; or in the order of the inputs.",
            show_default=False,
        ),
    ],
) -> None:
    """Run two files in ONNX Runtime on the same data and compare what they return.

    Classes are along the last axis of outputs with three axes, and along the second of others.
    """
    with _errors_in_words():
        comparisons = compared(reference, quantized, arrays_in(data))
    _console().print(table_of_comparison(comparisons))


@app.command()
def encodings(
    model: _ModelPath,
    output: Annotated[
        Path | None,
        typer.Option(help="The float ONNX file to write; by default with _float in its name.", show_default=False),
    ] = None,
    version: Annotated[str, typer.Option(help="Of the format of encodings: 1.0.0 or 2.0.0.")] = "1.0.0",
) -> None:
    """Write a file's float form, and AIMET's encodings of its tensors beside it."""
    with _errors_in_words():
        check_version(version)
        path = model.with_name(f"{model.stem}_float.onnx") if output is None else output
        beside = encodings_path(path)
        check_writable(path)
        check_writable(beside)
        write_encodings(loaded(model), path, version)
    _console().print(f"wrote {path} and {beside}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo() -> None:
    """Train, quantize, export and verify a small network on handwritten digits."""
    with _errors_in_words():
        steps = demonstration()
    rows = [(step.name, step.result, f"{step.seconds:.1f} s") for step in steps]
    _console().print(table_of("Handwritten digits", ("step", "result", "time"), rows, numbers=(2,)))


def _console() -> Console:
    """As wide as the terminal; in a file or a pipe, wide enough for a table."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """Ends the command with 1 and a message, without a traceback, where the input is at fault."""
    try:
        yield
    except (VerificationError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
