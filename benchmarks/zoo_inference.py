"""Converted models beside the float models that they were, over the whole zoo, at batch 1 and 16.

    python benchmarks/zoo_inference.py

Each kind of processor has a column of its own in the table; a run renews the column of the processor that it is on.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from results_file import environment, read_section, write_section
from rich.console import Console
from timing import time_in_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zoo
from mlframework.quantization import QATConfig, calibrate, convert, prepare
from mlframework.quantization.kernels import instruction_set
from zoo import Network

SECTION = "zoo-inference"
THREADS = 2
BATCHES = (1, 16)
KINDS = ("avx512_vnni", "avx2")
ZOOS = {"as published": zoo.FULL_SIZE, "small": zoo.NETWORKS}

Row = tuple[str, str, int]  # size, network, batch


def measured(names: list[str], rounds: int) -> Iterator[tuple[Row, str]]:
    """One cell of the table after the other: the ratio, and both times in milliseconds."""
    for size, networks in ZOOS.items():
        for name, network in networks.items():
            if names and name not in names:
                continue
            for batch, cell in of_network(network, rounds):
                yield (size, name, batch), cell


def of_network(network: Network, rounds: int) -> Iterator[tuple[int, str]]:
    """The float model as PyTorch makes it, and what it became."""
    model = network.make()
    zoo.roughen_batch_norms(model, seed=0)
    model.eval()
    prepared = prepare(model, QATConfig(), network.example_inputs(2))
    calibrate(prepared, [network.example_inputs(4, seed) for seed in (1, 2)])
    converted = convert(prepared)
    for batch in BATCHES:
        inputs = network.example_inputs(batch)
        calls = {"float": lambda inputs=inputs: model(*inputs), "int8": lambda inputs=inputs: converted(*inputs)}
        with torch.inference_mode():
            times = time_in_turns(calls, rounds, block_calls=2)
        before, after = times["float"].median, times["int8"].median
        yield batch, f"**{after / before:.2f}** ({before:.3g}, {after:.3g})"


def kept_columns() -> tuple[dict[Row, dict[str, str]], dict[str, str]]:
    """What the file has of earlier runs: cells by row and kind, and where each kind was measured."""
    cells: dict[Row, dict[str, str]] = defaultdict(dict)
    machines: dict[str, str] = {}
    for line in read_section(SECTION).splitlines():
        if machine := re.fullmatch(r"- `(\w+)`: (.*)", line):
            machines[machine[1]] = machine[2]
        parts = [part.strip() for part in line.strip("|").split("|")]
        if len(parts) == 3 + len(KINDS) and parts[1] in ZOOS.get(parts[0], {}):
            cells[parts[0], parts[1], int(parts[2])] = dict(zip(KINDS, parts[3:], strict=True))
    return cells, machines


def processor() -> str:
    """Its name; and that it is held to fewer instructions than it has, where it is."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"model name\s*: (.*)", text)
    held = instruction_set() == "avx2" and " avx512_vnni" in text
    return (name[1] if name else "unknown processor") + (" with its AVX-512 hidden" if held else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[], help="only these, and nothing is written")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if instruction_set() not in KINDS:
        parser.error(f"the table has columns for {' and '.join(KINDS)}, got a processor with {instruction_set()}")
    torch.set_num_threads(THREADS)
    console = Console()
    cells, machines = kept_columns()
    for row, cell in measured(arguments.networks, arguments.rounds):
        console.print(*row, cell)
        cells[row][instruction_set()] = cell
    if arguments.networks:
        return
    machines[instruction_set()] = f"{processor()}. {environment()}"
    lines = [
        "## The zoo, converted",
        "",
        "`python benchmarks/zoo_inference.py`: time of the converted model over that of the float model as it is made",
        "(contiguous), and both in milliseconds, medians of blocks of calls taken in turn.",
        "",
        *(f"- `{kind}`: {machine}" for kind, machine in machines.items()),
        "",
        f"| size | network | batch | {' | '.join(KINDS)} |",
        f"|---|---|---|{'---|' * len(KINDS)}",
    ]
    for (size, name, batch), row_cells in cells.items():
        lines.append(f"| {size} | {name} | {batch} | {' | '.join(row_cells.get(kind, '') for kind in KINDS)} |")
    write_section(SECTION, "\n".join(lines))


if __name__ == "__main__":
    main()
