"""Contenders timed in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

ROUNDS = 9
BLOCK_SECONDS = 0.25
BLOCK_CALLS = 5
# What other libraries' threads need to notice that their turn is over and go to sleep.
PAUSE_SECONDS = 0.05


class Timing(NamedTuple):
    """Milliseconds of one call: of the medians of all rounds the median, the smallest and the largest."""

    median: float
    smallest: float
    largest: float


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    block_seconds: float = BLOCK_SECONDS,
    block_calls: int = BLOCK_CALLS,
) -> dict[str, Timing]:
    """Every round gives each contender a block of calls, so that what the machine does meanwhile falls on all alike.

    A block takes at least so many seconds and so many calls; the first ones warm caches and threads up again and do
    not count.
    """
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(PAUSE_SECONDS)
            medians[name].append(_block(call, block_seconds, block_calls))
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in medians.items()}


def _block(call: Callable[[], object], seconds: float, calls: int) -> float:
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < calls or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    warm = times[len(times) // 5 :]
    return statistics.median(warm) * 1000
