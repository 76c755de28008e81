"""A training that writes a checkpoint at every step, and can be killed at any time; run in processes of their own."""

from __future__ import annotations

import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlframework.quantization import MinMaxObserver, QATConfig, QATSchedule, parameter_groups, prepare
from ranks import FORK_SERVER, process_group

STEPS = 30
CONFIGS = {
    "observed": QATConfig(weight_bits=4, activation_observer=lambda: MinMaxObserver(update_every=3)),
    "learnable": QATConfig(weight_bits=4, learnable=True),
}


def start(kind: str, folder: Path, ranks: int = 1) -> list[BaseProcess]:
    """Starts the processes of a training whose files are in a folder."""
    meeting = mkdtemp(dir=folder)
    processes: list[BaseProcess] = [
        FORK_SERVER.Process(target=_run, args=(rank, kind, folder, ranks, meeting)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess]) -> None:
    """Waits for a training that nobody kills."""
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


def wait_for_steps(folder: Path, count: int) -> None:
    """Until that many steps were saved since the training began."""
    log, until = folder / "steps", time.monotonic() + 300
    while not log.exists() or len(log.read_text().split()) < count:
        assert time.monotonic() < until, "the training did not get there"
        time.sleep(0.001)


def checkpoint_of(folder: Path) -> dict[str, Any]:
    """What was saved last."""
    return torch.load(folder / "state.pt", weights_only=True)  # type: ignore[no-any-return]


def model_of(kind: str) -> nn.Module:
    """Nothing in it is random: the states of model, optimizer and schedule are all that training depends on."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)
    )
    return prepare(model, CONFIGS[kind], (torch.randn(2, 12),))


def _batch_of(step: int) -> Tensor:
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(step)) * (1 + step / STEPS)


def _run(rank: int, kind: str, folder: Path, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    if ranks == 1:
        _train(kind, folder, rank, ranks)
        return
    with process_group(rank, meeting, ranks):
        _train(kind, folder, rank, ranks)


def _train(kind: str, folder: Path, rank: int, ranks: int) -> None:
    """Takes the steps that are left, from the checkpoint where there is one. The first rank writes it."""
    model, path = model_of(kind), folder / "state.pt"
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    schedule = QATSchedule(model, quantize_from=2, observe_until=20, freeze_batch_norm_from=24)
    if path.exists():
        state = checkpoint_of(folder)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    # Learned scales have no gradients until the schedule quantizes.
    trained = model if ranks == 1 else DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(schedule.steps, STEPS):
        optimizer.zero_grad()
        trained(_batch_of(step).chunk(ranks)[rank]).square().mean().backward()
        optimizer.step()
        schedule.step()
        if rank == 0:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "partial")
            os.replace(folder / "partial", path)
            with (folder / "steps").open("a") as log:
                log.write(f"{step}\n")
    torch.save(model.state_dict(), folder / f"{rank}.pt")
