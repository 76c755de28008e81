"""Which calls have an integer form: each form computes, on floats, what the call computes, bit for bit."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from example_architectures import conv
from mlframework.quantization import calibrate, convert
from mlframework.quantization.graph.tracing import trace
from mlframework.quantization.int8.average_pooling import AveragePooling, Mean
from mlframework.quantization.int8.integer_operation import Addition, Concatenation, IntegerOperation, Multiplication
from mlframework.quantization.preparation.integer_operations import Call, integer_operation
from mlframework.quantization.targets import Operations
from placement_probes import IMAGES, joined, placed

SHAPES = [(2, 3, 8, 8), (2, 3, 8, 8), (2, 3, 1, 1)]


class OfThree(nn.Module):
    """A function of up to three values, and a module that it may call."""

    def __init__(self, function: Callable[..., Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.called = module
        self.factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        return self.function(self, x, y, z)


def call_of(model: nn.Module, *inputs: Tensor) -> tuple[Call | None, fx.Node]:
    """What is found at the node of a model's result, and that node, in a graph in which every module is a call."""
    graph = trace(model, inputs, {}, lambda module: True).graph
    assert graph is not None
    (end,) = (node.args[0] for node in graph.nodes if node.op == "output")
    return integer_operation(end, dict(model.named_modules()), Operations()), end


def values() -> list[Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


# The function, the operation, the names of its operands, and a module where one is called.
FORMS: dict[str, tuple[type[IntegerOperation], str, Callable[..., Tensor], nn.Module | None]] = {
    "a + b": (Addition, "xy", lambda self, x, y, z: x + y, None),
    "a + a": (Addition, "xx", lambda self, x, y, z: x + x, None),
    "broadcasting sum": (Addition, "zx", lambda self, x, y, z: z + x, None),
    "torch.add": (Addition, "yx", lambda self, x, y, z: torch.add(y, x), None),
    "a.add(b)": (Addition, "xy", lambda self, x, y, z: x.add(y), None),
    "a.add_(b)": (Addition, "xy", lambda self, x, y, z: x.add_(y), None),
    "a += b": (Addition, "xy", lambda self, x, y, z: operator.iadd(x, y), None),
    "parameter": (Addition, "xf", lambda self, x, y, z: x + self.factor, None),
    "a * b": (Multiplication, "xz", lambda self, x, y, z: x * z, None),
    "torch.mul": (Multiplication, "xy", lambda self, x, y, z: torch.mul(x, y), None),
    "torch.multiply": (Multiplication, "xy", lambda self, x, y, z: torch.multiply(x, y), None),
    "a.mul(b)": (Multiplication, "xy", lambda self, x, y, z: x.mul(y), None),
    "a *= b": (Multiplication, "xz", lambda self, x, y, z: operator.imul(x, z), None),
    "cat of a list": (Concatenation, "xyx", lambda self, x, y, z: torch.cat([x, y, x]), None),
    "cat along": (Concatenation, "xy", lambda self, x, y, z: torch.cat((x, y), 1), None),
    "cat by name": (Concatenation, "xy", lambda self, x, y, z: torch.cat((x, y), dim=-1), None),
    "torch.concat": (Concatenation, "xy", lambda self, x, y, z: torch.concat((x, y), dim=2), None),
    "torch.concatenate": (Concatenation, "xy", lambda self, x, y, z: torch.concatenate((x, y), 3), None),
    "mean over one": (AveragePooling, "x", lambda self, x, y, z: x.mean(1), None),
    "mean over several": (AveragePooling, "x", lambda self, x, y, z: x.mean((2, -1)), None),
    "mean of a list": (AveragePooling, "x", lambda self, x, y, z: x.mean([-2, -1], keepdim=True), None),
    "mean by name": (AveragePooling, "x", lambda self, x, y, z: x.mean(dim=-1, keepdim=True), None),
    "mean by position": (AveragePooling, "x", lambda self, x, y, z: x.mean(1, True), None),
    "torch.mean": (AveragePooling, "x", lambda self, x, y, z: torch.mean(x, dim=(2, 3)), None),
    "pool": (AveragePooling, "x", lambda self, x, y, z: F.avg_pool2d(x, 3, 2, 1, True, False), None),
    "pool by name": (
        AveragePooling,
        "x",
        lambda self, x, y, z: F.avg_pool2d(x, kernel_size=(3, 2), padding=(1, 0), count_include_pad=False),
        None,
    ),
    "pool all by name": (AveragePooling, "x", lambda self, x, y, z: F.avg_pool2d(input=x, kernel_size=2), None),
    "pool with a divisor": (AveragePooling, "x", lambda self, x, y, z: F.avg_pool2d(x, 2, divisor_override=3), None),
    "pool in 1d": (AveragePooling, "flatten", lambda self, x, y, z: F.avg_pool1d(x.flatten(2), 5, 3), None),
    "pool in 3d": (AveragePooling, "unsqueeze", lambda self, x, y, z: F.avg_pool3d(x.unsqueeze(1), 2, 1), None),
    "adaptive": (AveragePooling, "x", lambda self, x, y, z: F.adaptive_avg_pool2d(x, (3, None)), None),
    "adaptive to a list": (AveragePooling, "x", lambda self, x, y, z: F.adaptive_avg_pool2d(x, [5, 2]), None),
    "adaptive in 1d": (AveragePooling, "flatten", lambda self, x, y, z: F.adaptive_avg_pool1d(x.flatten(2), 7), None),
    "adaptive in 3d": (
        AveragePooling,
        "unsqueeze",
        lambda self, x, y, z: F.adaptive_avg_pool3d(x.unsqueeze(1), (2, 3, 8)),
        None,
    ),
    "module": (AveragePooling, "x", lambda self, x, y, z: self.called(x), nn.AvgPool2d(2, ceil_mode=True)),
    "adaptive module": (AveragePooling, "x", lambda self, x, y, z: self.called(x), nn.AdaptiveAvgPool2d(1)),
}


@pytest.mark.parametrize(("kind", "names", "function", "module"), FORMS.values(), ids=FORMS)
def test_the_form_computes_what_the_call_computes(
    kind: type[IntegerOperation], names: str, function: Callable[..., Tensor], module: nn.Module | None
) -> None:
    model, inputs = OfThree(function, module), values()
    call, node = call_of(model, *inputs)
    assert call is not None
    operation, operands = call
    assert type(operation) is kind
    named = {"x": inputs[0], "y": inputs[1], "z": inputs[2], "f": model.factor}
    named |= {"flatten": inputs[0].flatten(2), "unsqueeze": inputs[0].unsqueeze(1)}
    given = [named[name] for name in ([names] if names in named else names)]
    expected = function(model, *(value.clone() for value in inputs))
    assert len(operands) == len(given)
    assert set(operands) == set(node.all_input_nodes)
    assert torch.equal(operation.on_values(*given), expected)
    if module is not None:
        assert operation.modules() == (module,)


class OtherPool(nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).exp()


NO_FORMS: dict[str, tuple[Callable[..., Any], nn.Module | None]] = {
    "number": (lambda self, x, y, z: x + 1, None),
    "number first": (lambda self, x, y, z: 2 * x, None),
    "factor": (lambda self, x, y, z: torch.add(x, y, alpha=2), None),
    "other operation": (lambda self, x, y, z: x - y, None),
    "quotient": (lambda self, x, y, z: x / y, None),
    "integers": (lambda self, x, y, z: x + y.int(), None),
    "sum of integers": (lambda self, x, y, z: x.int() + y.int(), None),
    "truth values": (lambda self, x, y, z: x * (y > 0), None),
    "cat of integers": (lambda self, x, y, z: torch.cat([x, y.int()]), None),
    "stack": (lambda self, x, y, z: torch.stack([x, y]), None),
    "mean of everything": (lambda self, x, y, z: x.mean(), None),
    "mean over no dimension": (lambda self, x, y, z: x.mean(()), None),
    "mean in another precision": (lambda self, x, y, z: x.mean(1, dtype=torch.float64), None),
    "mean over a computed dimension": (lambda self, x, y, z: x.mean(x.dim() - 1), None),
    "sum over a dimension": (lambda self, x, y, z: x.sum(1), None),
    "median": (lambda self, x, y, z: x.amax(1), None),
    "power pool": (lambda self, x, y, z: F.lp_pool2d(x, 2, 2), None),
    "module called with more": (lambda self, x, y, z: self.called(x, y), nn.Bilinear(8, 8, 2)),
    "subclass": (lambda self, x, y, z: self.called(x), OtherPool(2)),
    "other module": (lambda self, x, y, z: self.called(x), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize(("function", "module"), NO_FORMS.values(), ids=NO_FORMS)
def test_other_calls_have_none(function: Callable[..., Any], module: nn.Module | None) -> None:
    assert call_of(OfThree(function, module), *values())[0] is None


# Settings that the model computes: whatever becomes of them, the model goes on working on images of any size.
COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "the image's size": lambda y: F.avg_pool2d(y, y.shape[2:]),
    "the image's sides": lambda y: F.avg_pool2d(y, (y.size(2), y.size(3))),
    "the image's height": lambda y: F.avg_pool2d(y, y.shape[2]),
    "half of a side": lambda y: F.adaptive_avg_pool2d(y, (y.shape[2] // 2, 1)),
    "half of a side by name": lambda y: F.adaptive_avg_pool2d(y, output_size=[y.shape[2] // 2, 1]),
    "the stride": lambda y: F.avg_pool2d(y, 2, stride=(y.shape[2] // 4, 2)),
    "dimensions": lambda y: y.mean((y.dim() - 2, y.dim() - 1), keepdim=True),
}


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
def test_settings_that_are_computed(function: Callable[[Tensor], Tensor]) -> None:
    model = placed(lambda self, x: self.last(function(self.first(x))), first=conv(3, 3), last=nn.Conv2d(3, 2, 1))
    calibrate(model, [IMAGES])
    x = torch.randn(2, 3, 8, 8)
    model.eval()
    with torch.no_grad():
        assert torch.equal(convert(model)(x), model(x))


@pytest.mark.parametrize(
    ("function", "channels"),
    [
        (lambda a, b: a * b + a, 3),
        (lambda a, b: torch.cat([a * b, a.mean(1, keepdim=True)], 1), 4),
        (lambda a, b: F.avg_pool2d(torch.cat([a, b], 1), 2, padding=1, ceil_mode=True), 6),
        (lambda a, b: F.relu(a * F.adaptive_avg_pool2d(b, 1)), 3),
        (lambda a, b: a * F.adaptive_avg_pool2d(b, 1).sigmoid() + b, 3),
    ],
    ids=["product and sum", "concatenated", "pooled", "clipped product", "gate"],
)
@pytest.mark.parametrize("size", [8, 9])
def test_operations_follow_each_other_on_codes(
    function: Callable[[Tensor, Tensor], Tensor], channels: int, size: int
) -> None:
    model = placed(
        lambda self, x: self.last(function(self.left(x), self.right(x))),
        left=conv(3, 3),
        right=conv(3, 3),
        last=nn.Conv2d(channels, 2, 1),
    )
    assert len(joined(model)) >= 2
    calibrate(model, [torch.randn(4, 3, size, size)])
    x = torch.randn(2, 3, size, size)
    model.eval()
    with torch.no_grad():
        assert torch.equal(convert(model)(x), model(x))


def test_a_mean_keeps_the_dimensions_it_was_given() -> None:
    call, _ = call_of(OfThree(lambda self, x, y, z: x.mean([2, -1], keepdim=True)), *values())
    assert call is not None
    pooling = call[0].pooling
    assert isinstance(pooling, Mean)
    assert (pooling.dim, pooling.keepdim) == ((2, -1), True)
