"""Nodes of a graph as a module of their own: it computes what they compute, and leaves their graph alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mlframework.quantization.graph.subgraph import module_of_nodes


class Gate(nn.Module):
    """Modules, one of them called twice, functions, methods and operators, with arguments in tuples and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.scale = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.inner(x) + 1
        gate = torch.sigmoid(input=self.scale(z)) * self.scale(y)
        return torch.cat([F.leaky_relu(gate, negative_slope=0.3), z.clamp(min=0, max=2)], dim=-1)


def parts(model: nn.Module, *inputs: str) -> tuple[list[fx.Node], list[fx.Node], dict[str, nn.Module]]:
    """The calls in a model's graph, the nodes of these names, and what the calls call."""
    graph = fx.symbolic_trace(model).graph
    nodes = {node.name: node for node in graph.nodes}
    calls = [node for node in graph.nodes if node.op.startswith("call") and node.name not in inputs]
    return calls, [nodes[name] for name in inputs], dict(model.named_modules())


def test_a_whole_graph() -> None:
    model = Gate()
    module = module_of_nodes(*parts(model, "x", "y"))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(module(x, y), model(x, y))


def test_arguments_come_in_the_order_of_the_inputs() -> None:
    model = Gate()
    module = module_of_nodes(*parts(model, "y", "x"))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(module(y, x), model(x, y))


def test_inputs_may_be_values_inside() -> None:
    calls, _, modules = parts(Gate())
    names = {node.name: node for node in calls}
    chosen = [names["sigmoid"], names["mul"]]
    inputs = chosen[0].all_input_nodes + [node for node in chosen[1].all_input_nodes if node is not chosen[0]]
    left, right = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(module_of_nodes(chosen, inputs, modules)(left, right), torch.sigmoid(left) * right)


def test_the_value_is_that_of_the_last_node() -> None:
    calls, inputs, modules = parts(Gate(), "x")
    module, x = module_of_nodes(calls[:2], inputs, modules), torch.randn(3, 4)
    assert calls[1].name == "inner_1"
    assert torch.equal(module(x), modules["inner"](x))


def test_what_changes_a_value_in_place_does_not() -> None:
    activation = nn.SiLU(inplace=True)
    calls: list[Tensor] = []
    activation.register_forward_hook(lambda module, args, output: calls.append(output))
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_module("activation", (x,))
    second = graph.call_function(F.relu6, (first, True))
    third = graph.call_function(F.silu, (second,), {"inplace": True})
    module = module_of_nodes([first, second, third], [x], {"activation": activation})
    value = torch.randn(5)
    before = value.clone()
    assert torch.equal(module(value), F.silu(F.relu6(F.silu(before))))
    assert torch.equal(value, before)
    assert len(calls) == 1
    assert torch.equal(calls[0], F.silu(before))
    assert activation.inplace


def test_modules_are_the_same_objects() -> None:
    model = Gate()
    module = module_of_nodes(*parts(model, "x", "y"))
    in_place = {inner for inner in model.modules() if getattr(inner, "inplace", False)}
    assert {model.inner[0], model.inner[1], model.scale} - in_place <= set(module.children())
    calls: list[Tensor] = []
    model.scale.register_forward_hook(lambda module, args, output: calls.append(output))
    module(torch.randn(3, 4), torch.randn(3, 4)).sum().backward()
    assert len(calls) == 2
    assert model.scale.weight.grad is not None


def test_the_graph_stays_as_it_is() -> None:
    graph = fx.symbolic_trace(Gate()).graph
    before = str(graph)
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    module_of_nodes(calls, inputs, dict(Gate().named_modules()))
    assert str(graph) == before


def test_a_lone_call_of_a_module_is_that_module() -> None:
    model = nn.Sequential(nn.SiLU())
    assert module_of_nodes(*parts(model, "input_1")) is model[0]


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input=x)


class TurnedAround(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(3, 4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(y, x)


class WithMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ConvTranspose1d(3, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, output_size=[10])


@pytest.mark.parametrize(
    ("model", "shapes"),
    [(ByName(), [(2, 3)]), (TurnedAround(), [(2, 4), (2, 3)]), (WithMore(), [(2, 3, 4)])],
    ids=["by name", "turned around", "with more"],
)
def test_other_lone_calls_are_not(model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    calls, _, modules = parts(model)
    inputs = [node for node in calls[0].graph.nodes if node.op == "placeholder"]
    module, values = module_of_nodes(calls, inputs, modules), [torch.randn(shape) for shape in shapes]
    assert module is not model.inner
    assert torch.equal(module(*values), model(*values))


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "builtin": lambda x: abs(x) + 0.5,
    "infinity": lambda x: x.clamp(-torch.inf, 0.3),
    "slice": lambda x: x[:, 1:, ..., None],
    "function of the library": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "dtype": lambda x: x.to(torch.float64),
    "truth value": lambda x: torch.std(x, 1, True),
    "truth value among others": lambda x: torch.cumsum(torch.amax(x, 1, True), 0) + x,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "duplicate",
    [lambda module: module, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["itself", "copied", "pickled"],
)
def test_functions_and_copies(function: Callable[[Tensor], Any], duplicate: Callable[[nn.Module], nn.Module]) -> None:
    graph = fx.symbolic_trace(function).graph
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    module = duplicate(module_of_nodes(calls, [next(iter(graph.nodes))], {}))
    x = torch.randn(2, 3, 4)
    assert torch.equal(module(x), function(x))
