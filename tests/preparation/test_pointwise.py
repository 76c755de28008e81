"""Element-wise regions: found whatever is written in them, and nothing else is taken for one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from example_architectures import conv
from mlframework.quantization import FakeQuantizeLayer, QATConfig, calibrate, convert, prepare
from mlframework.quantization.graph.subgraph import module_of_nodes
from mlframework.quantization.graph.tracing import trace
from mlframework.quantization.int8.integer_operation import Multiplication
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.preparation import pointwise
from mlframework.quantization.preparation.pointwise import PointwiseRegion, pointwise_region
from placement_probes import IMAGES, Runs, joined, output

# The largest magnitude that a grid of any scale holds.
LARGEST = 2.0**40 * 255


class OfTwo(nn.Module):
    """A function of one value or two, and modules that it may call."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.modules_called = nn.ModuleList(modules)
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


def region_of(
    model: nn.Module, *inputs: Tensor, sources: tuple[str, ...] = ("x", "y")
) -> tuple[PointwiseRegion | None, fx.Graph]:
    """The region that ends at a model's result and begins at one of the named nodes; and the graph, in which every
    module is a call."""
    graph = trace(model, inputs, {}, lambda module: True).graph
    assert graph is not None
    (end,) = (node.args[0] for node in graph.nodes if node.op == "output")
    region = pointwise_region(end, dict(model.named_modules()), lambda node: node.name in sources)
    return region, graph


def calls(graph: fx.Graph) -> tuple[fx.Node, ...]:
    return tuple(node for node in graph.nodes if node.op.startswith("call"))


def check_region(model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """All that the model does is one region, which computes the same, bit for bit."""
    region, graph = region_of(model, torch.randn(3, 4))
    assert region is not None
    assert region.nodes == calls(graph)
    assert region.source.name == "x"
    module = module_of_nodes(region.nodes, (region.source,), dict(model.named_modules()))
    values = torch.linspace(-6, 6, 256, dtype=torch.float64)
    assert torch.equal(module(values.clone()), function(values.clone()))


# What single functions take beside their operand.
EXTRA: dict[Any, tuple[Any, ...]] = {
    torch.clamp: (-1, 2.0),
    torch.clip: (-1, 2.0),
    "clamp": (None, 0.5),
    "clip": (0.1,),
}


def single(target: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(target, str):
        return lambda x: getattr(x, target)(*EXTRA.get(target, ()))
    return lambda x: target(x, *EXTRA.get(target, ()))


EVERY_FUNCTION = pytest.mark.parametrize(
    "target", sorted(pointwise._FUNCTIONS, key=str), ids=lambda target: getattr(target, "__name__", target)
)
MODULES = [kind() for kind in pointwise._MODULES]
EVERY_MODULE = pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)


@EVERY_FUNCTION
def test_a_function_is_a_region(target: Any) -> None:
    function = single(target)
    check_region(OfTwo(function), function)


@EVERY_MODULE
def test_a_module_is_a_region(module: nn.Module) -> None:
    model = OfTwo(module, module)
    region, _ = region_of(model, torch.randn(3, 4))
    assert region is not None
    assert module_of_nodes(region.nodes, (region.source,), dict(model.named_modules())) is module
    check_region(model, module)


@pytest.mark.parametrize("function", [F.silu, F.relu, F.leaky_relu, F.elu, F.hardswish], ids=lambda f: f.__name__)
def test_a_function_in_place_is_a_region(function: Callable[..., Tensor]) -> None:
    check_region(OfTwo(lambda x: function(x, inplace=True)), function)


@EVERY_FUNCTION
def test_a_function_of_any_code_is_a_number(target: Any) -> None:
    values = torch.tensor([-LARGEST, -1e3, -0.0, 0.0, 1e3, LARGEST], dtype=torch.float64)
    assert not single(target)(values).isnan().any()


@EVERY_MODULE
def test_a_module_of_any_code_is_a_number(module: nn.Module) -> None:
    values = torch.tensor([-LARGEST, -1e3, -0.0, 0.0, 1e3, LARGEST], dtype=torch.float64)
    assert not module(values).isnan().any()


UNARY = [
    "F.silu({})",
    "F.leaky_relu({}, 0.1)",
    "F.relu6({} + 3, inplace=True)",
    "torch.tanh({})",
    "{}.sigmoid()",
    "{}.clamp(-1, max=2)",
    "(-{})",
    "({} ** 2)",
    "({} / 3)",
    "(1 - {})",
    "(0.5 * {})",
    "{}.mul(-2)",
    "torch.square({})",
]
BINARY = ["({} + {})", "({} * {})", "({} - {})", "torch.add({}, {})", "{}.mul({})"]


def expressions(leaves: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Element-wise expressions, written out."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(str.format, st.sampled_from(UNARY), inner),
            st.builds(str.format, st.sampled_from(BINARY), inner, inner),
        ),
        max_leaves=6,
    )


def function_of(expression: str) -> Callable[..., Tensor]:
    return eval(f"lambda x, y=None: {expression}", {"F": F, "torch": torch})  # type: ignore[no-any-return]


@given(expressions(st.just("x")))
def test_whatever_is_written_of_one_value_is_a_region(expression: str) -> None:
    assume(expression != "x")
    function = function_of(expression)
    check_region(OfTwo(function), function)


@given(expressions(st.sampled_from(["x", "y"])))
def test_what_is_written_of_two_values_is_none(expression: str) -> None:
    assume({"x", "y"} <= set(re.findall(r"\w+", expression)))
    region, _ = region_of(OfTwo(function_of(expression)), torch.randn(3, 4), torch.randn(3, 4))
    assert region is None


@settings(max_examples=10)
@given(expressions(st.just("x")))
def test_a_region_is_one_lookup_in_a_model(expression: str) -> None:
    assume(expression != "x")
    function = function_of(expression)
    model = check_model(lambda self, x: self.last(function(self.first(x))), first=conv(3, 3), last=conv(3, 2))
    entries = joined(model)
    # A ReLU keeps its input's grid, and a clip right behind a layer is part of the layer.
    assert all(isinstance(entry.operation, Lookup) for entry in entries)
    assert len(entries) <= 1


def test_a_region_begins_at_the_nearest_value_on_codes() -> None:
    model = OfTwo(lambda x: torch.tanh(F.silu(x) * 2) + 1)
    region, _ = region_of(model, torch.randn(3), sources=("x", "mul"))
    assert region is not None
    assert region.source.name == "mul"
    assert [node.name for node in region.nodes] == ["tanh", "add"]
    region, graph = region_of(model, torch.randn(3), sources=("x",))
    assert region is not None
    assert region.nodes == calls(graph)


def test_its_end_is_no_beginning() -> None:
    region, _ = region_of(OfTwo(lambda x: torch.tanh(x)), torch.randn(3), sources=("x", "tanh"))
    assert region is not None
    assert region.source.name == "x"


def test_two_values_on_codes_are_two_although_one_follows_from_the_other() -> None:
    region, _ = region_of(OfTwo(lambda x: x * torch.sigmoid(x)), torch.randn(3), sources=("x", "sigmoid"))
    assert region is None


class OtherSiLU(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(-1)


NO_REGIONS: dict[str, Callable[..., Tensor]] = {
    "nothing": lambda x: x,
    "truth value": lambda x: x * True,
    "added truth value": lambda x: False + x,
    "constant tensor": lambda x: x + torch.tensor(2.0),
    "infinity": lambda x: x * math.inf,
    "broadcasting": lambda x: x * x.mean(1, keepdim=True),
    "broadcasting alone": lambda x: x * x[:, :1],
    "row by row": lambda x: x + x[0],
    "maximum": lambda x: x / x.abs().max(),
    "softmax": lambda x: F.softmax(x, -1),
    "running sum": lambda x: torch.cumsum(x, 0) * 2,
    "turned": lambda x: x + x.flip(0),
    "transposed": lambda x: x * x.t(),
    "division by zero": lambda x: x / 0,
    "division by a value": lambda x: x / (1 + x.abs()),
    "division of a number": lambda x: 2 / x,
    "rounded division": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "floor division": lambda x: x // 2,
    "root": lambda x: x**0.5,
    "inverse": lambda x: x**-1,
    "power of a number": lambda x: 2**x,
    "power of itself": lambda x: x**x,
    "factor by name": lambda x: torch.add(x, x, alpha=2),
    "logarithm": torch.log,
    "steps": lambda x: F.hardshrink(x, 0.2),
    "threshold": lambda x: F.threshold(x, 0.2, -1.0),
    "square root": lambda x: x.abs().sqrt(),
    "one over a root": torch.rsqrt,
    "comparison": lambda x: (x > 0) * x,
    "other precision": lambda x: x.double() * 2,
    "integers": lambda x: x.int() * 2,
    "clamp to values": lambda x: torch.clamp(x, min=x.mean()),
}


@pytest.mark.parametrize("function", NO_REGIONS.values(), ids=NO_REGIONS)
def test_other_functions_are_no_regions(function: Callable[..., Tensor]) -> None:
    region, _ = region_of(OfTwo(function), torch.rand(4, 4) + 0.5)
    assert region is None


@pytest.mark.parametrize(
    "module", [OtherSiLU(), nn.PReLU(), nn.RReLU(), nn.Softmax(-1), nn.GLU(), nn.Softmin(0)], ids=lambda m: str(m)
)
def test_other_modules_are_no_regions(module: nn.Module) -> None:
    region, _ = region_of(Runs(lambda self, x: self.layer(x) * 1.0, layer=module), torch.rand(4, 4))
    assert region is None


def test_a_parameter_is_no_number() -> None:
    region, _ = region_of(Runs(lambda self, x: x * self.layer.weight, layer=nn.PReLU()), torch.rand(4, 4))
    assert region is None


def check_model(forward: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    """Switched off, the prepared model is the float model; evaluation computes what the converted model computes."""
    model = Runs(forward, **modules)
    prepared = prepare(model, QATConfig(), (IMAGES,))
    calibrate(prepared, [torch.randn(4, 3, 8, 8)])
    nodes = [module for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)]
    x = torch.randn(2, 3, 8, 8)
    for node in nodes:
        node.fake_quantize_enabled = False
    assert_same(prepared(x), model(x))
    for node in nodes:
        node.fake_quantize_enabled = True
    prepared.eval()
    with torch.no_grad():
        assert_same(convert(prepared)(x), prepared(x))
    return prepared


def assert_same(actual: Any, expected: Any) -> None:
    results = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    for result, wanted in results:
        assert torch.equal(result, wanted)


def test_a_part_that_others_read_stays() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        gate = torch.sigmoid(y + 1)
        return self.last(y * gate), gate.sum(1)

    model = check_model(forward, first=conv(3, 3), last=conv(3, 2))
    (table,) = joined(model)
    assert isinstance(table.operation, Lookup)
    assert table.sources == (output(model, "first"),)


def test_a_part_that_a_layer_reads_is_a_table_of_its_own() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        gate = torch.sigmoid(y)
        return self.last(y * gate), self.other(gate)

    model = check_model(forward, first=conv(3, 3), last=conv(3, 2), other=conv(3, 2))
    assert [type(entry.operation) for entry in joined(model)] == [Lookup, Multiplication]


def test_two_regions_may_share_a_part() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x) * 2 + 1
        return self.last(torch.tanh(y)), self.other(torch.sigmoid(y))

    model = check_model(forward, first=conv(3, 3), last=conv(3, 2), other=conv(3, 2))
    assert [type(entry.operation) for entry in joined(model)] == [Lookup, Lookup]


# A region is computed in one place: no change in place may come between its parts, or come twice.


def changed_then_read(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.silu(self.first(x), inplace=True)
    return self.last(y * 2), y.cumsum(1)


def changed_by_a_module(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.activation(self.first(x))
    return self.last(y * torch.tanh(y)), y.mean(1)


def changed_between_the_parts(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.first(x)
    doubled = y * 2
    positive = F.relu_(y)
    return self.last(torch.tanh(doubled)), self.other(positive)


def changed_through_a_view(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.first(x)
    doubled = y * 2
    positive = y.view(y.shape[0], -1).mul_(0.5)
    return self.last(torch.tanh(doubled)), positive


def changed_inside(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.first(x)
    shifted = F.relu6(y + 3, inplace=True)
    return self.last(y * shifted / 6), shifted + y


def changed_before_the_end_of_a_sum(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.first(x)
    total = y + self.second(x)
    positive = y.relu_()
    return self.last(F.relu(total)), self.other(positive)


def changed_alone(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    F.leaky_relu(y, 0.1, inplace=True)
    return self.last(y) + self.other(y)


IN_PLACE = [
    changed_then_read,
    changed_by_a_module,
    changed_between_the_parts,
    changed_through_a_view,
    changed_inside,
    changed_before_the_end_of_a_sum,
    changed_alone,
]


@pytest.mark.parametrize("forward", IN_PLACE, ids=lambda forward: forward.__name__)
def test_changes_in_place_happen_where_they_are_written(forward: Callable[..., Any]) -> None:
    modules = {name: conv(3, 3) for name in ("first", "second", "last", "other")}
    modules["activation"] = nn.SiLU(inplace=True)
    check_model(forward, **{name: modules[name] for name in modules if name in forward.__code__.co_names})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("begins", [False, True], ids=["in the middle", "at the beginning"])
def test_hooks_in_a_region_fire_once_on_the_users_module(inplace: bool, begins: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.activation(y) * 2 if begins else y * self.activation(y + 3) / 6)

    model = Runs(forward, first=conv(3, 3), last=conv(3, 2), activation=nn.Hardswish(inplace=inplace))
    prepared = prepare(model, QATConfig(), (IMAGES,))
    calibrate(prepared, [torch.randn(4, 3, 8, 8)])
    (table,) = joined(prepared)
    assert table.operation.modules() == (prepared.activation,)
    calls: list[tuple[nn.Module, torch.Size]] = []
    for training in (True, False):
        prepared.train(training)
        with torch.set_grad_enabled(training):
            expected = prepared(IMAGES)
            handle = prepared.activation.register_forward_hook(lambda m, args, output: calls.append((m, output.shape)))
            result = prepared(IMAGES)
        handle.remove()
        assert calls == [(prepared.activation, torch.Size((2, 3, 8, 8)))]
        assert training or torch.equal(result, expected)
        calls.clear()
