"""Code that asks for shapes, types and arguments is traced, and what it was told is guarded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from mlframework.quantization import FakeQuantizeLayer, QATConfig, calibrate, convert, preparation_report, prepare


@dataclass
class Result(OrderedDict):  # type: ignore[type-arg]
    """A dictionary that is a dataclass, as the results of Hugging Face's ``transformers`` are."""

    logits: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


_pytree.register_pytree_node(
    Result,
    lambda result: (list(result.values()), list(result)),
    lambda values, names: Result(**dict(zip(names, values, strict=True))),
)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def both(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


class ReturnsDataclass(Layers):
    def forward(self, x: Tensor) -> Result:
        return Result(self.both(x))


class ChecksShape(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("three channels, please")
        return self.both(x)


class PadsBySize(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(F.pad(x, (0, int(x.shape[-1]) % 4)))


class ComparesBatches(Layers):
    """Expands where it need not: the answer hangs on the batch size, the result does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset
        if offset.shape[0] != x.shape[0]:
            offset = offset.expand(x.shape[0], -1, -1, -1)
        return self.both(x + offset)


class AsksDtypeOfWeight(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.first.weight.dtype:
            x = x.double().to(self.first.weight.dtype)
        return self.both(x)


class IteratesOverParts(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.cat([part * 2 for part in x.chunk(2, -1)], -1))


class TakesFlag(Layers):
    def forward(self, x: Tensor, doubled: bool = False, **kwargs: Any) -> Tensor:
        y = self.both(x)
        return y + y if doubled or kwargs.get("twice", False) else y


EVERY = pytest.mark.parametrize(
    "kind",
    [ReturnsDataclass, ChecksShape, PadsBySize, ComparesBatches, AsksDtypeOfWeight, IteratesOverParts],
)


def images(size: int = 2, side: int = 6) -> Tensor:
    return torch.randn(size, 3, side, side)


def values(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result["logits"]


@EVERY
@pytest.mark.parametrize("size", [1, 4])
def test_is_traced_and_takes_any_batch(kind: type[nn.Module], size: int) -> None:
    model = kind().eval()
    prepared = prepare(model, QATConfig(), (images(2 if size == 1 else 1),))
    assert not any("alone" in entry.detail for entry in preparation_report(prepared).entries)
    calibrate(prepared, [images(8)])
    converted = convert(prepared)
    x = images(size)
    with torch.no_grad():
        assert type(prepared(x)) is type(model(x)) is type(converted(x))
        assert torch.equal(values(prepared(x)), values(converted(x)))
        torch.testing.assert_close(values(prepared(x)), values(model(x)), atol=0.1, rtol=0)  # eight bits


def test_no_float_weight_is_kept_for_its_dtype() -> None:
    prepared = prepare(AsksDtypeOfWeight(), QATConfig(), (images(),))
    calibrate(prepared, [images(8)])
    assert not list(convert(prepared).parameters())


@pytest.mark.parametrize("kind", [PadsBySize, ChecksShape])
def test_another_answer_is_refused(kind: type[nn.Module]) -> None:
    prepared = prepare(kind(), QATConfig(), (images(),))
    x = images(side=7) if kind is PadsBySize else torch.randn(2, 4, 6, 6)
    with pytest.raises(AssertionError, match="the model was traced with"):
        prepared(x)


@pytest.mark.parametrize("name", ["doubled", "twice"])
def test_flags_are_arguments(name: str) -> None:
    model = TakesFlag()
    prepared = prepare(model, QATConfig(), (images(),), {name: True})
    assert not any("alone" in entry.detail for entry in preparation_report(prepared).entries)
    calibrate(prepared, [{"x": images(8), name: True}])
    with pytest.raises(AssertionError, match=f"traced with {name} = True"):
        prepared(images(), **{name: False})


class Drops(nn.Module):
    """Passes a probability of its own in each mode, as Hugging Face's attention does."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.first, self.attends = nn.Linear(8, 8), attends

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        p = 0.5 if self.training else 0.0
        if self.attends:
            return F.scaled_dot_product_attention(x, x, x, None, dropout_p=p)
        return F.dropout(x, p=p, training=self.training)


@pytest.mark.parametrize("attends", [False, True])
def test_dropout_follows_the_mode(attends: bool) -> None:
    prepared = prepare(Drops(attends), QATConfig(), (torch.randn(2, 5, 8),))
    assert not any("alone" in entry.detail for entry in preparation_report(prepared).entries)
    assert [module.p for module in prepared.modules() if hasattr(module, "p")] == [0.5]
    x = torch.randn(2, 5, 8)
    calibrate(prepared, [x])
    for layer in prepared.modules():
        if isinstance(layer, FakeQuantizeLayer):
            layer.observer.enabled = False
    assert not torch.equal(prepared.train()(x), prepared(x))
    assert torch.equal(prepared.eval()(x), prepared(x))


class ReadsLayer(nn.Module):
    """Cannot be traced, and reads attributes of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.layer(x.to(self.layer.weight.dtype)) * self.layer.stride[0]


def test_layers_between_floats_keep_their_attributes() -> None:
    prepared = prepare(ReadsLayer(), QATConfig(), (images(),))
    calibrate(prepared, [images(8)])
    x = images()
    with torch.no_grad():
        assert torch.equal(convert(prepared)(x), prepared(x))
