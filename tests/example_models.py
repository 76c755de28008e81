"""The example models with inputs for them, and a little training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from example_architectures import (
    Attention,
    BranchesAtRoot,
    BranchesInside,
    CalledTwice,
    Functional,
    InPlace,
    KeywordCalls,
    ManyResults,
    PreActivation,
    SmallResNet,
    TextClassifier,
    TiedLanguageModel,
    TransformerBlock,
    UNet,
    Unused,
    depthwise,
    mlp,
    signal,
    small_cnn,
    transposed,
    volume,
)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Example(NamedTuple):
    """A model and inputs for it; ``odd`` makes images and signals of another size."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False

    def inputs(self, batch: int = 4, odd: bool = False) -> tuple[Tensor, ...]:
        if self.tokens:
            return (torch.randint(20, (batch, *self.shape)),)
        shape = [size + 1 if odd and index > 0 else size for index, size in enumerate(self.shape)]
        return (torch.randn(batch, *shape) + 0.2,)


IMAGE = (3, 8, 8)
SIGNAL = (3, 16)
EXAMPLES: dict[str, Example] = {
    "cnn": Example(small_cnn, IMAGE),
    "resnet": Example(SmallResNet, IMAGE),
    "preactivation": Example(PreActivation, IMAGE),
    "functional": Example(Functional, IMAGE),
    "mlp": Example(mlp, (5,)),
    "branches inside": Example(BranchesInside, (5,)),
    "branches at root": Example(BranchesAtRoot, IMAGE),
    "called twice": Example(CalledTwice, IMAGE),
    "depthwise": Example(depthwise, IMAGE),
    "transposed": Example(transposed, IMAGE),
    "signal": Example(signal, SIGNAL),
    "volume": Example(volume, (2, 4, 6, 6)),
    "text": Example(TextClassifier, (6,), tokens=True),
    "tied": Example(TiedLanguageModel, (6,), tokens=True),
    "attention": Example(Attention, (5, 8)),
    "transformer": Example(TransformerBlock, (5, 8)),
    "many results": Example(ManyResults, (5,)),
    "unused": Example(Unused, (5,)),
    "in place": Example(InPlace, IMAGE),
    "unet": Example(UNet, IMAGE),
    "keyword calls": Example(KeywordCalls, (5,)),
    "single layer": Example(lambda: nn.Linear(5, 3), (5,)),
}


EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
SOME = ("resnet", "called twice", "branches inside", "text", "transformer", "single layer")
SOME_EXAMPLES = pytest.mark.parametrize("example", [EXAMPLES[name] for name in SOME], ids=SOME)
# For what depends on how a model is put together more than on the kinds of its layers: the others in the long tests.
OTHERS_LONG = pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=name, marks=() if name in SOME else pytest.mark.long)
        for name, example in EXAMPLES.items()
    ],
)


def results(model: nn.Module, *inputs: Any, **options: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever holds them."""
    return [leaf.detach() for leaf in tree_leaves(model(*inputs, **options))]


def all_equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether results are the same, bit for bit."""
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def train_briefly(model: nn.Module, inputs: tuple[Any, ...], steps: int = 2, learning_rate: float = 0.05) -> None:
    """A few optimizer steps on something that every parameter has a part in."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum((leaf - 0.3).square().mean() for leaf in tree_leaves(model(*inputs)))
        loss.backward()
        optimizer.step()


@torch.no_grad()
def make_batch_norms_awkward(model: nn.Module) -> None:
    """Scales that are negative, zero and tiny, which folding must survive."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.uniform_(-1.5, 1.5)
            module.weight[0] = 0.0
            module.weight[1] = 1e-20
            module.bias.uniform_(-1, 1)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.1, 2)
