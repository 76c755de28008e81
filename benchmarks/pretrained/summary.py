"""Means and spreads over seeds, as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from . import STUDIES, study
from .runs import Result

ORDER = ("float", "W8A8", "W4A8", "W4A4", "W3A3", "W2A2")


class Row(NamedTuple):
    """A network at a width by one method, over the seeds that were run.

    ``means`` are of the study's metrics; ``figures`` show them, with the standard deviation
    of seeds that differ; ``runs`` are how many there were; ``share`` is that of integers, where it is known.
    """

    network: str
    width: str
    method: str
    package: str
    means: tuple[float, ...]
    figures: tuple[str, ...]
    remarks: str
    runs: int
    share: str = ""


def rows(results: Iterable[Result]) -> Iterator[Row]:
    """Rows by network and width, then in the order of the results."""
    grouped: dict[tuple[str, str, str, float], list[Result]] = {}
    for result in results:
        run = result.run
        grouped.setdefault((run.network, run.width, run.method, run.seconds), []).append(result)
    networks = list(STUDIES)
    for key in sorted(grouped, key=lambda key: (networks.index(key[0]), ORDER.index(key[1]))):
        network, width, method, seconds = key
        group = grouped[key]
        done = [result for result in group if not result.failure]
        metrics = study(network).metrics
        values = [[result.metrics[metric] for result in done] for metric in metrics if done]
        means, figures = tuple(map(statistics.mean, values)), tuple(map(_figure, values))
        share = _share(group)
        remarks = ", ".join(filter(None, [*_remarks(group, seconds), share]))
        yield Row(network, width, method, group[0].package, means, figures, remarks, len(done), share)


def _figure(values: list[float]) -> str:
    mean = statistics.mean(values)
    digits = 2 if abs(mean) > 10 else 4
    spread = statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else 0.0
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")


def _remarks(group: list[Result], seconds: float) -> Iterator[str]:
    failures = sorted({result.failure for result in group if result.failure})
    if failures:
        yield "no figure: " + "; ".join(failures)
    if len(group) > 1:
        yield f"{len(group)} seeds"
    if seconds:
        steps = [int(result.notes["steps"]) for result in group if "steps" in result.notes]
        yield f"{seconds:g} s" + (f", {min(steps)} steps or more" if steps else "")
    if any(result.exact is False for result in group):
        yield "prepared and converted differ"


def _share(group: list[Result]) -> str:
    shares = {result.integer_share for result in group if result.integer_share is not None}
    return f"{100 * min(shares):.1f}% in integers" if shares else ""
