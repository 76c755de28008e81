"""What ``reduce_range`` costs: digits over five seeds, and how far every network of the zoo moves from its float self.

python benchmarks/reduce_range.py
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from digits_accuracy import QAT_EPOCHS, SEEDS, TrainingMonitor, digits
from results_file import environment, write_section
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlframework.quantization import QATConfig, calibrate, convert, prepare
from zoo import NETWORKS, Network, logits_of, train_steps

CONFIGS = (QATConfig(), QATConfig(reduce_range=True))
ZOO_SEEDS, FLOAT_STEPS, CALIBRATION_BATCHES, EVALUATED = range(3), 100, 8, 512


def calibrated(model: nn.Module, config: QATConfig, batches: Sequence[tuple[Tensor, ...]]) -> nn.Module:
    """A prepared copy that has seen the batches."""
    prepared = prepare(copy.deepcopy(model), config, batches[0])
    calibrate(prepared, batches)
    return prepared


def digits_accuracies(seed: int, monitor: TrainingMonitor) -> list[float]:
    """Test accuracies in percent: float, then with either configuration after training and by QAT, all converted."""
    data = digits.load_data(seed)
    model = digits.train_float(data, seed, monitor)
    batches = [(images,) for images in torch.split(data.train_images, digits.BATCH_SIZE)]
    all_prepared = [calibrated(model, config, batches) for config in CONFIGS]
    accuracies = [digits.test_accuracy(model, data)]
    accuracies += [digits.test_accuracy(convert(prepared), data) for prepared in all_prepared]
    for prepared in all_prepared:
        digits.train_quantized(prepared, data, 8, QAT_EPOCHS, seed, monitor)
        accuracies.append(digits.test_accuracy(convert(prepared), data))
    return accuracies


def signal_to_noise(network: Network, seed: int) -> list[float]:
    """Decibels by which a float network's outputs exceed the error of the converted ones, for either configuration."""
    model = network.make(seed)
    train_steps(model, network, FLOAT_STEPS, seed)
    model.eval()
    batches = [network.example_inputs(32, seed=index) for index in range(CALIBRATION_BATCHES)]
    inputs = network.example_inputs(EVALUATED, seed=CALIBRATION_BATCHES)
    all_converted = [convert(calibrated(model, config, batches)) for config in CONFIGS]
    with torch.no_grad():
        expected, *outputs = [logits_of(each(*inputs)).double() for each in (model, *all_converted)]
    return [20 * math.log10(float(expected.norm() / (output - expected).norm())) for output in outputs]


def means(rows: Iterable[Sequence[float]]) -> list[float]:
    """The mean of every column."""
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def section_of(accuracies: list[list[float]], ratios: dict[str, list[float]]) -> str:
    """The section of the results file."""
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    lines = [
        "## Weights within 7 bits (`reduce_range`)",
        "",
        f"`python benchmarks/reduce_range.py`. {environment()} Processor {vnni} VNNI.",
        "",
        "Digits, trained and split as for [accuracy on digits](#accuracy-on-digits): test accuracy in percent,",
        "converted to true int8 but for the float model.",
        "",
        "| seed | float | post-training | post-training, `reduce_range` | QAT | QAT, `reduce_range` |",
        "|---|---|---|---|---|---|",
    ]
    for seed, row in zip(SEEDS, accuracies, strict=True):
        lines.append(f"| {seed} | {' | '.join(f'{percent:.2f}' for percent in row)} |")
    lines.append(f"| mean | {' | '.join(f'**{percent:.2f}**' for percent in means(accuracies))} |")
    lines += [
        "",
        f"The test networks of `zoo/` after {FLOAT_STEPS} steps of float training, calibrated on {CALIBRATION_BATCHES}",
        "batches of 32 and converted without further training: ratio of the float outputs to the error of the",
        f"converted ones (norms over {EVALUATED} unseen inputs) in decibels, mean of {len(ZOO_SEEDS)} seeds.",
        "Six decibels are a factor of two in the error.",
        "",
        "| network | 8-bit weights | `reduce_range` | difference |",
        "|---|---|---|---|",
    ]
    for name, (full, reduced) in ratios.items():
        lines.append(f"| {name} | {full:.1f} | {reduced:.1f} | {reduced - full:.1f} |")
    full, reduced = means(ratios.values())
    lines.append(f"| mean | **{full:.1f}** | **{reduced:.1f}** | **{reduced - full:.1f}** |")
    return "\n".join(lines)


def main() -> None:
    """Measures everything and writes the section."""
    torch.set_num_threads(1)
    monitor = TrainingMonitor(Console())
    accuracies = [digits_accuracies(seed, monitor) for seed in SEEDS]
    ratios = {}
    for name, network in NETWORKS.items():
        ratios[name] = means(signal_to_noise(network, seed) for seed in ZOO_SEEDS)
        monitor.say(f"{name}: {', '.join(f'{ratio:.1f} dB' for ratio in ratios[name])}")
    section = section_of(accuracies, ratios)
    write_section("reduce-range", section)
    monitor.say(section)


if __name__ == "__main__":
    main()
