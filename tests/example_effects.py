"""Blocks whose code does more than compute values, one for each thing that a graph would lose; and models of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 4
Forward = Callable[["Block", Tensor], Tensor]


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Notes:
    """What a block holds that is no module."""

    def __init__(self) -> None:
        self.steps = 0
        self.history: dict[str, list[int]] = {"steps": []}


class Block(nn.Module):
    """Layers, a layer that the block's own code calls, and state that this may write."""

    mean: Tensor

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.inner, self.layer = layers(), nn.Linear(WIDTH, WIDTH)
        self.helper = Helper()
        self.count, self.seen, self.notes = 0, [], Notes()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def extra_repr(self) -> str:
        return self.function.__name__


class Helper(nn.Module):
    """What blocks call with more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layer = layers(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any, gate: Tensor | None = None, *, times: int = 1, change: str = "") -> Any:
        if change == "items":
            x[0] = self.inner(x[0])
            return x if self.training else tuple(x)
        if change == "pop":
            return self.layer(x.pop()) + self.inner(x[0])
        if change == "dictionary":
            x["y"] = self.inner(x["x"])
            return x["y"] + self.layer(x["x"])
        y = self.inner(x)
        for _ in range(times):
            y = self.layer(y)
        return y if gate is None else y * gate


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Sign(torch.autograd.Function):
    """Straight through, where PyTorch's own has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


reverse = Reversal.apply


def plain(block: Block, x: Tensor) -> Tensor:
    return block.layer(block.inner(x)) + x


# --- gradient modes ---------------------------------------------------------------------------------------------------


def freezes(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = block.inner(x)
    return block.layer(y) + x


@torch.no_grad()
def is_decorated(block: Block, x: Tensor) -> Tensor:
    return block.layer(block.inner(x))


def switches_gradients(block: Block, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = block.inner(x)
    torch.set_grad_enabled(before)
    return block.layer(y) + x


def detaches(block: Block, x: Tensor) -> Tensor:
    return block.layer(block.inner(x).detach()) + x


# --- custom backward functions ----------------------------------------------------------------------------------------


def reverses(block: Block, x: Tensor) -> Tensor:
    return block.layer(reverse(block.inner(x)))


def binarizes(block: Block, x: Tensor) -> Tensor:
    return block.layer(Sign.apply(block.inner(x)))


def scales_gradients(block: Block, x: Tensor) -> Tensor:
    return Scaled.apply(block.layer(block.inner(x)), 0.1)


# --- random branches --------------------------------------------------------------------------------------------------


def drops_layers(block: Block, x: Tensor) -> Tensor:
    for _ in range(3):
        if block.training and torch.rand([]) < 0.5:
            continue
        x = block.inner(x)
    return block.layer(x)


def drops_layers_by_python(block: Block, x: Tensor) -> Tensor:
    if block.training and random.random() < 0.5:
        return x
    return block.layer(block.inner(x))


def drops_paths(block: Block, x: Tensor) -> Tensor:
    y = block.layer(block.inner(x))
    if block.training:
        y = y * torch.floor(0.8 + torch.rand([x.shape[0], 1])) / 0.8
    return y + x


def adds_noise(block: Block, x: Tensor) -> Tensor:
    if block.training:
        x = x + 0.1 * torch.randn_like(x)
    return block.layer(block.inner(x))


def drops_out(block: Block, x: Tensor) -> Tensor:
    return block.layer(F.dropout(block.inner(x), 0.3, block.training))


# --- state ------------------------------------------------------------------------------------------------------------


def counts(block: Block, x: Tensor) -> Tensor:
    block.count += 1
    return block.layer(block.inner(x))


def sets_a_buffer(block: Block, x: Tensor) -> Tensor:
    y = block.layer(block.inner(x))
    block.mean = 0.9 * block.mean + 0.1 * y.detach().mean(0)
    return y


def sets_data(block: Block, x: Tensor) -> Tensor:
    y = block.layer(block.inner(x))
    block.mean.data = 0.9 * block.mean + 0.1 * y.detach().mean(0)
    return y


def updates_a_buffer(block: Block, x: Tensor) -> Tensor:
    y = block.layer(block.inner(x))
    if block.training:
        block.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
    return y - block.mean


def appends(block: Block, x: Tensor) -> Tensor:
    y = block.layer(block.inner(x))
    block.seen.append(float(y.detach().sum()))
    return y


def counts_elsewhere(block: Block, x: Tensor) -> Tensor:
    block.notes.steps += 1
    return block.layer(block.inner(x))


def appends_elsewhere(block: Block, x: Tensor) -> Tensor:
    block.notes.history["steps"].append(len(block.notes.history["steps"]))
    return block.layer(block.inner(x))


def clips_a_weight(block: Block, x: Tensor) -> Tensor:
    block.layer.weight.data.clamp_(-0.3, 0.3)
    return block.layer(block.inner(x))


# --- checkpointing and autocast ---------------------------------------------------------------------------------------


def checkpoints(block: Block, x: Tensor) -> Tensor:
    return block.layer(checkpoint(block.helper.layer, x, use_reentrant=False))


def checkpoints_reentrantly(block: Block, x: Tensor) -> Tensor:
    return block.layer(checkpoint(block.helper.layer, x, use_reentrant=True))


def leaves_autocast(block: Block, x: Tensor) -> Tensor:
    y = block.inner(x)
    with torch.autocast("cpu", enabled=False):
        return block.layer(y.float())


def enters_autocast(block: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block.layer(x)
    return block.inner(y.float())


def asks_for_autocast(block: Block, x: Tensor) -> Tensor:
    y = block.layer(x)
    return y if torch.is_autocast_enabled("cpu") else block.inner(y)


# --- arguments --------------------------------------------------------------------------------------------------------


def has_items_written(block: Block, x: Tensor) -> Tensor:
    values = [x, x * 2]
    result = block.helper(values, change="items")
    return block.layer(result[0] + result[1] + values[0])


def has_items_popped(block: Block, x: Tensor) -> Tensor:
    values = [x, block.inner(x)]
    return block.helper(values, change="pop") * len(values)


def has_a_key_added(block: Block, x: Tensor) -> Tensor:
    values = {"x": block.inner(x)}
    return block.helper(values, change="dictionary") + values["y"]


def passes_a_gate(block: Block, x: Tensor) -> Tensor:
    return block.helper(block.inner(x)) + block.helper(x, torch.sigmoid(x))


def passes_keywords(block: Block, x: Tensor) -> Tensor:
    return block.helper(x, times=2) + block.layer(x)


# --- sizes ------------------------------------------------------------------------------------------------------------


def iterates(block: Block, x: Tensor) -> Tensor:
    return torch.stack([block.layer(row) for row in block.inner(x)])


def unbinds(block: Block, x: Tensor) -> Tensor:
    return torch.stack([block.layer(row) * (index + 1) for index, row in enumerate(x.unbind(0))])


def zips(block: Block, x: Tensor) -> Tensor:
    return torch.stack([a + b for a, b in zip(block.inner(x), block.layer(x), strict=True)])


def slices_rows(block: Block, x: Tensor) -> Tensor:
    y = block.inner(x)
    return torch.cat([block.layer(y[index : index + 1]) for index in range(x.shape[0])])


def cuts_long_batches(block: Block, x: Tensor) -> Tensor:
    y = block.layer(block.inner(x))
    return y * 2 if len(x) > 4 else y


def averages_by_length(block: Block, x: Tensor) -> Tensor:
    return block.layer(x) + block.inner(x).sum(0) / len(x)


def makes_tensors(block: Block, x: Tensor) -> Tensor:
    offset = torch.zeros(x.size(0), WIDTH) + torch.ones(*x.shape) * torch.tensor(x.size(1))
    return block.layer(block.inner(x)) + offset


EFFECTS: dict[str, Forward] = {
    function.__name__: function
    for function in (
        plain, freezes, is_decorated, switches_gradients, detaches, reverses, binarizes, scales_gradients, drops_layers,
        drops_layers_by_python, drops_paths, adds_noise, drops_out, counts, sets_a_buffer, sets_data, updates_a_buffer,
        appends, checkpoints, checkpoints_reentrantly, leaves_autocast, enters_autocast, has_items_written,
        has_items_popped, has_a_key_added, passes_a_gate, passes_keywords, iterates, unbinds, zips, averages_by_length,
        makes_tensors, counts_elsewhere, appends_elsewhere, clips_a_weight, asks_for_autocast,
        slices_rows, cuts_long_batches,
    )
}  # fmt: skip

PATCHES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda block: block,
    "linear": lambda block: _patched(block, "inner.0"),
    "relu": lambda block: _patched(block, "inner.2"),
    "container": lambda block: _patched(block, "inner"),
}


def _patched(block: nn.Module, name: str) -> nn.Module:
    module = block.get_submodule(name)
    own = module.forward
    if name == "inner":  # a method, which copies take along
        module.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, module)  # type: ignore[method-assign]
    else:
        module.forward = lambda *args, **kwargs: own(*args, **kwargs) * 2  # type: ignore[method-assign]
    return block


class Model(nn.Module):
    """Blocks in a row, of which every second is called through a container, between layers."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(block, nn.ReLU()) if index % 2 else block for index, block in enumerate(blocks)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, offset: float = 0.0) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + offset if scale is None else self.head(x) * scale
