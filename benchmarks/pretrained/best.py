"""Of all that was tried on a network at a width, the best of this library beside the best of any other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from .methods import OURS
from .summary import Row

TIE = 0.005  # of the headline figure: about what another draw of a few hundred test samples would change


class Best(NamedTuple):
    """The best row of one side; ``wins`` where the other side's is not better by more than a tie."""

    row: Row
    is_ours: bool
    wins: bool


def best_of(rows: Iterable[Row]) -> Iterator[Best]:
    """For every network and width, this library's best row and then the others' best, where both have one."""
    candidates = [row for row in rows if row.means and row.width != "float"]
    for _, group in groupby(candidates, key=lambda row: (row.network, row.width)):
        sides: dict[bool, Row] = {}
        for row in group:
            is_ours = row.package.startswith(f"{OURS} ")
            if is_ours not in sides or _rank(row) > _rank(sides[is_ours]):
                sides[is_ours] = row
        for is_ours in (True, False):
            if is_ours in sides:
                row, other = sides[is_ours], sides.get(not is_ours)
                yield Best(row, is_ours, other is None or not _is_better(other, row))


def _rank(row: Row) -> tuple[float, float]:
    """By the headline figure, and by the signal-to-noise ratio where that is the same."""
    return row.means[0], row.means[-1]


def _is_better(row: Row, other: Row) -> bool:
    difference = row.means[0] - other.means[0]
    return difference > 0 and not math.isclose(row.means[0], other.means[0], rel_tol=TIE)
