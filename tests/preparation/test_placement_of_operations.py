"""Operations that keep values share a grid; sums, concatenations and averages get one of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_architectures import conv
from mlframework.quantization import QATConfig, calibrate, convert, prepare
from mlframework.quantization.int8.average_pooling import AveragePooling
from mlframework.quantization.int8.integer_operation import (
    Addition,
    Concatenation,
    IntegerOperation,
    Multiplication,
)
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.int8.operations import Dequantize
from mlframework.quantization.qat.qat_operation import QATOperation
from placement_probes import IMAGES, free_nodes, joined, output, placed, source, sums

SHARING: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: F.max_pool2d(x, 2),
    "reshape": lambda x: x.reshape(2, 4, 4, 16),
    "view": lambda x: x.view(2, 4, 4, 16),
    "transpose": lambda x: torch.transpose(x, 2, 3),
    "permute": lambda x: x.permute(0, 1, 3, 2).contiguous(),
    "slice": lambda x: x[:, :, ::2],
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "split": lambda x: torch.split(x, [4, 4], dim=3)[0],
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "clone": lambda x: x.clone(),
    "flatten": lambda x: torch.flatten(x, 2).unsqueeze(2),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 2),
    "pad": lambda x: F.pad(x, (1, 0, 0, 2)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, size=x.shape[2:], mode="nearest"),
    "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "relu later": lambda x: F.relu(F.max_pool2d(x, 2)),
}


NOT_SHARING: dict[str, Callable[[Tensor], Tensor]] = {
    "pad with a value": lambda x: F.pad(x, (1, 1), value=0.3),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
}


@pytest.mark.parametrize("operation", SHARING.values(), ids=SHARING)
def test_operations_that_keep_values_share_the_grid(operation: Callable[[Tensor], Tensor]) -> None:
    model = placed(lambda self, x: self.last(operation(self.first(x))), first=conv(3, 4), last=conv(4, 2))
    assert free_nodes(model) == ["x_fake_quantize"]
    assert source(model, "last") is output(model, "first")
    calibrate(model, [torch.randn(2, 3, 8, 8)])
    converted, x = convert(model.eval()), torch.randn(2, 3, 8, 8)
    assert sum(isinstance(module, Dequantize) for module in converted.modules()) == 1  # of the result
    with torch.no_grad():
        assert torch.equal(converted(x), model(x))


@pytest.mark.parametrize("operation", NOT_SHARING.values(), ids=NOT_SHARING)
def test_other_values_have_a_node_of_their_own(operation: Callable[[Tensor], Tensor]) -> None:
    model = placed(lambda self, x: self.last(operation(self.first(x))), first=conv(3, 4), last=conv(4, 2))
    assert len(free_nodes(model)) == 2


@pytest.mark.parametrize("module", [nn.Dropout(), nn.Identity(), nn.MaxPool2d(3, 1, 1, ceil_mode=True)], ids=str)
def test_modules_that_keep_values_share_the_grid(module: nn.Module) -> None:
    model = prepare(nn.Sequential(conv(3, 4), module, conv(4, 2)), None, (IMAGES,))
    assert source(model, "2") is output(model, "0")


def test_consumers_share_one_node() -> None:
    model = placed(
        lambda self, x: self.left(x) + self.middle(F.max_pool2d(x, 3, 1, 1)) + self.right(x),
        left=conv(3, 4),
        middle=conv(3, 4),
        right=conv(3, 4),
    )
    assert free_nodes(model) == ["x_fake_quantize"]
    assert source(model, "left") is source(model, "middle") is source(model, "right") is model.x_fake_quantize


NEW_VALUES: dict[str, tuple[type[IntegerOperation], Callable[[Tensor, Tensor], Tensor]]] = {
    "cat": (Concatenation, lambda a, b: torch.cat([a, b], 1)),
    "average pool": (AveragePooling, lambda a, b: F.avg_pool2d(a, 2)),
    "adaptive": (AveragePooling, lambda a, b: F.adaptive_avg_pool2d(a, (2, 1))),
    "mean": (AveragePooling, lambda a, b: a.mean((2, 3), keepdim=True)),
    "product": (Multiplication, lambda a, b: a * b),
    "gate": (Multiplication, lambda a, b: a * torch.sigmoid(b)),
    "squeeze and excite": (Multiplication, lambda a, b: a * F.hardsigmoid(F.adaptive_avg_pool2d(a, 1))),
    "silu written out": (Lookup, lambda a, b: a * torch.sigmoid(a)),
    "hardswish written out": (Lookup, lambda a, b: a * F.relu6(a + 3) / 6),
    "number": (Lookup, lambda a, b: 1 - a * 0.5),
    "gelu": (Lookup, lambda a, b: F.gelu(a, approximate="tanh")),
    "pooled table": (AveragePooling, lambda a, b: F.avg_pool2d(F.silu(a), 2)),
    "joined tables": (Concatenation, lambda a, b: torch.cat([F.silu(a), F.hardswish(b)], 1)),
    "added tables": (Addition, lambda a, b: F.silu(a) + F.leaky_relu(b)),
    "excited table": (Multiplication, lambda a, b: F.silu(a) * torch.sigmoid(F.adaptive_avg_pool2d(F.silu(a), 1))),
    "in place": (Lookup, lambda a, b: F.silu(a, inplace=True)),
}


@pytest.mark.parametrize(("kind", "operation"), NEW_VALUES.values(), ids=NEW_VALUES)
def test_new_values_are_computed_on_codes(
    kind: type[IntegerOperation], operation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    channels = operation(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)).shape[1]
    model = placed(
        lambda self, x: self.last(operation(self.left(x), self.right(x))),
        left=conv(3, 4),
        right=conv(3, 4),
        last=nn.Conv2d(channels, 2, 1),
    )
    assert free_nodes(model) == ["x_fake_quantize"]
    assert [entry for entry in joined(model, kind) if entry.output_fake_quantize is source(model, "last")]
    calibrate(model, [torch.randn(4, 3, 8, 8)])
    converted, x = convert(model.eval()), torch.randn(8, 3, 8, 8)
    assert sum(isinstance(module, Dequantize) for module in converted.modules()) == 1  # of the result
    with torch.no_grad():
        assert torch.equal(converted(x), model(x))


def test_the_parts_of_a_split_may_be_read_as_a_whole() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.cat(self.first(x).split([1, 3], 1)[::-1], 1))

    model = placed(forward, first=conv(3, 4), last=conv(4, 2))
    calibrate(model, [torch.randn(4, 3, 8, 8)])
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(convert(model.eval())(x), model(x))


def test_a_region_is_one_table_and_its_parts_may_have_other_readers() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        gate = torch.tanh(y * 2)
        return self.last(y * gate + 1), gate

    model = placed(forward, first=conv(3, 3), last=conv(3, 2))
    (table,) = joined(model)
    assert table.sources == (output(model, "first"),)
    calibrate(model, [torch.randn(4, 3, 8, 8)])
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        results = convert(model.eval())(x), model(x)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "normalize",
    [
        lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x / (1 + x.abs()),
        lambda x: x * torch.log(x.abs() + 1),
        lambda x: torch.softmax(x, 1),
    ],
    ids=["root mean square", "centred", "quotient", "logarithm", "softmax"],
)
def test_other_functions_stay_float(normalize: Callable[[Tensor], Tensor]) -> None:
    model = placed(lambda self, x: self.last(normalize(self.first(x))), first=conv(3, 4), last=conv(4, 2))
    assert not joined(model)


@pytest.mark.parametrize(
    "add",
    [lambda a, b: a + b, torch.add, lambda a, b: a.add(b), lambda a, b: a.add_(b)],
    ids=["operator", "function", "method", "in place"],
)
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
def test_a_residual_sum_adds_codes(add: Callable[..., Tensor], relu: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = add(self.body(x), self.skip(x))
        return self.last(F.relu(y) if relu else y)

    model = placed(forward, body=conv(3, 3), skip=conv(3, 3), last=conv(3, 2))
    (total,) = sums(model)
    assert source(model, "last") is total.output_fake_quantize
    assert total.sources == (output(model, "body"), output(model, "skip"))
    assert total.output_fake_quantize.scheme.symmetric is relu


def test_a_relu_on_a_sum_that_others_read_is_a_table() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        return self.last(F.relu(y)) + y

    model = placed(forward, first=conv(3, 3), second=conv(3, 3), last=conv(3, 3))
    assert free_nodes(model) == ["x_fake_quantize"]
    (total,), (table,) = sums(model), joined(model, Lookup)
    assert table.sources == (total.output_fake_quantize,)
    assert source(model, "last") is table.output_fake_quantize


def test_a_relu_shares_the_grid_of_a_sum_that_a_layer_reads() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        return self.last(F.relu(y)) + self.other(y)

    model = placed(forward, **{name: conv(3, 3) for name in ("first", "second", "last", "other")})
    (total,) = sums(model)
    assert source(model, "last") is source(model, "other") is total.output_fake_quantize


@pytest.mark.parametrize(
    "forward",
    [lambda self, x: self.layer(x) + 1, lambda self, x: torch.add(self.layer(x), x, alpha=2)],
    ids=["number", "factor"],
)
def test_other_additions_stay_float(forward: Callable[..., Tensor]) -> None:
    assert not sums(placed(forward, layer=conv(3, 3)))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.linear(x) + mask).softmax(-1))


def test_a_mask_of_infinities_is_added_in_float() -> None:
    mask = torch.zeros(6)
    mask[3:] = -torch.inf
    model = Masked()
    prepared = prepare(model, QATConfig(), (torch.randn(2, 6), mask))
    calibrate(prepared, [(torch.randn(16, 6), mask)])
    assert not any(isinstance(module, QATOperation) for module in prepared.modules())
    seen: list[Tensor] = []
    node = dict(prepared.named_modules())["softmax_fake_quantize"]
    node.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        prepared.eval()(torch.randn(4, 6), mask)
    assert not seen[0][:, 3:].any()


@pytest.mark.parametrize("hidden", [-1e9, -1e4, 0.0])
def test_a_mask_that_the_model_computes_is_added_in_float(hidden: float) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        scores = self.body(x)
        return self.last((scores + (x > 0) * hidden).softmax(-1))

    assert not sums(placed(forward, body=conv(3, 3), last=conv(3, 2)))


def test_a_sum_with_a_value_computed_in_float_is_computed_in_float() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.body(x) + x.cumsum(1))

    model = placed(forward, body=conv(3, 3), last=conv(3, 2))
    assert not sums(model)
    assert source(model, "last") is model.add_fake_quantize


@pytest.mark.parametrize("tail", [nn.LogSoftmax(1), nn.Sigmoid(), nn.Identity()], ids=lambda tail: type(tail).__name__)
def test_the_last_linear_stays_float_before_what_makes_probabilities(tail: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), tail)
    prepared = prepare(model, QATConfig(), (torch.randn(2, 6),))
    assert prepared[2].output_fake_quantize is None
    assert prepared[0].output_fake_quantize is not None


def test_an_override_that_quantizes_the_last_linear_counts() -> None:
    config = QATConfig(overrides={"1": QATConfig(quantize_last_linear=True)})
    prepared = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), config, (torch.randn(2, 6),))
    assert prepared[1].output_fake_quantize is not None


def test_the_input_has_the_finest_grid_that_its_readers_ask_for() -> None:
    config = QATConfig(weight_bits=4, activation_bits=4, overrides={"0": QATConfig()})
    prepared = prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), config, (torch.randn(2, 6),))
    assert prepared[0].input_source.scheme.bits == 8
    assert prepared[1].weight_fake_quantize.scheme.bits == 4
