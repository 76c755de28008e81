"""Killed at any time and started again from its last checkpoint, a training ends where it would have ended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from killed_training import CONFIGS, STEPS, checkpoint_of, finish, start, wait_for_steps

pytestmark = pytest.mark.slow


def _assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            _assert_same(value, other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for index, (value, expected) in enumerate(zip(one, other, strict=True)):
            _assert_same(value, expected, f"{path}/{index}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def _train_until_killed(kind: str, folder: Path, ranks: int, killed: list[int], seed: int) -> None:
    """Kills some of the ranks at a random time; what is left of the others then ends, too."""
    chance = random.Random(seed)
    saved = checkpoint_of(folder)["schedule"]["steps"] if (folder / "state.pt").exists() else 0
    processes = start(kind, folder, ranks)
    wait_for_steps(folder, saved + chance.randrange(1, STEPS // 3))
    time.sleep(chance.random() * 0.02)
    for rank in killed:
        os.kill(processes[rank].pid or 0, signal.SIGKILL)
    for rank, process in enumerate(processes):
        process.join(5)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert (process.exitcode == -signal.SIGKILL) if rank in killed else process.exitcode
    assert 0 < checkpoint_of(folder)["schedule"]["steps"] < STEPS


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_process(kind: str, tmp_path: Path) -> None:
    whole, killed = _folder(tmp_path, "whole"), _folder(tmp_path, "killed")
    finish(start(kind, whole))
    _train_until_killed(kind, killed, 1, [0], seed=len(kind))
    _train_until_killed(kind, killed, 1, [0], seed=len(kind) + 1)
    finish(start(kind, killed))
    _assert_same(checkpoint_of(killed), checkpoint_of(whole))


@pytest.mark.parametrize(("kind", "ranks_killed"), [("observed", [0, 1]), ("learnable", [1])])
def test_two_ranks(kind: str, ranks_killed: list[int], tmp_path: Path) -> None:
    """Other numbers of ranks go on from it, too: statistics are those of all ranks, and the same on all."""
    whole, killed = _folder(tmp_path, "whole"), _folder(tmp_path, "killed")
    finish(start(kind, whole, 2))
    _train_until_killed(kind, killed, 2, ranks_killed, seed=len(kind))
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        shutil.copytree(killed, folder)
        finish(start(kind, folder, ranks))
        states = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
        expected = checkpoint_of(whole)["model"]
        for state in states:
            _assert_same({**state, **_of_batch_norm(states[0])}, states[0])
            assert all(torch.isfinite(value).all() for name, value in state.items() if "statistics" not in name)
            for name, value in state.items():  # of the batches, whose halves and quarters ranks have seen
                if kind == "observed" and (name.startswith("input") or name.endswith("observer.batches")):
                    assert torch.equal(value, expected[name]), name
    finish(start(kind, killed, 2))
    _assert_same(checkpoint_of(killed), checkpoint_of(whole))


def _of_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running statistics, which are each rank's own."""
    return {name: value for name, value in state.items() if "running" in name}
