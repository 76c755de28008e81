"""Two gloo processes against one process that sees both halves of every batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlframework.quantization import (
    FakeQuantizeLayer,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    QATConfig,
    Recipe,
    calibrate,
    finetune,
    prepare,
)
from mlframework.quantization.qat.averaged_parameters import INITIAL_SCALE
from ranks import RANKS, Branching, process_group, run_ranks

STEPS = 6


def _model(config: QATConfig) -> nn.Module:
    torch.manual_seed(0)
    # No batch normalization: its batch statistics are each rank's own, and would tell the two runs apart.
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4))
    return prepare(model, config, (torch.randn(1, 12),))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # The second half of each batch spans three times the range of the first.
    scale = torch.cat([torch.ones(8, 1), 3 * torch.ones(8, 1)])
    return [torch.randn(16, 12, generator=generator) * scale for _ in range(STEPS)]


def _train(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def _scales(model: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizeLayer):
            state[f"{name}.scale"] = module.scale.detach().clone()
            state[f"{name}.zero_point"] = module.zero_point.detach().clone()
    return state


def _worker(rank: int, folder: str, config: QATConfig, calibrates: bool) -> None:
    with process_group(rank, folder):
        reductions = 0
        all_reduce = dist.all_reduce

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal reductions
            reductions += 1
            return all_reduce(*args, **kwargs)

        dist.all_reduce = counting
        model = _model(config)
        halves = [batch.chunk(RANKS)[rank] for batch in _batches()]
        if calibrates:
            calibrate(model, halves)
        else:
            _train(DistributedDataParallel(model), halves)
        torch.save((_scales(model), reductions), f"{folder}/{rank}.pt")


def _run(folder: Path, config: QATConfig, calibrates: bool = False) -> list[tuple[dict[str, Tensor], int]]:
    run_ranks(_worker, str(folder), config, calibrates)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("learnable", [False, True])
def test_training_on_different_data_ends_with_the_scales_of_one_process(tmp_path: Path, learnable: bool) -> None:
    config = QATConfig(learnable=learnable)
    (first, reductions), (second, _) = _run(tmp_path, config)
    single = _model(config)
    _train(single, _batches())
    expected = _scales(single)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        # LSQ scales a gradient by the number of elements a rank sees, so learned scales depend on the batch per rank.
        # What observers set does not; the mean of two half-batch gradients is just summed in another order.
        assert learnable or torch.allclose(first[name], value, rtol=1e-5, atol=1e-7), name
    # One packed all-reduce a step for the whole model; learned scales need the first one only.
    assert reductions == (1 if learnable else STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageObserver, HistogramObserver])
def test_calibration_on_different_data_equals_one_process(tmp_path: Path, observer: Any) -> None:
    config = QATConfig(activation_observer=observer)
    (first, reductions), (second, _) = _run(tmp_path, config, calibrates=True)
    single = _model(config)
    calibrate(single, _batches())
    for name, value in _scales(single).items():
        assert torch.equal(first[name], second[name]), name
        # The float forward of half a batch may sum in another order than that of a whole one.
        assert torch.allclose(first[name], value, rtol=1e-6), name
    collectives_a_step = 2 if observer is HistogramObserver else 1
    assert reductions == STEPS * collectives_a_step


def _resumed(rank: int, folder: str, config: QATConfig, checkpoint: dict[str, Tensor]) -> None:
    """Goes on from a checkpoint that the first rank alone has loaded, and that DistributedDataParallel broadcasts."""
    with process_group(rank, folder):
        model = _model(config)
        if rank == 0:
            model.load_state_dict(checkpoint)
        parallel = DistributedDataParallel(model)
        same_for_all = _batches()[0]
        output = parallel(same_for_all).detach().clone()
        _train(parallel, [batch.chunk(RANKS)[rank] for batch in _batches()])
        torch.save((output, _scales(model)), f"{folder}/{rank}.pt")
        del parallel  # its reducer, which outlived the process group, kept a process from ending once


@pytest.mark.slow
@pytest.mark.parametrize("learnable", [False, True])
def test_a_checkpoint_that_one_rank_loaded(tmp_path: Path, learnable: bool) -> None:
    config = QATConfig(learnable=learnable)
    trained = _model(config)
    _train(trained, _batches())
    checkpoint = {name: value.clone() for name, value in trained.state_dict().items()}
    run_ranks(_resumed, str(tmp_path), config, checkpoint)
    (output, scales), (other_output, other_scales) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    expected = trained(_batches()[0])
    assert torch.equal(output, expected)
    assert torch.equal(other_output, expected)
    assert all(torch.equal(value, other_scales[name]) for name, value in scales.items())


def _distilled(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        halves = [batch.chunk(RANKS)[rank] for batch in _batches()]
        model = _model(QATConfig(weight_bits=4))
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4))
        calibrate(model, halves)
        parallel = DistributedDataParallel(model)
        history = finetune(parallel, teacher, halves[:1], steps=STEPS, recipe=Recipe(warmup=0.0))
        torch.save((history.learning_rates, history.losses, model.state_dict()), f"{folder}/{rank}.pt")
        del parallel


@pytest.mark.slow
def test_fine_tuning_takes_one_learning_rate_on_all_ranks(tmp_path: Path) -> None:
    """It follows from the first distance, which is another one on each rank."""
    run_ranks(_distilled, str(tmp_path))
    (rates, losses, state), (other_rates, other_losses, other_state) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)
    )
    assert losses[0] != other_losses[0]
    assert rates == other_rates
    assert rates[0] == pytest.approx(5e-3 * math.sqrt((losses[0] + other_losses[0]) / 2))
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())


def _uneven_worker(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        torch.manual_seed(0)
        model = prepare(Branching(), QATConfig(), (torch.randn(1, 12),))
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        positive = torch.ones(4, 12)
        for batch in (positive if rank == 0 else -positive, positive, torch.empty(0, 12) if rank == 0 else positive):
            parallel(batch).sum().backward()
        torch.save(_scales(model), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_may_take_different_branches_and_have_empty_batches(tmp_path: Path) -> None:
    run_ranks(_uneven_worker, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["second.input_fake_quantize.scale"].item() != INITIAL_SCALE
