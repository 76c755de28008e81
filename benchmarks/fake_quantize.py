"""The fake-quantize operator, forward and forward with backward, against ATen, torch.ao, Brevitas and ``x * 2``.

The contenders take turns in one process; every call makes new tensors. A run of everything writes its section of
RESULTS.md and docs/fake_quantize.png; a part is only printed.

    pip install -e ".[bench]"
    python benchmarks/fake_quantize.py [--kinds fixed learned] [--sizes 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from typing import NamedTuple

import torch
from fake_quantizers import (
    ATEN,
    DOUBLE,
    KINDS,
    OURS,
    OURS_LAYER,
    SCALED,
    TORCH_AO,
    TORCH_AO_FUSED,
    TORCH_AO_LEARNABLE,
    Quantizer,
    quantizers,
)
from plots import draw_operator
from results_file import environment, write_section
from rich.console import Console
from rich.progress import track
from timing import Timing, time_in_turns
from torch import Tensor

THREADS = 2
ROUNDS = 7
BLOCK_SECONDS, BLOCK_CALLS = 0.05, 2
# Elements, and channels where each has a scale.
CHANNELS = {1_000: 10, 10_000: 20, 100_000: 50, 2**21: 128, 2**24: 256}
LARGE, SMALL = 2**21, 1_000
FORWARD, BACKWARD = "forward", "forward + backward"


class Case(NamedTuple):
    """One race: what kind of scale, one or one a channel, how far, and over how many elements."""

    kind: str
    per_channel: bool
    mode: str
    size: int

    @property
    def title(self) -> str:
        return f"{self.kind}, {'per channel' if self.per_channel else 'per tensor'}"


Results = dict[Case, dict[str, Timing]]


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """What each contender does in its turns."""
    channels = CHANNELS[case.size]
    x = torch.randn(channels, case.size // channels, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    contenders = quantizers(case.kind, x, case.per_channel)
    x.requires_grad_()
    make = _forward if case.mode == FORWARD else _backward
    return {name: make(contender, x, gradient) for name, contender in contenders.items()}


def _forward(quantizer: Quantizer, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    return lambda: quantizer.function(x)


def _backward(quantizer: Quantizer, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(quantizer.function(x), (x, *quantizer.learned), gradient)


def tables(results: Results) -> Iterator[str]:
    """A table for each mode: milliseconds, and how many times ``x * 2``."""
    sizes = list(dict.fromkeys(case.size for case in results))
    for mode in (FORWARD, BACKWARD):
        yield from ("", f"| {mode}, ms (times `x * 2`) | {' | '.join(f'{size:,}' for size in sizes)} |")
        yield f"|---|{'---|' * len(sizes)}"
        races = [case for case in results if case.mode == mode and case.size == sizes[0]]
        for race in races:
            timings = [results[race._replace(size=size)] for size in sizes]
            for name in timings[0]:
                if name in (DOUBLE, SCALED) and race != races[0]:
                    continue
                cells = [f"{of[name].median:.3g} ({of[name].median / of[DOUBLE].median:.2f})" for of in timings]
                row = name if name in (DOUBLE, SCALED) else f"{race.title}: {name}"
                yield f"| {row} | {' | '.join(cells)} |"


def targets(results: Results) -> Iterator[str]:
    """The ratios that matter most, in one table."""
    yield from ("", "| ratio of times | per tensor | per channel |", "|---|---|---|")
    ratios = [
        (f"{OURS} / {SCALED}, {LARGE:,}", "fixed", LARGE, BACKWARD, OURS, SCALED),
        (f"{OURS_LAYER}, moving average / {SCALED}, {LARGE:,}", "moving average", LARGE, BACKWARD, OURS_LAYER, SCALED),
        (f"{OURS_LAYER}, learned / {SCALED}, {LARGE:,}", "learned", LARGE, BACKWARD, OURS_LAYER, SCALED),
        (f"ATen fixed / ours, {LARGE:,}, forward", "fixed", LARGE, FORWARD, ATEN, OURS),
        (f"ATen fixed / ours, {LARGE:,}", "fixed", LARGE, BACKWARD, ATEN, OURS),
        (f"ATen learnable / ours, {LARGE:,}", "learned", LARGE, BACKWARD, ATEN, OURS_LAYER),
        (f"our module / torch.ao's, fixed, {SMALL:,}", "fixed", SMALL, BACKWARD, OURS_LAYER, TORCH_AO),
        (f"our module / torch.ao's, {SMALL:,}", "moving average", SMALL, BACKWARD, OURS_LAYER, TORCH_AO),
        (f"our module / torch.ao's fused, {SMALL:,}", "moving average", SMALL, BACKWARD, OURS_LAYER, TORCH_AO_FUSED),
        (f"our module / torch.ao's learnable, {SMALL:,}", "learned", SMALL, BACKWARD, OURS_LAYER, TORCH_AO_LEARNABLE),
    ]
    for title, kind, size, mode, one, other in ratios:
        races = [results.get(Case(kind, per_channel, mode, size)) for per_channel in (False, True)]
        if None in races:
            continue
        cells = [f"{race[one].median / race[other].median:.2f}" for race in races if race is not None]
        yield f"| {title} | {' | '.join(cells)} |"


def section(results: Results, rounds: int) -> str:
    """What goes into RESULTS.md."""
    lines = [
        "## The fake-quantize operator",
        "",
        "`python benchmarks/fake_quantize.py`: float32 values onto a signed affine 8-bit grid, the input requiring a",
        f"gradient. Medians of {rounds} rounds taken in turn; every call makes new tensors. Ratios are with backward",
        f"unless they say otherwise. {environment()}",
        f"Brevitas {version('brevitas')} with its compiled quantizers, whose learned grid is symmetric.",
        "",
        "![Time per element over the number of elements](../docs/fake_quantize.png)",
    ]
    return "\n".join([*lines, *targets(results), *tables(results)])


def main() -> None:
    """Times what was asked for, prints it, and writes it where it is everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=list(CHANNELS), default=list(CHANNELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    console = Console()
    cases = [Case(*case) for case in product(arguments.kinds, (False, True), (FORWARD, BACKWARD), arguments.sizes)]
    results: Results = {}
    for case in track(cases, "fake_quantize", console=console):
        results[case] = time_in_turns(calls(case), arguments.rounds, BLOCK_SECONDS, BLOCK_CALLS)
    text = section(results, arguments.rounds)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if arguments.kinds == list(KINDS) and arguments.sizes == list(CHANNELS):
        draw_operator(results)
        write_section("fake-quantize", text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the peers' dependencies
    main()
