"""Models come down as graphs as far as that changes nothing; the rest is kept whole, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from example_models import EXAMPLES, Example, results
from mlframework.quantization.graph.nodes import unused_name
from mlframework.quantization.graph.tracing import Trace, trace
from placement_probes import Runs


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d))


def taken(model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    return trace(model, args, kwargs, is_layer)


def called(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(
    "example", [e for name, e in EXAMPLES.items() if name not in ("branches at root", "single layer")],
    ids=[name for name in EXAMPLES if name not in ("branches at root", "single layer")],
)  # fmt: skip
def test_the_graph_computes_what_the_model_computes(example: Example) -> None:
    model = example.make().eval()
    inputs = example.inputs()
    expected = results(model, *copy.deepcopy(inputs))
    graph = taken(model, *inputs).graph
    assert graph is not None
    traced = fx.GraphModule(model, graph)
    assert all(map(torch.equal, results(traced, *inputs), expected))


def test_control_flow_has_the_innermost_module_run_its_own_code() -> None:
    example = EXAMPLES["branches inside"]
    outcome = taken(example.make(), *example.inputs())
    assert list(outcome.own_code) == ["inner"]
    assert "its code does not trace" in outcome.own_code["inner"]
    assert outcome.graph is not None
    assert called(outcome.graph) == ["first", "inner", "last"]


def test_control_flow_at_the_root_leaves_no_graph() -> None:
    example = EXAMPLES["branches at root"]
    outcome = taken(example.make(), *example.inputs())
    assert outcome.graph is None
    assert "its code does not trace" in outcome.own_code[""]


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_container_with_hooks_runs_its_own_code(register: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    getattr(model[0], f"register_{register}_hook")(lambda *args: None)
    outcome = taken(model, torch.randn(2, 3))
    assert outcome.own_code == {"0": "it has hooks of its own"}
    assert outcome.graph is not None
    assert called(outcome.graph) == ["0", "1"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.layer(x) if self.training else self.layer(x) * 2,
        lambda self, x: self.layer(x) * (2 if self.training else 3),
        lambda self, x: self.layer(x) if self.training else self.layer(self.layer(x)),
    ],
    ids=["more in evaluation", "another number", "another layer in evaluation"],
)
def test_code_that_depends_on_the_training_mode_runs_its_own_code(forward: Callable[..., Tensor]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Runs(forward, layer=nn.Linear(3, 3)), nn.Linear(3, 3))
    assert taken(model, torch.randn(2, 3)).own_code == {"1": "its code depends on the training mode"}
    assert taken(model[1], torch.randn(2, 3)).graph is None


def drops_paths(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    if self.training:
        y = y * torch.floor(0.8 + torch.rand([x.shape[0], 1])) / 0.8
    return y + x


def adds_noise(self: Any, x: Tensor) -> Tensor:
    if self.training:
        x = x + torch.randn_like(x) * 0.1
    return self.layer(x)


@pytest.mark.parametrize(
    "forward",
    [drops_paths, adds_noise, lambda self, x: self.layer(x) * 2 if self.training else self.layer(x)],
    ids=["stochastic depth", "noise", "a factor"],
)
def test_what_training_alone_does_to_a_value_becomes_a_module(forward: Callable[..., Tensor]) -> None:
    model, x = Runs(forward, layer=nn.Linear(3, 3)), torch.randn(4, 3)
    outcome = taken(model, x)
    assert outcome.own_code == {}
    assert outcome.graph is not None
    assert sorted(called(outcome.graph)) == ["layer", "training_only"]
    traced = fx.GraphModule(model, outcome.graph)
    for mode in (True, False):
        model.train(mode)
        traced.train(mode)
        for size in (4, 7):
            x = torch.randn(size, 3)
            state = torch.random.get_rng_state()
            expected = forward(model, x)
            torch.random.set_rng_state(state)
            assert torch.equal(traced(x), expected)


def test_code_that_draws_while_tracing_is_not_traced() -> None:
    outcome = taken(Runs(lambda self, x: x + torch.rand(3)), torch.randn(2, 3))
    assert outcome.graph is None


def test_any_number_of_arguments_is_traced() -> None:
    class Star(nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return values[0] + values[1]

    graph = taken(Star(), torch.randn(2), torch.randn(2)).graph
    assert graph is not None
    assert [node.target for node in graph.find_nodes(op="placeholder")] == ["values"]


def test_a_forward_replaced_on_the_instance_is_not_traced() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert taken(model, torch.randn(2, 3)).own_code == {"": "its forward was replaced on the instance"}


@pytest.mark.parametrize("call", [F.dropout, F.dropout1d, F.dropout2d], ids=lambda call: call.__name__)
def test_dropout_functions_become_modules(call: Callable[..., Tensor]) -> None:
    model = Runs(lambda self, x: call(x, 0.25, self.training))
    graph = taken(model, torch.randn(2, 3, 4, 4) if call is F.dropout2d else torch.randn(2, 3, 4)).graph
    assert graph is not None
    (name,) = called(graph)
    assert model.get_submodule(name).p == 0.25
    assert model.get_submodule(name).training


def test_dropout_that_never_stops_goes_on() -> None:
    model = Runs(lambda self, x: F.dropout(x, 0.5, True))
    graph = taken(model, torch.randn(8, 8)).graph
    assert graph is not None
    assert not called(graph)
    assert len(list(graph.find_nodes(op="call_function", target=F.dropout))) == 1


def test_constants_become_buffers_outside_the_state_dict() -> None:
    model = Runs(lambda self, x: x * torch.tensor([1.0, 2.0]))
    graph = taken(model, torch.randn(3, 2)).graph
    assert graph is not None
    assert model.state_dict() == {}
    ((name, value),) = model.named_buffers()
    assert torch.equal(value, torch.tensor([1.0, 2.0]))
    assert [node.target for node in graph.find_nodes(op="get_attr")] == [name]


def test_arguments_left_out_keep_their_defaults() -> None:
    example = EXAMPLES["many results"]
    graph = taken(example.make(), *example.inputs()).graph
    assert graph is not None
    assert [node.target for node in graph.find_nodes(op="placeholder")] == ["x"]
    graph = taken(example.make(), *example.inputs(), offset=torch.rand(4, 6)).graph
    assert graph is not None
    assert [node.target for node in graph.find_nodes(op="placeholder")] == ["x", "offset"]


def test_modes_buffers_inputs_and_random_state_are_as_before() -> None:
    model = Runs(lambda self, x: self.bn(x.add_(1)), bn=nn.BatchNorm2d(3), other=nn.Dropout())
    model.other.eval()
    inputs = torch.randn(2, 3, 4, 4)
    before, state = inputs.clone(), copy.deepcopy(model.state_dict())
    modes, random = [module.training for module in model.modules()], torch.random.get_rng_state()
    taken(model, inputs)
    assert torch.equal(inputs, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(
    "change",
    [
        lambda self, y: y.relu_(),
        lambda self, y: F.relu(y, inplace=True),
        lambda self, y: self.relu(y),
        lambda self, y: torch.relu_(y),
        lambda self, y: y.add_(1),
    ],
    ids=["method", "function", "module", "torch", "add_"],
)
def test_what_reads_a_tensor_after_it_was_changed_reads_the_change(change: Callable[..., Tensor]) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.layer(x)
        before = y * 1
        change(self, y)
        return y + before

    graph = taken(Runs(forward, layer=nn.Linear(3, 3), relu=nn.ReLU(inplace=True)), torch.randn(2, 3)).graph
    assert graph is not None
    layer, multiplied, changed, total = [node for node in graph.nodes if node.op.startswith("call")]
    assert multiplied.args[0] is layer
    assert total.args == (changed, multiplied)


def changes_a_part(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    y[:, :2].add_(1)
    return y * 2


def changes_a_part_by_name(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    part = y[:, :2]
    part.add_(1)
    return y * part.sum()


def reads_another_view_of_what_changed(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    view = y.view(-1)
    y.add_(1)
    return view.view(2, 3) * 2


def clips_a_part(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    self.relu(y[:, :2])
    return y * 2


def clips_what_a_part_is_read_of(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    part = y[:, :2]
    torch.relu_(y)
    return y * part.sum()


def changes_its_argument(self: Any, x: Tensor) -> Tensor:
    x[:, :2].relu_()
    return self.layer(x)


THROUGH_A_VIEW = [
    changes_a_part,
    changes_a_part_by_name,
    reads_another_view_of_what_changed,
    clips_a_part,
    clips_what_a_part_is_read_of,
    changes_its_argument,
]


@pytest.mark.parametrize("forward", THROUGH_A_VIEW, ids=lambda forward: forward.__name__)
def test_code_that_changes_a_tensor_through_a_view_runs_its_own_code(forward: Callable[..., Tensor]) -> None:
    inner = Runs(forward, layer=nn.Linear(3, 3), relu=nn.ReLU(inplace=True))
    reason = "it changes a tensor in place through a view"
    outcome = taken(nn.Sequential(nn.Linear(3, 3), inner, nn.Linear(3, 3)), torch.randn(2, 3))
    assert outcome.own_code == {"1": reason}
    assert outcome.graph is not None
    assert called(outcome.graph) == ["0", "1", "2"]
    assert taken(inner, torch.randn(2, 3)) == Trace(None, {"": reason})


def test_a_module_runs_its_own_code_with_all_that_hold_what_it_changes() -> None:
    """The view is made outside of the module that changes the tensor, so that the module alone would not do."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.layer(x)
        part = y[:, :2]
        self.change(y)
        return part * 2

    change = nn.Sequential(nn.ReLU(inplace=True))
    model = nn.Sequential(Runs(forward, layer=nn.Linear(3, 3), change=change))
    assert list(taken(model, torch.randn(2, 3)).own_code) == ["0"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.relu(self.layer(x)).view(-1) * 2,
        lambda self, x: self.layer(x).view(-1).relu_().add_(1).view(2, 3),
        lambda self, x: (self.layer(self.relu(x)) + x).relu_(),
    ],
    ids=["a view of the result", "a view that no one else reads", "pre-activation"],
)
def test_views_that_no_change_reaches_are_traced(forward: Callable[..., Tensor]) -> None:
    outcome = taken(Runs(forward, layer=nn.Linear(3, 3), relu=nn.ReLU(inplace=True)), torch.randn(2, 3))
    assert outcome.graph is not None
    assert outcome.own_code == {}


def test_views_become_reshapes() -> None:
    graph = taken(Runs(lambda self, x: x.view(2, -1).view(torch.int32)), torch.randn(2, 3, 4)).graph
    assert graph is not None
    assert [node.target for node in graph.find_nodes(op="call_method", target="reshape")] == ["reshape"]
    assert len(list(graph.find_nodes(op="call_method", target="view"))) == 1


def test_nodes_tell_dtype_and_shape() -> None:
    graph = taken(Runs(lambda self, x: self.layer(x).argmax(1), layer=nn.Linear(3, 4)), torch.randn(2, 3)).graph
    assert graph is not None
    infos = [node.meta["tensor"] for node in graph.nodes if node.op != "output"]
    assert [tuple(info.shape) for info in infos] == [(2, 3), (2, 4), (2,)]
    assert [info.dtype for info in infos] == [torch.float32, torch.float32, torch.int64]


def test_unused_names_count_up() -> None:
    model = nn.Module()
    assert unused_name(model, "node") == "node"
    model.node, model.node_1 = nn.ReLU(), 3
    assert unused_name(model, "node") == "node_2"
