"""Which runs there are, and running them one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import study
from .fingerprints import fingerprint
from .methods import OURS, Method, Width
from .peers import PEERS
from .recipes import RECIPES
from .runs import FLOAT, Result, Run, append, execute

METHODS: dict[str, Method] = {**RECIPES, **PEERS}
WIDTHS = {str(width): width for width in (Width(8, 8), Width(4, 8), Width(4, 4), Width(3, 3), Width(2, 2))}
ONLY_DIGITS = ("W3A3", "W2A2")


def planned(
    networks: Sequence[str],
    widths: Sequence[str],
    methods: Sequence[str],
    seeds: int | None = None,
    budget_seconds: float | None = None,
) -> Iterator[Run]:
    """The runs of these networks, widths and methods, those of one network and library together.

    Args:
        networks: of ``STUDIES``.
        widths: of ``WIDTHS``.
        methods: of ``METHODS``.
        seeds: how many of what trains; by default three, and five of the digits, which have a split for each.
        budget_seconds: of what trains; the network's own by default.
    """
    for network in networks:
        own = study(network)
        all_seeds = range(seeds or (5 if network == "digits" else 3))
        splits = all_seeds if network == "digits" else range(1)
        yield from (Run(network, FLOAT, FLOAT, seed, 0) for seed in splits)
        for name in methods:
            trains = METHODS[name].trains
            budget = (own.training_seconds if budget_seconds is None else budget_seconds) * trains
            for width in own.trained_widths if trains else WIDTHS:
                if width in widths and (width not in ONLY_DIGITS or network == "digits"):
                    yield from (Run(network, width, name, seed, budget) for seed in (all_seeds if trains else splits))


def is_current(run: Run, results: Mapping[Run, Result]) -> bool:
    """Whether there is a result of a run that need not be made again."""
    return run in results and results[run].is_final(fingerprint(run.network, METHODS.get(run.method)))


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
                library = method.package if method else OURS
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
