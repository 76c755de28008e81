"""What observing costs: every observer on two million values, against the minimum and maximum.

The contenders take turns in one process; medians and ratios are reported.

    python benchmarks/observers.py
"""

from __future__ import annotations

import statistics
import time

import torch
from results_file import environment, write_section

from mlframework.quantization import (
    ActivationObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
)

ELEMENTS = 2_000_000
ROUNDS = 60


def main() -> None:
    """Times them all and writes the section."""
    torch.manual_seed(0)
    values = torch.randn(ELEMENTS)
    observers: list[ActivationObserver] = [
        MinMaxObserver(),
        MovingAverageObserver(),
        PercentileObserver(),
        HistogramObserver(),
    ]
    times: dict[str, list[float]] = {type(observer).__name__: [] for observer in observers}
    for round_number in range(ROUNDS + 5):
        for observer in observers:
            start = time.perf_counter()
            observer(values)
            elapsed = time.perf_counter() - start
            if round_number >= 5:
                times[type(observer).__name__].append(elapsed)
    reference = statistics.median(times["MinMaxObserver"])
    lines = [
        "## Cost of observing",
        "",
        f"`python benchmarks/observers.py`: one batch of {ELEMENTS:,} float32 values into the statistics, median of",
        f"{ROUNDS} rounds taken in turn. {environment()}",
        "",
        "| observer | ms | of `MinMaxObserver` |",
        "|---|---|---|",
    ]
    for name, measured in times.items():
        median = statistics.median(measured)
        lines.append(f"| `{name}` | {median * 1e3:.2f} | {median / reference:.2f} |")
    section = "\n".join(lines)
    write_section("observers", section)
    print(section)


if __name__ == "__main__":
    main()
