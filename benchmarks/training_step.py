"""One training step, in time and memory, of this library and the others, against float32.

The contenders of a network take turns in one process; before, each shows in a process of its own that it runs, and
what memory its step takes. A run of everything writes its section of RESULTS.md and docs/training_step.png; a part is
only printed.

    pip install -e ".[bench]"
    python benchmarks/training_step.py [--networks resnet20] [--contenders float32 ours] [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from plots import draw_steps
from results_file import environment, write_section
from rich.console import Console
from rich.progress import Progress
from timing import Timing, time_in_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qat_peers import CONTENDERS, EAGER, FLOAT, set_up
from workloads import WORKLOADS, TrainingStep, reason

THREADS = 2
ROUNDS = 5
BLOCK_SECONDS, BLOCK_CALLS = 0.3, 1
# Compiling takes a minute a contender: what the others would show is left out.
COMPILED_NETWORKS = ("resnet20", "mlp")
MEMORY_SECONDS = 600
PEERS = ("torchao", "brevitas", "nncf")


class Memory(NamedTuple):
    """Bytes of one step: what is saved for backward, and the most that is held at a time."""

    saved: int
    peak: int


class Results:
    """What was measured, and why something was not."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, str], Memory] = {}
        self.times: dict[tuple[str, str], Timing] = {}
        self.failures: dict[tuple[str, str], str] = {}

    def ratios(self, network: str, contender: str) -> tuple[float, float, float] | None:
        """Time, bytes saved and peak of a contender, relative to float32; None where it did not run."""
        key, reference = (network, contender), (network, FLOAT)
        if key not in self.times:
            return None
        return (
            self.times[key].median / self.times[reference].median,
            self.memory[key].saved / self.memory[reference].saved,
            self.memory[key].peak / self.memory[reference].peak,
        )


def measure_memory(network: str, contender: str) -> Memory | str:
    """The memory of a step in a fresh process, or why there is none."""
    script = Path(__file__).with_name("step_memory.py")
    command = [sys.executable, "-W", "ignore", str(script), network, contender]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MEMORY_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        return f"no step within {MEMORY_SECONDS} seconds"
    except subprocess.CalledProcessError as error:
        return f"the process ended with {error.returncode}"
    result = json.loads(done.stdout.splitlines()[-1])
    return str(result["error"]) if "error" in result else Memory(**result)


def measure_times(network: str, contenders: list[str], rounds: int) -> tuple[dict[str, Timing], dict[str, str]]:
    """Steps of these contenders in turns; and why one does not run beside the others, where that is so."""
    workload = WORKLOADS[network]
    inputs, targets = workload.data()
    steps = {}
    failures = {}
    for contender in contenders:
        try:
            step = TrainingStep(set_up(contender, workload.model(), inputs), inputs, targets)
            for _ in range(3):  # statistics, momentum, compilation
                step()
            steps[contender] = step
        except Exception as error:
            failures[contender] = reason(error)
    timings = time_in_turns(steps, rounds, BLOCK_SECONDS, BLOCK_CALLS)
    del steps
    torch.compiler.reset()
    gc.collect()
    return timings, failures


def measure(networks: list[str], contenders: list[str], rounds: int, console: Console) -> Results:
    """Memory first, which tells what runs; then the times of what does."""
    results = Results()
    pairs = [
        (network, contender)
        for network in networks
        for contender in contenders
        if contender in EAGER or network in COMPILED_NETWORKS
    ]
    with Progress(console=console) as progress:
        bar = progress.add_task("memory", total=len(pairs))
        for pair in pairs:
            progress.update(bar, description=f"memory: {', '.join(pair)}")
            memory = measure_memory(*pair)
            if isinstance(memory, Memory):
                results.memory[pair] = memory
            else:
                results.failures[pair] = memory
                progress.console.print(f"{', '.join(pair)} does not run: {memory}", markup=False, soft_wrap=True)
            progress.advance(bar)
        bar = progress.add_task("time", total=len(networks))
        for network in networks:
            progress.update(bar, description=f"time: {network}")
            running = [contender for name, contender in results.memory if name == network]
            timings, failures = measure_times(network, running, rounds)
            results.times.update({(network, contender): timing for contender, timing in timings.items()})
            results.failures.update({(network, contender): why for contender, why in failures.items()})
            progress.advance(bar)
    return results


def table(results: Results, networks: list[str], contenders: list[str]) -> Iterator[str]:
    """A table for each network, and why something is missing."""
    for network in networks:
        workload = WORKLOADS[network]
        yield from (
            "",
            f"### {workload.title}: {workload.description}",
            "",
            "| | ms | of float32 | saved for backward, MiB | of float32 | peak, MiB | of float32 |",
            "|---|---|---|---|---|---|---|",
        )
        for contender in contenders:
            ratios = results.ratios(network, contender)
            if ratios is None:
                if (network, contender) in results.failures:
                    yield f"| {contender} | does not run: {results.failures[network, contender]} | | | | | |"
                continue
            time, saved, peak = ratios
            memory = results.memory[network, contender]
            yield (
                f"| {contender} | {results.times[network, contender].median:.3g} | **{time:.2f}** "
                f"| {memory.saved / 2**20:.3g} | **{saved:.2f}** | {memory.peak / 2**20:.3g} | {peak:.2f} |"
            )


def section(results: Results, networks: list[str], contenders: list[str], rounds: int) -> str:
    """What goes into RESULTS.md."""
    compiled_networks = " and ".join(WORKLOADS[name].title for name in COMPILED_NETWORKS)
    lines = [
        "## One training step",
        "",
        "`python benchmarks/training_step.py`: forward, cross-entropy, backward, SGD with momentum, gradients dropped;",
        "convolutional networks channels-last, everyone observing and quantizing. Medians of",
        f"{rounds} rounds taken in turn; memory in a process of its own. *Saved for backward* is what the step has",
        "allocated and still holds when its forward ends, autograd's tensors and anything beside them; parameters,",
        "buffers, momentum and the batch lie there before and do not count. *Peak* is the most that is held at a time.",
        f"Under `torch.compile`: {compiled_networks} only.",
        f"{environment()} {', '.join(map(_with_version, PEERS))}.",
        "",
        "![Step time and bytes saved, relative to float32](../docs/training_step.png)",
    ]
    return "\n".join([*lines, *table(results, networks, contenders)])


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a part can be measured without
        return f"{package} not installed"


def draw(results: Results, networks: list[str]) -> None:
    """Time and bytes saved of the eager contenders, as bars."""
    panels: dict[str, dict[str, list[float | None]]] = {}
    for number, title in enumerate(("Time of one step", "Bytes saved for backward")):
        bars = panels[title] = {}
        for contender in EAGER:
            if contender == FLOAT:
                continue
            ratios = [results.ratios(network, contender) for network in networks]
            bars[contender] = [None if of is None else of[number] for of in ratios]
    draw_steps([WORKLOADS[network].title for network in networks], panels)


def main() -> None:
    """Measures what was asked for, prints it, and writes it where it is everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    console = Console()
    contenders = list(dict.fromkeys([FLOAT, *arguments.contenders]))
    results = measure(arguments.networks, contenders, arguments.rounds, console)
    text = section(results, arguments.networks, contenders, arguments.rounds)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if arguments.networks == list(WORKLOADS) and contenders == list(CONTENDERS):
        draw(results, arguments.networks)
        write_section("training-step", text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the peers' dependencies
    main()
