"""What reducing the statistics of observers over ranks adds to a training step of ResNet-20.

Two processes of one thread each train with DistributedDataParallel. The contenders take turns, a step each, on the same
data: float32, the prepared model, and the prepared model whose ranks do not reduce. Ratios are of steps that follow on
one another, and of them the median.

    python benchmarks/ddp_step.py [--steps 200] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from results_file import environment, write_section
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workloads import WORKLOADS, TrainingStep

from mlframework.quantization import QATConfig, prepare
from mlframework.quantization.qat import observer_synchronizer

RANKS = 2
STEPS = 200
FLOAT, OURS, APART = "float32", "ours", "ours, ranks not reducing"
LIMIT = 1.02


class Times(NamedTuple):
    """Seconds of each step: on the clock, and of this process on a processor (its threads together)."""

    wall: list[float]
    cpu: list[float]


def contenders() -> dict[str, Callable[[], None]]:
    """A training step of each."""
    workload = WORKLOADS["resnet20"]
    inputs, targets = workload.data()
    prepared = prepare(workload.model(), QATConfig(), inputs)
    quantized = TrainingStep(DistributedDataParallel(prepared), inputs, targets)

    def apart() -> None:
        with mock.patch.object(observer_synchronizer, "is_distributed", return_value=False):
            quantized()

    return {
        FLOAT: TrainingStep(DistributedDataParallel(workload.model()), inputs, targets),
        OURS: quantized,
        APART: apart,
    }


def measure(rank: int, folder: str, steps: int) -> None:
    """What one process does; the first one saves its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    calls = contenders()
    times = {name: Times([], []) for name in calls}
    for step in range(steps + 5):  # the first ones for statistics, momentum, buckets
        # In turn from one and from the other end, so that each follows on each.
        for name in calls if step % 2 else reversed(calls):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if step >= 5:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    if rank == 0:
        torch.save({name: tuple(each) for name, each in times.items()}, f"{folder}/times.pt")
    dist.barrier()
    calls.clear()
    dist.destroy_process_group()


def section(times: dict[str, Times], steps: int) -> str:
    """What goes into RESULTS.md."""
    torch.set_num_threads(1)
    lines = [
        "## A step on two ranks",
        "",
        "`python benchmarks/ddp_step.py`: ResNet-20, 64 images of 32x32 a rank, DistributedDataParallel with gloo,",
        f"{RANKS} processes of one thread each; medians of {steps} steps taken in turn, ratios of neighbouring steps.",
        "*CPU* is the time of the first process's threads. Reducing statistics is to add no more than "
        f"{LIMIT - 1:.0%}.",
        environment(),
        "",
        "| | ms | CPU ms | of the one whose ranks do not reduce | CPU |",
        "|---|---|---|---|---|",
    ]
    for name, (wall, cpu) in times.items():
        ratios = [
            statistics.median(own / other for own, other in zip(mine, apart, strict=True))
            for mine, apart in zip(times[name], times[APART], strict=True)
        ]
        lines.append(
            f"| {name} | {1000 * statistics.median(wall):.1f} | {1000 * statistics.median(cpu):.1f} "
            f"| {ratios[0]:.3f} | {ratios[1]:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Starts the processes, and prints what they measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", action="store_true", help="write the section of RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, arguments.steps), nprocs=RANKS)
        times = {name: Times(*each) for name, each in torch.load(f"{folder}/times.pt").items()}
    text = section(times, arguments.steps)
    print(text)
    if arguments.write:
        write_section("ddp-step", text)


if __name__ == "__main__":
    main()
