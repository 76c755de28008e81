"""The study: pretrained networks at several widths by this library's methods and by others', on the same data.

    python benchmarks/pretrained.py --list
    python benchmarks/pretrained.py --network crepe pnet --width W8A8 --method minmax "QAT learned"
    python benchmarks/pretrained.py --table

Every run is a line of ``.study/results.jsonl`` as soon as it is done, and is not run again: an interrupted study goes
on where it stopped. What the packages ship is all that it needs (``benchmarks/pretrained/requirements.txt``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from columns import ColumnsByKind
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pretrained import STUDIES, study
from benchmarks.pretrained.methods import OURS, Method, Width
from benchmarks.pretrained.peers import PEERS
from benchmarks.pretrained.recipes import RECIPES
from benchmarks.pretrained.runs import FLOAT, Result, Run, append, execute, read
from benchmarks.pretrained.summary import rows

METHODS: dict[str, Method] = {**RECIPES, **PEERS}
WIDTHS = {str(width): width for width in (Width(8, 8), Width(4, 8), Width(4, 4), Width(3, 3), Width(2, 2))}
ONLY_DIGITS = ("W3A3", "W2A2")


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """The runs that were asked for, those of one network and library together."""
    for network in options.network:
        own = study(network)
        seeds = range(options.seeds or (5 if network == "digits" else 3))
        splits = seeds if network == "digits" else range(1)
        yield from (Run(network, FLOAT, FLOAT, seed, 0) for seed in splits)
        for name in options.method:
            trains = METHODS[name].trains
            budget = (own.training_seconds if options.budget_seconds is None else options.budget_seconds) * trains
            for width in options.width:
                if width not in ONLY_DIGITS or network == "digits":
                    yield from (Run(network, width, name, seed, budget) for seed in (seeds if trains else splits))


def execute_all(runs: Sequence[Run], threads: int, console: Console) -> None:
    """Runs one after the other, and keeps every result."""
    columns = SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    executor, place = None, None
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=len(runs))
            for run in runs:
                progress.update(bar, description=str(run))
                method = METHODS.get(run.method)
                library = method.library if method else OURS
                if (run.network, library) != place:
                    # Some libraries patch PyTorch, and some crash: each network and library has its own process.
                    if executor is not None:
                        executor.shutdown()
                    executor = ProcessPoolExecutor(1, get_context("spawn"))
                    place = run.network, library
                assert executor is not None
                try:
                    result = executor.submit(execute, run, WIDTHS.get(run.width), method, threads).result()
                except BrokenProcessPool:
                    result, place = Result(run, library, failure="its process died"), None
                append(result)
                progress.console.print(f"{run}: {result.failure or result.metrics}")
                progress.advance(bar)
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)


def print_tables(results: Iterable[Result], console: Console) -> None:
    """A table for each network."""
    tables: dict[str, Table] = {}
    for row in rows(results):
        if row.network not in tables:
            own = study(row.network)
            tables[row.network] = Table("width", "method", *own.metrics, "", title=own.title)
        blanks = [""] * (len(study(row.network).metrics) - len(row.figures))
        tables[row.network].add_row(row.width, row.method, *row.figures, *blanks, row.remarks)
    for table in tables.values():
        console.print(table)


def write(results: Iterable[Result]) -> None:
    """The section of RESULTS.md, with a column for this kind of processor."""
    section = ColumnsByKind("pretrained", ("network", "width", "method", "library"))
    for row in rows(results):
        cell = f"{' / '.join(row.figures)}{' (' if row.figures else ''}{row.remarks}{')' if row.figures else ''}"
        section.set((study(row.network).title, row.width, row.method, row.library), cell.replace("|", "/"))
    networks = (f"- {study(name).title}: {' / '.join(study(name).metrics)}" for name in STUDIES)
    section.write(
        "Pretrained networks",
        (
            "`make study`: networks with weights from packages, or trained here once, quantized by each method from the",
            "same calibration batches, and trained for the same processor time by the same loss (distillation from the",
            "float network). Data to train, to calibrate and to test on are apart. A cell gives the metrics of its",
            "network, mean and standard deviation over seeds:",
            "",
            *networks,
        ),
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(STUDIES), default=list(STUDIES), metavar="NAME")
    parser.add_argument("--width", nargs="+", choices=list(WIDTHS), default=list(WIDTHS), metavar="WxAy")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, help="how many for methods that train (default 3, of digits 5)")
    parser.add_argument("--budget-seconds", type=float, help="of processor time to train (default: the network's own)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--again", action="store_true", help="run what has been run already")
    parser.add_argument("--list", action="store_true", help="only say what there is, and which runs are left")
    parser.add_argument("--table", action="store_true", help="only show the results that there are")
    parser.add_argument("--write", action="store_true", help="then write the section of RESULTS.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The study."""
    options = parse_options(arguments)
    console = Console()
    runs = list(planned(options))
    results = read()
    left = [run for run in runs if options.again or run not in results]
    if options.list:
        console.print(f"networks: {', '.join(STUDIES)}\nwidths: {', '.join(WIDTHS)}")
        for name, method in METHODS.items():
            console.print(f"  {name} ({method.library}{', trains' if method.trains else ''})")
        console.print(f"{len(runs) - len(left)} runs are done, {len(left)} are left")
        return
    if not options.table:
        execute_all(left, options.threads, console)
        results = read()
    chosen = [results[run] for run in runs if run in results]
    print_tables(chosen, console)
    if options.write:
        write(chosen)


if __name__ == "__main__":
    main()
