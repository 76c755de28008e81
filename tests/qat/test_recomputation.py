"""Activation checkpointing: the same gradients, bit for bit, and the same statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from mlframework.quantization import FakeQuantizeLayer, HistogramObserver, QATConfig, prepare
from mlframework.quantization.kernels import reference_kernels
from mlframework.quantization.qat.recomputation import FORWARDS_KEPT, is_recomputing

# Of the example, which has no gradients, when prepare() runs a model that has reentrant checkpoints inside.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")]

SHAPE = (4, 3, 6, 6)
CONFIGS = {
    "observed": QATConfig(),
    "learned": QATConfig(learnable=True),
    "float products": QATConfig(integer_forward=False),
    "histogram": QATConfig(activation_observer=HistogramObserver),
    "every other batch": QATConfig(activation_observer=lambda: HistogramObserver(update_every=2)),
}
Run = Callable[..., Any]


def called(function: Any, *args: Any) -> Any:
    return function(*args)


def reentrant(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def recording(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def nested(run: Run) -> Run:
    return lambda function, *args: run(lambda *inner: run(function, *inner), *args)


class Body(nn.Module):
    """Runs its layers as ``run`` does, by its own code whatever that is."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.calls = run, 0
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
        )

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return self.run(self.layers, input)  # type: ignore[no-any-return]


def whole(run: Run, config: QATConfig) -> nn.Module:
    network = nn.Sequential(Body(called), nn.GELU(), nn.Flatten(), nn.Linear(108, 5))
    prepared = prepare(network, config, (torch.randn(SHAPE),))
    return Calls(run, prepared)


def part(run: Run, config: QATConfig) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Body(run), nn.Flatten(), nn.Linear(108, 5))
    return prepare(network, config, (torch.randn(SHAPE),))


class Calls(nn.Module):
    def __init__(self, run: Run, model: nn.Module) -> None:
        super().__init__()
        self.run, self.model = run, model

    def forward(self, input: Tensor) -> Tensor:
        return self.run(self.model, input)  # type: ignore[no-any-return]


def trained(
    make: Any, run: Run, config: QATConfig, forwards: int, together: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients of some steps, the first ones included, and the state after them."""
    torch.manual_seed(1)
    model: nn.Module = make(run, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    results = []
    for step, count in enumerate((1, *[forwards] * 3)):
        # Each wider than those before, so that scales move; after the first step several before a backward.
        inputs = [(torch.randn(SHAPE) * (1 + step + index)).requires_grad_() for index in range(count)]
        optimizer.zero_grad()
        losses = [model(input).square().mean() for input in inputs]
        if together:
            torch.stack(losses).sum().backward()  # the last forward's nodes first
        else:
            for loss in losses:
                loss.backward()
        results += losses + [input.grad for input in inputs]
        results += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
    # Batch normalization counts a batch again when it is recomputed, in any model.
    state = {name: value for name, value in model.state_dict().items() if "running_" not in name}
    return results, {name: value for name, value in state.items() if "num_batches_tracked" not in name}


def assert_same(make: Any, run: Run, config: QATConfig, forwards: int = 1, together: bool = False) -> None:
    expected, state = trained(make, called, config, forwards, together)
    actual, actual_state = trained(make, run, config, forwards, together)
    assert len(actual) == len(expected)
    assert all(map(torch.equal, actual, expected))
    assert all(torch.equal(value, state[name]) for name, value in actual_state.items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("run", [reentrant, recording])
@pytest.mark.parametrize("make", [whole, part])
def test_steps_are_those_without_checkpoints(make: Any, run: Run, config: QATConfig) -> None:
    assert_same(make, run, config)


@pytest.mark.parametrize("run", [reentrant, recording])
@pytest.mark.parametrize("make", [whole, part])
def test_without_compiled_kernels(make: Any, run: Run) -> None:
    with reference_kernels():
        assert_same(make, run, QATConfig())


@pytest.mark.parametrize("together", [True, False], ids=["one backward", "a backward each"])
@pytest.mark.parametrize("run", [reentrant, recording, nested(reentrant), nested(recording)])
@pytest.mark.parametrize("make", [whole, part])
def test_each_forward_is_recomputed_with_the_scales_it_had(make: Any, run: Run, together: bool) -> None:
    assert_same(make, run, QATConfig(), forwards=3, together=together)


def test_parts_of_a_sequence() -> None:
    def run(model: Any, input: Tensor) -> Any:
        return checkpoint_sequential(model, 2, input, use_reentrant=False)

    def make(run: Run, config: QATConfig) -> nn.Module:
        blocks = [prepare(Body(called), config, (torch.randn(SHAPE),)) for _ in range(3)]
        return Calls(run, nn.Sequential(*blocks))

    assert_same(make, run, QATConfig())


def test_the_wrapper_of_pytorch() -> None:
    def make(run: Run, config: QATConfig) -> nn.Module:
        prepared = prepare(Body(called), config, (torch.randn(SHAPE),))
        return prepared if run is called else checkpoint_wrapper(prepared)

    expected, _ = trained(make, called, QATConfig(), 1, False)
    actual, _ = trained(make, recording, QATConfig(), 1, False)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("run", [reentrant, recording])
def test_a_layer_outside_of_a_model(run: Run, learnable: bool) -> None:
    def make(run: Run, config: QATConfig) -> nn.Module:
        return Calls(run, FakeQuantizeLayer(learnable=learnable, layer=nn.Conv2d(3, 3, 3)))

    assert_same(make, run, QATConfig())


def test_a_failed_forward_leaves_the_present_state_in_place() -> None:
    torch.manual_seed(0)
    prepared = prepare(Body(called), QATConfig(), (torch.randn(SHAPE),))
    prepared(torch.randn(SHAPE))
    loss = recording(prepared, torch.randn(SHAPE, requires_grad=True) * 5).sum()
    state = {name: value.clone() for name, value in prepared.state_dict().items() if "scale" in name}
    loss.backward()  # ends the recomputation early, with an error inside
    assert not is_recomputing()
    assert all(torch.equal(value, prepared.state_dict()[name]) for name, value in state.items())


def test_what_is_kept_is_bounded() -> None:
    prepared = prepare(nn.Linear(3, 2), QATConfig(quantize_last_linear=True), (torch.randn(4, 3),))
    for _ in range(3):
        prepared(torch.randn(4, 3))
    history = prepared.observer_synchronizer.history  # type: ignore[union-attr]
    assert not history._replaced, "nothing, where nothing is checkpointed"
    for _ in range(FORWARDS_KEPT + 5):
        recording(prepared, torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert len(history._replaced) == FORWARDS_KEPT
    assert len(history._marks) <= 2 * FORWARDS_KEPT
