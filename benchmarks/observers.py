"""What observing costs: every observer on two million values, against the minimum and maximum.

Run with ``python benchmarks/observers.py``. The contenders take turns in one process; medians and ratios are reported.
"""

from __future__ import annotations

import statistics
import time

import torch

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
    """Prints one line per observer."""
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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ELEMENTS:,} float32 values")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:<24} {median * 1e3:7.3f} ms  {median / reference:5.2f} of MinMaxObserver")


if __name__ == "__main__":
    main()
