"""Processes that train together, for tests of distributed training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 2


@contextmanager
def process_group(rank: int, folder: str) -> Iterator[None]:
    """A gloo group of :data:`RANKS` processes that meet by a file in a folder, each with one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


class Branching(nn.Module):
    """Takes its second layer only for batches whose sum is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.second(hidden) if inputs.sum() > 0 else hidden
