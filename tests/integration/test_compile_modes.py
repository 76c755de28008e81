"""``torch.compile`` of training with batches of any size, and with checkpoints.

Models have seen two batches before, so that one training graph is compiled and not two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from example_models import EXAMPLES
from mlframework.quantization import QATConfig, prepare

# The compiler warns of its own internals (autograd.Function instantiated, .grad of a non-leaf read) while it traces.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

Batches = list[tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _prepared(name: str, learnable: bool = False) -> nn.Module:
    example = EXAMPLES[name]
    model = prepare(example.make(), QATConfig(learnable=learnable), example.inputs())
    for _ in range(2):
        model(*example.inputs())
    return model


def _train(
    model: nn.Module,
    batches: Batches,
    compiled: Callable[..., Any] | None = None,
) -> list[Tensor]:
    """Steps of SGD; the outputs and, of the last step, gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for batch in batches:
        optimizer.zero_grad()
        output = (model if compiled is None else compiled)(*batch)
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_batches_of_all_sizes_share_a_graph() -> None:
    """Also where the gradient of a learned scale is scaled by the number of elements."""
    model = _prepared("transformer", learnable=True)
    eager = copy.deepcopy(model)
    batches = [EXAMPLES["transformer"].inputs(size) for size in (16, 12, 9)]
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    # aot_eager calls the operators that eager code calls. Gradients of learned scales alone are rounded once more,
    # which moves what comes after by a few units in the last place.
    torch.testing.assert_close(_train(model, batches, compiled), _train(eager, batches), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_a_compiled_model_is_refused(use_reentrant: bool) -> None:
    """As it is compiled. With learned scales nothing lands in between, and gradients are those of the plain model."""

    def gradients(compiled: Callable[..., Tensor], model: nn.Module) -> list[Tensor]:
        input = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model.zero_grad()
        checkpoint(compiled, input, use_reentrant=use_reentrant).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for learnable in (False, True):
        model = prepare(network, QATConfig(learnable=learnable), (torch.randn(8, 6),))
        model(torch.randn(8, 6))
        compiled = torch.compile(model, backend="eager")
        if learnable:
            torch.testing.assert_close(gradients(compiled, model), gradients(model, model))
        else:
            with pytest.raises(RuntimeError, match="checkpoint around a compiled model cannot be recomputed"):
                gradients(compiled, model)
