"""What containers are given and return, in structures of every kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from example_containers import IMAGES, calibrated, disabled, prepared
from mlframework.quantization import calibrate, convert

pytestmark = pytest.mark.slow


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Record:
    first: Tensor
    second: Tensor | None = None


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.make = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.a(x), self.b(x))


class Reads(nn.Module):
    def __init__(self, make: Callable[[Tensor, Tensor], Any], read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inner, self.outer, self.read = Returns(make), Takes(read), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        values = self.inner(x)
        return self.read(self.outer(values, scale=2.0)), values


class Takes(nn.Module):
    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(4, 4, 1), read

    def forward(self, values: Any, *, scale: float) -> Tensor:
        first, second = self.read(values)
        return self.conv(first) * scale + second


STRUCTURES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tuple": (lambda a, b: (a, b), tuple),
    "list": (lambda a, b: [a, b], tuple),
    "nested": (lambda a, b: {"a": [a, None], "b": (b, "text")}, lambda v: (v["a"][0], v["b"][0])),
    "named tuple": (Pair, lambda v: (v.first, v.second)),
    "dataclass": (Record, lambda v: (v.first, v.second)),
    "ordered dictionary": (lambda a, b: OrderedDict(x=a, y=b), lambda v: (v["x"], v["y"])),
    "the same twice": (lambda a, b: (a, a + b, a), lambda v: (v[0], v[1])),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_pass_between_containers(structure: str) -> None:
    model = Reads(*STRUCTURES[structure]).eval()
    result = prepared(model)
    calibrate(result, [IMAGES])
    converted = convert(result)
    with torch.no_grad():
        expected, actual = result.eval()(IMAGES), converted(IMAGES)
        assert type(actual[1]) is type(expected[1]) is type(model(IMAGES)[1])
        assert torch.equal(actual[0], expected[0])
        seen = seen_by_hooks_of_structures(converted), seen_by_hooks_of_structures(result)
    assert all(map(torch.equal, *seen))
    disabled(result)
    assert torch.equal(result(IMAGES)[0], model(IMAGES)[0])


def seen_by_hooks_of_structures(model: nn.Module) -> list[Tensor]:
    seen: list[Any] = []
    for module in (model.inner, model.outer):
        module.register_forward_hook(lambda module, args, output: seen.extend((args, output)))
    model(IMAGES)
    return [
        leaf
        for leaf in tree_leaves([vars(v) if isinstance(v, Record) else v for v in seen])
        if isinstance(leaf, Tensor)
    ]


def changes_in_place(self: Any, x: Tensor) -> Tensor:
    return self.conv(x.relu_())


class InPlace(nn.Module):
    """Its block changes what it is given, which is read again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.block(y) + y


def test_a_block_that_changes_its_argument() -> None:
    model = InPlace().eval()
    result = calibrated(model)
    with torch.no_grad():
        assert torch.equal(convert(result)(IMAGES), result(IMAGES))
    assert torch.equal(disabled(result)(IMAGES), model(IMAGES))
