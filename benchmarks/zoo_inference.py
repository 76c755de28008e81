"""Converted models beside the float models that they were, over the whole zoo, at batch 1 and 16.

    python benchmarks/zoo_inference.py

Each kind of processor has a column of its own in the table; a run renews the column of the processor that it is on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from columns import ColumnsByKind, Row
from rich.console import Console
from timing import time_in_turns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zoo
from mlframework.quantization import QATConfig, calibrate, convert, prepare
from zoo import Network

THREADS = 2
BATCHES = (1, 16)
ZOOS = {"as published": zoo.FULL_SIZE, "small": zoo.NETWORKS}


def measured(names: list[str], rounds: int) -> Iterator[tuple[Row, str]]:
    """One cell of the table after the other: the ratio, and both times in milliseconds."""
    for size, networks in ZOOS.items():
        for name, network in networks.items():
            if names and name not in names:
                continue
            for batch, cell in of_network(network, rounds):
                yield (size, name, str(batch)), cell


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[], help="only these, and nothing is written")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    console = Console()
    table = ColumnsByKind("zoo-inference", ("size", "network", "batch"))
    for row, cell in measured(arguments.networks, arguments.rounds):
        console.print(*row, cell)
        table.set(row, cell)
    if not arguments.networks:
        table.write(
            "The zoo, converted",
            (
                "`python benchmarks/zoo_inference.py`: time of the converted model over that of the float model as it",
                "is made (contiguous), and both in milliseconds, medians of blocks of calls taken in turn.",
            ),
        )


if __name__ == "__main__":
    main()
