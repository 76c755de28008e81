"""``torch.compile`` of training with batches of any size, under autocast, on ranks, by Inductor, and with checkpoints.

Models have seen two batches before, so that one training graph is compiled and not two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from example_models import EXAMPLES, Example
from mlframework.quantization import FakeQuantizeLayer, QATConfig, convert, prepare
from ranks import RANKS, process_group, run_ranks

# The compiler warns of its own internals (autograd.Function instantiated, .grad of a non-leaf read) while it traces.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("fresh_compiler")]

Batches = list[tuple[Tensor, ...]]


def _prepared(example: Example, learnable: bool = False) -> nn.Module:
    model = prepare(example.make(), QATConfig(learnable=learnable), example.inputs())
    for _ in range(2):
        model(*example.inputs())
    return model


def _train(
    model: nn.Module,
    batches: Batches,
    compiled: Callable[..., Any] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """Steps of SGD; the outputs and, of the last step, gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for batch in batches:
        optimizer.zero_grad()
        with context():
            output = (model if compiled is None else compiled)(*batch)
        output.float().square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["mlp", pytest.param("transformer", marks=pytest.mark.long)])
def test_batches_of_all_sizes_share_a_graph(name: str) -> None:
    """Also where the gradient of a learned scale is scaled by the number of elements."""
    model = _prepared(EXAMPLES[name], learnable=True)
    eager = copy.deepcopy(model)
    batches = [EXAMPLES[name].inputs(size) for size in (16, 12, 9)]
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    # aot_eager calls the operators that eager code calls; sums of gradients may be in another order,
    # which moves what comes after by a few units in the last place.
    torch.testing.assert_close(_train(model, batches, compiled), _train(eager, batches), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("name", "learnable"), [("resnet", True), pytest.param("transformer", False, marks=pytest.mark.long)]
)
def test_training_under_autocast(name: str, learnable: bool) -> None:
    model = _prepared(EXAMPLES[name], learnable)
    eager, batches = copy.deepcopy(model), [EXAMPLES[name].inputs(8) for _ in range(3)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    # aot_eager calls the operators that eager code calls, but the compiler may add gradients up in another order.
    results = _train(model, batches, compiled, autocast), _train(eager, batches, None, autocast)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)


# By whether scales are learned.
ON_RANKS = {
    False: Example(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), (8,)
    ),
    True: EXAMPLES["transformer"],
}


def _on_half_of_the_batches(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        dist._DEFAULT_FIRST_BUCKET_BYTES = 512  # which no other bucket may fall below
        for learnable, example in ON_RANKS.items():
            torch.manual_seed(0)
            model = _prepared(example, learnable)
            batches = [(batch.chunk(RANKS)[rank],) for (batch,) in (example.inputs(16),) * 3]
            states = []
            for compiles in (False, True):
                wrapped = DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=0.0005)
                compiled = torch.compile(wrapped, backend="aot_eager") if compiles else wrapped
                gradients = _train(wrapped, batches, compiled)
                states.append((gradients, wrapped.module.state_dict()))
            torch.save(states, f"{folder}/{rank}_{learnable}.pt")


def test_training_on_two_ranks(tmp_path: Path) -> None:
    """DDPOptimizer splits the graph where a bucket of gradients is complete: these are of half a kilobyte."""
    run_ranks(_on_half_of_the_batches, str(tmp_path))
    for learnable in ON_RANKS:
        states = [torch.load(tmp_path / f"{rank}_{learnable}.pt") for rank in range(RANKS)]
        for eager, compiled in states:
            # Buckets may be summed in another order.
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(states[0][1][1], states[1][1][1], rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_inductor_trains_evaluates_and_runs_what_is_converted(mode: str) -> None:
    """Of two layers, for which it tunes as few products as there can be."""
    torch.manual_seed(0)
    batches = [(torch.randn(64, 6),) for _ in range(2)]
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prepared = prepare(network, QATConfig(), batches[0])
    for batch in batches:
        prepared(*batch)
    eager = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True, mode=mode)
    losses = [
        [output.square().mean() for output in _train(model, batches, call)[: len(batches)]]
        for model, call in ((prepared, compiled), (eager, None))
    ]
    # Compiled sums run in another order, so that a value next to a rounding boundary may fall to the other side of it.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-4)
    prepared.eval()
    with torch.no_grad():
        expected = prepared(*batches[0])
        assert torch.equal(compiled(*batches[0]), expected)
        assert torch.equal(torch.compile(convert(prepared), fullgraph=True, mode=mode)(*batches[0]), expected)


class Checkpointed(nn.Module):
    """Runs its layers again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(self.layers, input, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_checkpoints_inside_are_refused(fullgraph: bool) -> None:
    """The graph breaks there, and compiled hooks do not keep the scales that the forward had."""
    shape = (8, 3, 6, 6)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Checkpointed(), nn.Flatten(), nn.Linear(108, 5))
    model = prepare(network, QATConfig(), (torch.randn(shape),))
    for _ in range(2):
        model(torch.randn(shape))
    message = "Unsafe side effect" if fullgraph else "cannot be recomputed with the scales that its forward had"
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    with pytest.raises(RuntimeError, match=message):
        compiled(torch.randn(shape)).sum().backward()


@pytest.mark.parametrize(
    ("use_reentrant", "is_compiled_before"),
    [
        (False, True),
        (True, False),
        *(pytest.param(each, each, marks=pytest.mark.long) for each in (False, True)),
    ],
)
def test_a_checkpoint_around_a_compiled_model_is_refused(use_reentrant: bool, is_compiled_before: bool) -> None:
    """Also of one that is not compiled again for it."""
    model = prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), QATConfig(), (torch.randn(8, 6),))
    model(torch.randn(8, 6))
    compiled = torch.compile(model, backend="aot_eager" if is_compiled_before else "eager")
    if is_compiled_before:
        compiled(torch.randn(8, 6, requires_grad=True)).sum().backward()
    with pytest.raises(RuntimeError, match="checkpoint around a compiled model cannot be recomputed"):
        _run_again(compiled, use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_around_a_compiled_model_that_observes_nothing(use_reentrant: bool) -> None:
    """With learned scales nothing lands in between, and gradients are those of the plain model."""
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    model = prepare(network, QATConfig(learnable=True), (torch.randn(8, 6),))
    model(torch.randn(8, 6))
    gradients = []
    for called in (torch.compile(model, backend="eager"), model):
        model.zero_grad()
        _run_again(called, use_reentrant)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


def _run_again(called: Callable[..., Tensor], use_reentrant: bool) -> None:
    input = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    checkpoint(called, input, use_reentrant=use_reentrant).square().sum().backward()


def test_a_checkpoint_around_a_compiled_part_is_refused() -> None:
    """Of a model that is not compiled itself, and of a layer in none."""
    shape = (8, 3, 6, 6)
    model = prepare(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Checkpointed()), QATConfig(), (torch.randn(shape),))
    model(torch.randn(shape))
    model.get_submodule("2.layers").compile(backend="eager")
    layer = FakeQuantizeLayer()
    compiled = torch.compile(layer, backend="eager")
    compiled(torch.randn(8, 6, requires_grad=True)).sum().backward()
    for run in (lambda: model(torch.randn(shape)).sum().backward(), lambda: _run_again(compiled, False)):
        with pytest.raises(RuntimeError, match="checkpoint around a compiled model cannot be recomputed"):
            run()
