"""Activation checkpointing: the same gradients, bit for bit, and the same statistics."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from combinations import half_of_all
from mlframework.quantization import FakeQuantizeLayer, HistogramObserver, QATConfig, QATSchedule, prepare
from mlframework.quantization.kernels import reference_kernels
from mlframework.quantization.qat.recomputation import ForwardHistory, is_recomputing

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


MAKES = {"whole": whole, "part": part}
RUNS = {"reentrant": reentrant, "recording": recording}


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


@half_of_all(make=MAKES, run=RUNS, config=CONFIGS)
def test_steps_are_those_without_checkpoints(make: Any, run: Run, config: QATConfig) -> None:
    assert_same(make, run, config)


@pytest.mark.parametrize("run", [reentrant, recording])
@pytest.mark.parametrize("make", [whole, part])
def test_without_compiled_kernels(make: Any, run: Run) -> None:
    with reference_kernels():
        assert_same(make, run, QATConfig())


@half_of_all(
    make=MAKES,
    run={**RUNS, "nested reentrant": nested(reentrant), "nested recording": nested(recording)},
    together={"one backward": True, "a backward each": False},
)
def test_each_forward_is_recomputed_with_the_scales_it_had(make: Any, run: Run, together: bool) -> None:
    assert_same(make, run, QATConfig(), forwards=3, together=together)


@pytest.mark.parametrize("run", [reentrant, recording])
def test_a_checkpoint_around_several_forwards_is_refused(run: Run) -> None:
    """The first has other scales than the second, and backward would run both again with these."""
    prepared = prepare(Body(called), QATConfig(), (torch.randn(SHAPE),))
    prepared(torch.randn(SHAPE))
    input = torch.randn(SHAPE, requires_grad=True)
    loss = run(lambda value: prepared(value) + prepared(2 * value), input).sum()
    with pytest.raises(RuntimeError, match="must be around one training forward of a model that observes, got several"):
        loss.backward()


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


# --- what is kept, for how long, and what is not known ----------------------------------------------------------------


def layer() -> nn.Module:
    prepared = prepare(nn.Linear(3, 2), QATConfig(quantize_last_linear=True), (torch.randn(4, 3),))
    prepared(torch.randn(4, 3))
    return prepared


def wider(step: int) -> Tensor:
    return (torch.linspace(-1, 1, 12).reshape(4, 3) * (1 + step)).requires_grad_()


def states_kept(model: nn.Module) -> int:
    history: ForwardHistory = model.observer_synchronizer.history  # type: ignore[union-attr, assignment]
    return len(history._replaced)


def gradient_of(run: Run, model: nn.Module, count: int, use: Callable[[nn.Module], object] = lambda model: None) -> Any:
    """Of the first of so many forwards, whose backward comes last."""
    inputs = [wider(step) for step in range(count)]
    losses = []
    for input in inputs:
        losses.append(run(model, input).square().sum())
        use(model)
    losses[0].backward()
    return inputs[0].grad


def test_without_checkpoints_nothing_is_kept() -> None:
    model = layer()
    for step in range(3):
        with torch.no_grad():
            model(wider(step))
        model(wider(step)).sum().backward()
        with torch.autograd.graph.save_on_cpu():
            model(wider(step)).sum().backward()
        assert not states_kept(model)


@pytest.mark.parametrize("run", [reentrant, recording])
def test_what_is_kept_is_what_may_run_again(run: Run) -> None:
    model, losses = layer(), []
    for step in range(5):
        losses.append(run(model, wider(step)).sum())
        losses[-1].backward()
        assert states_kept(model) <= 2  # of this step and, until the next one begins, of the one before
    for step in range(5):
        losses.append(run(model, wider(step)).sum())
    assert states_kept(model) >= 5
    for loss in losses[5:]:
        loss.backward()
    model(wider(0))  # with nothing that may run again
    assert not states_kept(model)


@pytest.mark.parametrize("run", [reentrant, recording])
def test_any_number_of_forwards_before_a_backward(run: Run) -> None:
    model = layer()
    expected = gradient_of(called, copy.deepcopy(model), 100)
    assert torch.equal(gradient_of(run, model, 100), expected)


@pytest.mark.parametrize("run", [reentrant, recording])
def test_a_graph_that_is_kept_is_recomputed_again_with_the_scales_it_had(run: Run) -> None:
    model, input = layer(), wider(0)
    loss = run(model, input).square().sum()
    gradients = []
    for step in range(3):
        gradients.append(torch.autograd.grad(loss, input, retain_graph=True) if run is recording else None)
        if run is reentrant:
            loss.backward(retain_graph=True)
            gradients[-1], input.grad = input.grad, None
        model(wider(step + 1))
    assert all(torch.equal(each[0], gradients[0][0]) for each in gradients)


class Rerun(torch.autograd.Function):
    """A checkpoint as others write it."""

    @staticmethod
    def forward(ctx: Any, function: Any, input: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(input)
        return function(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(input).backward(gradient)
        return None, input.grad


class RerunUnseen(Rerun):
    """Another one, whose forward does not get the node that its backward will be."""

    @staticmethod
    def forward(function: Any, input: Tensor) -> Any:  # type: ignore[override]
        return function(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(inputs[1])


def hooked(function: Any, input: Tensor) -> Any:
    def inner(input: Tensor) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return function(input)

    return recording(lambda input: inner(input).sin(), input)


@pytest.mark.parametrize("run", [Rerun.apply, hooked])
def test_others_ways_to_run_a_forward_again(run: Any) -> None:
    model = layer()
    plain = copy.deepcopy(model)
    expected = gradient_of((lambda model, input: model(input).sin()) if run is hooked else called, plain, 3)
    assert torch.equal(gradient_of(run, model, 3), expected)


def test_a_repetition_of_what_is_not_known_is_refused() -> None:
    """Unless the scales are still those that it had."""
    message = "a forward within backward must repeat a training forward.*whose scales have changed since"
    model = layer()
    with pytest.raises(RuntimeError, match=message):
        gradient_of(RerunUnseen.apply, model, 1)
    frozen = copy.deepcopy(model)
    QATSchedule(frozen, observe_from=1, quantize_from=1)
    expected = gradient_of(called, copy.deepcopy(frozen), 2)
    assert torch.equal(gradient_of(RerunUnseen.apply, frozen, 2), expected)
    assert isinstance(model.input_fake_quantize, FakeQuantizeLayer)
    scale = model.input_fake_quantize.scale.clone()
    # In evaluation mode, where layers observe nothing: before another training forward, and after one.
    gradient_of(recording, model.eval(), 2)
    with pytest.raises(RuntimeError, match=message):
        gradient_of(recording, model, 1, lambda model: (model.train()(wider(9)), model.eval()))
    assert not torch.equal(model.input_fake_quantize.scale, scale)


@pytest.mark.parametrize("run", [reentrant, recording])
def test_layers_that_observe_nothing(run: Run) -> None:
    """Learned scales, and no values at all."""
    learned = prepare(nn.Linear(3, 2), QATConfig(learnable=True), (torch.randn(4, 3),))
    learned(wider(0))
    assert torch.equal(gradient_of(run, learned, 3), gradient_of(called, copy.deepcopy(learned), 3))
    model = layer()
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = run(model, empty).sum()
    model(wider(5))
    loss.backward()
    assert empty.grad is not None


def test_copies_have_forwards_of_their_own() -> None:
    model = layer()
    loss = recording(model, wider(0)).sum()
    model(wider(1))
    assert states_kept(model)
    assert not states_kept(copy.deepcopy(model))
    assert not states_kept(pickle.loads(pickle.dumps(model)))
    loss.backward()
