"""The study: pretrained networks at several widths by this library's methods and by others', on the same data.

Every run is a line of ``benchmarks/pretrained/results.jsonl`` as soon as it is done, and is not run again until the
code that it rests on changes: an interrupted study goes on where it stopped. What the packages ship is all that it
needs (``benchmarks/pretrained/requirements.txt``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from . import STUDIES, study
from .best import TIE, best_of
from .execution import METHODS, WIDTHS, execute_all, is_current, planned
from .runs import Result, read
from .summary import rows


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
    from columns import ColumnsByKind  # of the benchmarks' folder, which is on the path where one of them is run

    section = ColumnsByKind("pretrained", ("network", "width", "method", "library"))
    every = list(rows(results))
    best = ColumnsByKind("pretrained-best", ("network", "width", "best of"))
    for row, is_ours, wins in best_of(every):
        remarks = f"{row.runs}, {row.share}" if row.share else str(row.runs)
        cell = f"{row.method}: {' / '.join(row.figures)} ({remarks})"
        side = (study(row.network).title, row.width, "this library" if is_ours else "others")
        best.set(side, f"**{cell}**" if wins else cell)
    best.write(
        "Pretrained networks: the best recipes",
        (
            "From the table that follows: for every network and width the best method of this library and the best of",
            f"any other, by the headline metric, and where that is within {TIE:.1%} by the signal-to-noise ratio. Bold",
            "is the better of the two by the headline metric; both, where it is within as much. In parentheses: runs,",
            "each with a seed of its own; and of this library how many of the multiply-adds are of integers.",
        ),
    )
    for row in every:
        cell = f"{' / '.join(row.figures)}{' (' if row.figures else ''}{row.remarks}{')' if row.figures else ''}"
        section.set((study(row.network).title, row.width, row.method, row.package), cell.replace("|", "/"))
    networks = (f"- {study(name).title}: {' / '.join(study(name).metrics)}" for name in STUDIES)
    section.write(
        "Pretrained networks",
        (
            "`make study`: networks with weights from packages, or trained here once, quantized by each method from",
            "the same calibration batches, and trained for the same processor time by distillation from the float",
            "network: by the task's own loss and learning rate, and the recommended recipe by its own. What is tested",
            "on is neither trained nor calibrated on. A cell gives the metrics of its network, mean and standard",
            "deviation over seeds:",
            "",
            *networks,
        ),
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(STUDIES), default=list(STUDIES), metavar="NAME")
    parser.add_argument("--width", nargs="+", choices=list(WIDTHS), default=list(WIDTHS), metavar="WxAy")
    installed = [name for name, method in METHODS.items() if method.version]
    parser.add_argument("--method", nargs="+", choices=installed, default=installed, metavar="NAME")
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
    runs = list(planned(options.network, options.width, options.method, options.seeds, options.budget_seconds))
    results = read()
    left = [run for run in runs if options.again or not is_current(run, results)]
    if options.list:
        console.print(f"networks: {', '.join(STUDIES)}\nwidths: {', '.join(WIDTHS)}")
        for name, method in METHODS.items():
            remarks = [method.package] + ["trains"] * method.trains + ["not installed"] * (method.version is None)
            console.print(f"  {name} ({', '.join(remarks)})")
        console.print(f"{len(runs) - len(left)} runs are done, {len(left)} are left")
        return
    if not options.table:
        execute_all(left, options.threads, console)
        results = read()
    chosen = [results[run] for run in runs if is_current(run, results)]
    outdated = sum(run in results for run in runs) - len(chosen)
    if outdated:
        console.print(f"{outdated} results are of other code than this, and are left out")
    print_tables(chosen, console)
    if options.write:
        write(chosen)
