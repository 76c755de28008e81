"""Accuracy of the digits demo over five seeds, at 8 bits and at 4 bits with learned scales.

Every seed has its own split, its own float model, and from that one float model both quantizations. One seed moves by
a few tenths of a point with a handful of images, so only the means say anything.

    python benchmarks/digits_accuracy.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from results_file import environment, write_section
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits
from digits_checks import count_mismatches
from digits_report import TrainingMonitor
from mlframework.quantization import convert
from mlframework.quantization.kernels import reference_kernels

SEEDS = range(5)
SETTINGS = {"8 bits": (8, False), "4 bits, learned scales": (4, True)}
QAT_EPOCHS = 10


class Accuracies(NamedTuple):
    """Test accuracies of one seed and setting, in percent, and the integer codes that differed. ``by_reference`` is
    true int8 after the same training with PyTorch's operations in the place of the compiled kernels."""

    float_model: float
    post_training: float
    simulated: float
    int8: float
    mismatched_codes: int
    by_reference: float


def measure(
    model: digits.DigitsNet, data: digits.DigitsData, bits: int, learnable: bool, seed: int, monitor: TrainingMonitor
) -> Accuracies:
    """Quantizes one float model after training and with training."""
    prepared = digits.prepare_and_calibrate(model, data, bits, learnable)
    post_training = convert(prepared)
    digits.train_quantized(prepared, data, bits, QAT_EPOCHS, seed, monitor)
    int8_model = convert(prepared)
    comparison = count_mismatches(prepared, int8_model, int8_model, data.test_images)
    with reference_kernels():
        by_reference = digits.prepare_and_calibrate(model, data, bits, learnable)
        digits.train_quantized(by_reference, data, bits, QAT_EPOCHS, seed, monitor)
    return Accuracies(
        digits.test_accuracy(model, data),
        digits.test_accuracy(post_training, data),
        digits.accuracy(prepared, data.test_images, data.test_labels),
        digits.test_accuracy(int8_model, data),
        comparison.mismatched_codes,
        digits.test_accuracy(convert(by_reference), data),
    )


def rows_of(results: Sequence[Accuracies]) -> list[str]:
    """A Markdown table of the seeds and their mean."""
    lines = [
        "| seed | float | post-training int8 | QAT simulated | true int8 | without kernels | codes that differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, result in zip(SEEDS, results, strict=True):
        cells = [f"{percent:.2f}" for percent in (*result[:4], result.by_reference)]
        lines.append(f"| {seed} | {' | '.join(cells)} | {result.mismatched_codes} |")
    columns = list(zip(*results, strict=True))
    means = [f"**{statistics.mean(column):.2f}**" for column in (*columns[:4], columns[-1])]
    total = sum(result.mismatched_codes for result in results)
    lines.append(f"| mean | {' | '.join(means)} | {total} |")
    return lines


def section_of(results: dict[str, list[Accuracies]]) -> str:
    """The section of the results file."""
    lines = [
        "## Accuracy on digits",
        "",
        "`python benchmarks/digits_accuracy.py`: scikit-learn's digits, 50/50 split, test accuracy in percent of 899",
        f"images (one image is 0.11 points). {digits.FLOAT_EPOCHS} epochs of float training, then {QAT_EPOCHS} of QAT",
        "from that float model, which therefore has trained less than the quantized ones beside it. No model was",
        "chosen by its test accuracy; learning rates were set on other seeds. Without kernels: trained the same with",
        "PyTorch's operations alone (`kernels.reference_kernels()`), converted to true int8.",
        environment(),
    ]
    for name, rows in results.items():
        lines += ["", f"### {name}", "", *rows_of(rows)]
    return "\n".join(lines)


def main() -> None:
    """Trains all of them and writes the section."""
    torch.set_num_threads(1)
    monitor = TrainingMonitor(Console())
    results: dict[str, list[Accuracies]] = {name: [] for name in SETTINGS}
    for seed in SEEDS:
        data = digits.load_data(seed)
        model = digits.train_float(data, seed, monitor)
        for name, (bits, learnable) in SETTINGS.items():
            results[name].append(measure(model, data, bits, learnable, seed, monitor))
    section = section_of(results)
    write_section("digits-accuracy", section)
    monitor.say(section)


if __name__ == "__main__":
    main()
