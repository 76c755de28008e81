"""After any optimizer step, learned scales are positive and finite and zero points lie on the grid."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from mlframework.quantization import FakeQuantizeLayer, QuantizationScheme
from mlframework.quantization.arithmetic import LARGEST_SCALE, SMALLEST_SCALE

AFFINE = QuantizationScheme(bits=4, signed=False, symmetric=False)
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters: SGD(parameters, lr=1.0),
    "sgd with momentum": lambda parameters: SGD(parameters, lr=1.0, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=1.0),
    "adamw": lambda parameters: AdamW(parameters, lr=1.0),
    "adamw fused": lambda parameters: AdamW(parameters, lr=1.0, fused=True),
    "adamw foreach": lambda parameters: AdamW(parameters, lr=1.0, foreach=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=1.0),
}


def learnable_layer() -> FakeQuantizeLayer:
    layer = FakeQuantizeLayer(AFFINE, learnable=True)
    layer(torch.randn(100))
    return layer


def in_range(layer: FakeQuantizeLayer) -> bool:
    scale, zero_point = layer.scale.detach(), layer.zero_point.detach()
    return bool(((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all()) and bool(
        ((zero_point >= AFFINE.quant_min) & (zero_point <= AFFINE.quant_max)).all()
    )


def step_outwards(layer: FakeQuantizeLayer, optimizer: Optimizer, sign: float, size: float = 100.0) -> None:
    """One step along a gradient that drives both parameters far below (or above) their ranges."""
    layer.scale.grad = torch.full_like(layer.scale, sign * size)
    layer.zero_point.grad = torch.full_like(layer.zero_point, sign * size)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_right_after_each_step(name: str, sign: float) -> None:
    layer = learnable_layer()
    optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(60):
        before = layer.scale.item()
        step_outwards(layer, optimizer, sign)
        assert in_range(layer)
        assert before / 2 <= layer.scale.item() <= before * 2
    if sign > 0:
        assert layer.scale.item() == SMALLEST_SCALE
        assert layer.zero_point.item() == AFFINE.quant_min


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_at_learning_rate_one(name: str) -> None:
    layer, input = learnable_layer(), torch.randn(200)
    optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(input) - input).square().sum()
        loss.backward()
        optimizer.step()
        assert in_range(layer)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("size", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_leaves_them_as_they_were(size: float) -> None:
    layer = learnable_layer()
    scale, zero_point = layer.scale.item(), layer.zero_point.item()
    step_outwards(layer, SGD(layer.parameters(), lr=1.0), sign=-1.0, size=size)
    assert (layer.scale.item(), layer.zero_point.item()) == (scale, zero_point)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_projected_too(how: str) -> None:
    layer = learnable_layer()
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    del layer
    step_outwards(twin, SGD(twin.parameters(), lr=1.0), sign=1.0)
    assert in_range(twin)


def test_layers_of_a_model_in_groups_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), learnable_layer(), nn.Sequential(learnable_layer()))
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizeLayer)]
    rest = [parameter for name, parameter in model.named_parameters() if "scale" not in name]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": [layer.scale for layer in quantizers], "lr": 10.0}]
    optimizer = SGD(groups, lr=1.0)
    model(torch.randn(4, 3)).square().sum().mul(1000).backward()
    optimizer.step()
    assert all(in_range(layer) for layer in quantizers)


def test_a_learned_scale_within_its_range_is_left_alone() -> None:
    layer = learnable_layer()
    layer.scale.grad = torch.tensor([0.01])
    expected = layer.scale.detach() - 0.01
    SGD([layer.scale], lr=1.0).step()
    assert torch.equal(layer.scale.detach(), expected)


def test_another_optimizers_step_does_not_break_a_waiting_graph() -> None:
    """As when two networks train against each other: one steps while the other's graph waits for its backward."""
    generator, critic = learnable_layer(), learnable_layer()
    critic_optimizer = SGD(critic.parameters(), lr=0.01)
    made = generator(torch.randn(10))
    critic(made.detach()).sum().backward()
    critic_optimizer.step()
    critic(made).sum().backward()
    assert generator.scale.grad is not None


def test_a_layer_that_is_gone_is_no_longer_projected() -> None:
    layer = learnable_layer()
    scale: Tensor = layer.scale
    optimizer = SGD([layer.scale], lr=1.0)
    del layer
    scale.grad = torch.tensor([100.0])
    optimizer.step()
    assert scale.item() < 0


def test_an_optimizer_around_another_leaves_what_it_likes_of_the_inner_ones_layers() -> None:
    """As one does that averages its results with values of many steps ago; its own layers are held to bounds."""

    class Around(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            inner.step()
            with torch.no_grad():
                for layer in (shared, own, other):
                    layer.scale.mul_(5)
                    layer.zero_point.fill_(-100)

    shared, own, other = learnable_layer(), learnable_layer(), learnable_layer()
    scales = [layer.scale.item() for layer in (shared, own, other)]
    inner = SGD(shared.parameters(), lr=1.0)
    Around([*shared.parameters(), *own.parameters(), *other.parameters()], lr=1.0).step()
    assert [layer.scale.item() for layer in (shared, own, other)] == pytest.approx(
        [5 * scales[0], 2 * scales[1], 2 * scales[2]]
    )
    assert [layer.zero_point.item() for layer in (shared, own, other)] == [-100, AFFINE.quant_min, AFFINE.quant_min]


def test_one_scale_beyond_its_bounds_moves_no_other() -> None:
    layers = [learnable_layer() for _ in range(3)]
    optimizer = SGD([parameter for layer in layers for parameter in layer.parameters()], lr=1.0)
    before = [layer.scale.item() for layer in layers]
    for layer, gradient in zip(layers, (1e-3, 100.0, torch.nan), strict=True):
        layer.scale.grad = torch.tensor([gradient])
    optimizer.step()
    first = torch.tensor(before[0]) - torch.tensor(1e-3)
    assert [layer.scale.item() for layer in layers] == [first.item(), before[1] / 2, before[2]]


# Closures


class Probing(SGD):
    """Tries a step of any size before the one it takes, as a line search does."""

    def step(self, closure: Callable[[], Any], trial: float) -> Tensor:  # type: ignore[override]
        (group,) = self.param_groups
        kept = [parameter.detach().clone() for parameter in group["params"]]
        with torch.no_grad():
            for parameter in group["params"]:
                parameter.add_(trial)
        loss: Tensor = closure()
        with torch.no_grad():
            for parameter, value in zip(group["params"], kept, strict=True):
                parameter.copy_(value)
        return loss


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("trial", "change"), [(-100.0, 0.5), (1e-3, None), (100.0, 2.0), (torch.nan, 1.0)], ids=str)
def test_a_closure_sees_what_the_step_would_leave(trial: float, change: float | None, by_name: bool) -> None:
    layer, input = learnable_layer(), torch.randn(100)
    scale = layer.scale.detach().clone()
    optimizer = Probing(layer.parameters(), lr=1.0)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(layer.scale.detach().clone())
        assert in_range(layer)
        loss = (layer(input) - 0.1).square().sum()
        loss.backward()
        return loss

    if by_name:
        optimizer.step(closure=closure, trial=trial)
    else:
        optimizer.step(closure, trial)
    expected = scale + trial if change is None else scale * change
    assert torch.equal(seen[0], expected)
    assert layer.scale.grad is not None
    assert (layer.scale.grad == 0) == (change is not None), "the loss does not change with what is projected away"
    assert torch.equal(layer.scale.detach(), scale)


def test_a_first_batch_within_a_step_sets_the_scale() -> None:
    layer, input = FakeQuantizeLayer(AFFINE, learnable=True), torch.randn(100) / 100
    twin = copy.deepcopy(layer)
    optimizer = SGD(layer.parameters(), lr=1e-6)

    def closure() -> Tensor:
        loss = layer(input).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    twin(input)
    assert layer.scale.item() == pytest.approx(twin.scale.item(), rel=1e-2)


def test_a_first_batch_within_a_step_is_where_its_bounds_start() -> None:
    layer, input = FakeQuantizeLayer(AFFINE, learnable=True), torch.randn(100) / 100
    optimizer = SGD(layer.parameters(), lr=1.0)

    def closure() -> Tensor:
        loss = 1e6 * (layer(input) - input).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    twin = FakeQuantizeLayer(AFFINE, learnable=True)
    twin(input)
    assert layer.scale.item() in (twin.scale.item() / 2, twin.scale.item() * 2)
