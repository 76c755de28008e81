"""What files for devices are measured on, and the table of it."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from results_file import write_section
from rich.console import Console
from rich.progress import track
from timing import Timing
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zoo import FULL_SIZE, UNet, roughen_batch_norms

OURS, FLOAT = "ours", "float32"
CALIBRATION_BATCHES, CALIBRATION_BATCH = 4, 8


class DepthwiseSeparableAudio(nn.Sequential):
    """Keyword spotting on raw sound (N, 1, 16000): depthwise-separable convolutions in one dimension, the shape of
    DS-CNN (Zhang et al. 2017, arXiv:1711.07128)."""

    def __init__(self, width: int = 64, blocks: int = 4, classes: int = 12) -> None:
        def after(layer: nn.Module) -> list[nn.Module]:
            return [layer, nn.BatchNorm1d(width), nn.ReLU()]

        layers = after(nn.Conv1d(1, width, 80, stride=16, padding=40, bias=False))
        for _ in range(blocks):
            layers += after(nn.Conv1d(width, width, 9, stride=2, padding=4, groups=width, bias=False))
            layers += after(nn.Conv1d(width, width, 1, bias=False))
        super().__init__(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, classes))


class Case(NamedTuple):
    """A network, and its input without the batch."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def batch(self, size: int, seed: int) -> Tensor:
        """Smooth noise of the same for the same seed, of both signs."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size, *self.shape, generator=generator)


CASES = {
    "mobilenet_v2": Case("MobileNetV2, 224x224", FULL_SIZE["mobilenet_v2"].constructor, (3, 224, 224)),
    "resnet20": Case("ResNet-20, 32x32", FULL_SIZE["resnet20"].constructor, (3, 32, 32)),
    "unet": Case("U-Net of width 16, 64x64", lambda: UNet(width=16, depth=3, classes=3), (3, 64, 64)),
    "mlp": Case("MLP, 3x32x32", FULL_SIZE["mlp"].constructor, (3, 32, 32)),
    "audio": Case("depthwise-separable network, 1 s of sound", DepthwiseSeparableAudio, (1, 16000)),
}


class Result(NamedTuple):
    """What was found of one network."""

    inputs: int
    codes: int
    differing: int
    steps: float
    times: dict[str, Timing]
    bytes: dict[str, int]


def differing_codes(
    case: Case, converted: nn.Module, run: Callable[[Tensor], Tensor], inputs: int
) -> tuple[int, int, float]:
    """Of the results for so many inputs, one at a time: how many codes, how many of them differ, by how many steps."""
    codes = differing = 0
    largest = 0.0
    with torch.no_grad():
        step = float(torch.unique(converted(case.batch(8, 99))).diff().min())
        for seed in track(range(inputs), f"{case.title}: codes"):
            x = case.batch(1, 1000 + seed)
            difference = (run(x) - converted(x)).abs()
            codes += difference.numel()
            differing += int((difference > 0).sum())
            largest = max(largest, float(difference.max()))
    return codes, differing, largest / step


def network_of(case: Case) -> nn.Module:
    """Random weights, with batch norms whose statistics are those of its data."""
    torch.manual_seed(0)
    model = case.make()
    roughen_batch_norms(model)
    with torch.no_grad():
        for seed in range(3):
            model.train()(case.batch(CALIBRATION_BATCH, seed))
    return model.eval()


def table(results: dict[str, Result], others: Sequence[str]) -> list[str]:
    """Lines of Markdown: ours, and the time against others."""
    lines = [
        "| network | inputs | output codes | differ | ms, ours | "
        + " | ".join(f"{other} (ours / it)" for other in others)
        + " | kB |",
        "|---" * (6 + len(others)) + "|",
    ]
    for name, result in results.items():
        times = {contender: timing.median for contender, timing in result.times.items()}
        found = f"{result.differing}" + (f", by {result.steps:.0f} step" if result.differing else "")
        lines.append(
            f"| {CASES[name].title} | {result.inputs:,} | {result.codes:,} | {found} | {times[OURS]:.2f} | "
            + " | ".join(
                f"{times[other]:.2f} ({times[OURS] / times[other]:.2f})" if other in times else "does not convert"
                for other in others
            )
            + f" | {result.bytes[OURS] // 1000:,} of {result.bytes[FLOAT] // 1000:,} |"
        )
    return lines


def run_benchmark(
    description: str | None,
    measure: Callable[[Case, int, int], Result],
    others: Sequence[str],
    section: Callable[[int], Sequence[str]],
    name: str,
    arguments: Sequence[str] | None,
) -> None:
    """A benchmark of one engine's files, from its command line.

    Args:
        description: for its help.
        measure: a network, how many inputs, and how many rounds.
        others: the contenders beside ours.
        section: the heading and what is said before the table, for a number of rounds.
        name: of its section in RESULTS.md.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = {network: measure(CASES[network], options.inputs, options.rounds) for network in options.networks}
    lines = table(results, others)
    Console().print("\n".join(lines), soft_wrap=True)
    if options.write:
        heading, *said = section(options.rounds)
        write_section(name, "\n".join((f"## {heading}", "", *said, "", *lines)))
