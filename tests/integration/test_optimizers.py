"""Every optimizer of PyTorch trains a prepared model, with scales of its own to learn and without."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mlframework.quantization import QATConfig, QATSchedule, parameter_groups, prepare, quantization_parameters

pytestmark = pytest.mark.slow

Make = Callable[[Iterable[Any], float], Optimizer]

OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "SGD": (lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9), 0.05),
    "SGD fused": (lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True), 0.05),
    "Adam": (lambda groups, lr: torch.optim.Adam(groups, lr=lr), 0.01),
    "Adam foreach": (lambda groups, lr: torch.optim.Adam(groups, lr=lr, foreach=True), 0.01),
    "AdamW": (lambda groups, lr: torch.optim.AdamW(groups, lr=lr), 0.01),
    "AdamW fused": (lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True), 0.01),
    "AdamW foreach": (lambda groups, lr: torch.optim.AdamW(groups, lr=lr, foreach=True), 0.01),
    "RMSprop": (lambda groups, lr: torch.optim.RMSprop(groups, lr=lr), 0.005),
}


def _task() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(64, 8)
    return inputs, (inputs[:, 0] * inputs[:, 1] > 0).long()


def _prepared(learnable: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    return prepare(model, QATConfig(target="executorch", learnable=learnable), (torch.randn(1, 8),))


def _train(model: nn.Module, optimizers: list[Optimizer], steps: int) -> list[float]:
    inputs, labels = _task()
    losses = []

    def closure() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizers[0], torch.optim.LBFGS):
            losses.append(optimizers[0].step(closure).item())
            continue
        losses.append(closure().item())
        for optimizer in optimizers:
            optimizer.step()
    return losses


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_short_run_lowers_the_loss(name: str, learnable: bool) -> None:
    make, rate = OPTIMIZERS[name]
    model = _prepared(learnable)
    model(torch.randn(64, 8))
    before = [parameter.detach().clone() for parameter in quantization_parameters(model)]
    losses = _train(model, [make(parameter_groups(model, quantization_learning_rate=rate / 10), rate)], 30)
    assert losses[-1] < 0.8 * losses[0]
    moved = [not torch.equal(old, new) for old, new in zip(before, quantization_parameters(model), strict=True)]
    assert len(moved) == (8 if learnable else 0)  # two scales of weights; of three activations scale and zero point
    assert sum(moved) >= len(moved) / 2, "scales learn"


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_lbfgs_never_raises_the_loss(seed: int, learnable: bool) -> None:
    """Its line search keeps the best of what it has tried, so a rise would mean that what it tried was not kept: a
    scale projected only afterwards, or statistics that the trials themselves have moved (hence they are frozen)."""
    torch.manual_seed(seed)
    model = _prepared(learnable)
    schedule = QATSchedule(model, observe_until=1)
    model(torch.randn(64, 8))
    schedule.step()
    losses = _train(model, [torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")], 5)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]  # 0.27 was the most of 20 seeds on each kind of processor


@pytest.mark.parametrize("learnable", [False, True])
def test_muon_trains_the_matrices_beside_another_optimizer(learnable: bool) -> None:
    model = _prepared(learnable)
    model(torch.randn(64, 8))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    losses = _train(model, [torch.optim.Muon(matrices, lr=0.02), torch.optim.SGD(rest, lr=0.005)], 30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scales_stay_positive_and_finite_at_a_learning_rate_of_one(name: str) -> None:
    make, _ = OPTIMIZERS[name]
    model = _prepared(learnable=True)
    model(torch.randn(64, 8))
    groups = parameter_groups(model, lr=1e-3)
    groups[1]["lr"] = 1.0
    optimizer = make(groups, 1e-3)
    for _ in range(10):
        _train(model, [optimizer], 1)
        for module in model.modules():
            scale = getattr(module, "scale", None)
            if isinstance(scale, Tensor):
                assert bool((torch.isfinite(scale) & (scale > 0)).all())


def test_weight_decay_leaves_the_scales_alone() -> None:
    model = _prepared(learnable=True)
    learned, own = parameter_groups(model, weight_decay=0.1)[::-1]
    assert learned["weight_decay"] == 0
    assert own["weight_decay"] == 0.1
    assert {id(parameter) for parameter in learned["params"]} == {id(p) for p in quantization_parameters(model)}
