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
    """The best row of one side; ``wins`` where the other side has one that is not better by more than a tie."""

    row: Row
    is_ours: bool
    wins: bool


def best_of(rows: Iterable[Row]) -> Iterator[Best]:
    """For every network and width, this library's best row and then the others' best; either may be missing."""
    candidates = [row for row in rows if row.means and math.isfinite(row.means[0]) and row.width != "float"]
    for _, group in groupby(candidates, key=lambda row: (row.network, row.width)):
        same = list(group)
        sides = {
            True: [row for row in same if row.package.startswith(f"{OURS} ")],
            False: [row for row in same if not row.package.startswith(f"{OURS} ")],
        }
        best = {is_ours: _best(side) for is_ours, side in sides.items() if side}
        for is_ours, row in best.items():
            other = best.get(not is_ours)
            wins = other is not None and (_is_tie(row, other) or row.means[0] > other.means[0])
            yield Best(row, is_ours, wins)


def _best(rows: list[Row]) -> Row:
    """By the headline figure; of those that tie with the highest, by the signal-to-noise ratio."""
    highest = max(rows, key=lambda row: row.means[0])
    return max((row for row in rows if _is_tie(row, highest)), key=lambda row: row.means[-1])


def _is_tie(row: Row, other: Row) -> bool:
    return math.isclose(row.means[0], other.means[0], rel_tol=TIE)
