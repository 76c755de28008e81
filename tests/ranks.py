"""Processes that train together, for tests of distributed training."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

RANKS = 2

# One process imports what takes long, and is forked for each rank.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "mlframework.quantization",
        "pytest",
    ]
)


def run_ranks(worker: Callable[..., None], *args: Any) -> None:
    """Calls ``worker(rank, *args)`` in a process for each rank; raises what one of them raises."""
    mp.start_processes(worker, args, nprocs=RANKS, start_method="forkserver")


@contextmanager
def process_group(rank: int, folder: str, ranks: int = RANKS) -> Iterator[None]:
    """A gloo group of that many processes that meet by a file in a folder, each with one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def reductions() -> Iterator[list[int]]:
    """The bytes of every tensor that ``torch.distributed.all_reduce`` is called with (gradients are not)."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = noting
    try:
        yield sizes
    finally:
        dist.all_reduce = all_reduce


def agree(state: dict[str, Tensor]) -> bool:
    """Whether all ranks have the same values, bit for bit."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return all(torch.equal(value, other[name]) for other in states for name, value in state.items())


class Branching(nn.Module):
    """Takes its second layer only for batches whose sum is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.second(hidden) if inputs.sum() > 0 else hidden
