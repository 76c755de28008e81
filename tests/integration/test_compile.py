"""``torch.compile(fullgraph=True)`` on prepared and converted models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mlframework.quantization import HistogramObserver, QATConfig, QATSchedule, calibrate, convert, prepare

# The compiler warns of its own internals (autograd.Function instantiated, .grad of a non-leaf read) while it traces.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("fresh_compiler")]

# Compiled sums run in another order, so that a value next to a rounding boundary may fall to the other side of it; the
# batches are large enough that one such step moves the loss by far less than the bound. (Weights changed by 1e-7 moved
# it by 3.3e-5 at most in 40 seeds; with batches of 64, by 1.6e-4 in 20.)
SHAPES = {"cnn": (256, 1, 8, 8), "mlp": (256, 12)}


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = F.relu(features + self.branch(features))
        return self.head(features.mean((2, 3)))


def _model(name: str) -> nn.Module:
    if name == "cnn":
        return ResidualNet()
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def _train(
    model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], shape: tuple[int, ...], steps: int
) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    for _ in range(steps):
        inputs = torch.randn(shape, generator=generator)
        loss = F.cross_entropy(model(inputs), torch.arange(shape[0]) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "config", "backend"),
    [
        ("cnn", QATConfig(), "inductor"),
        pytest.param("mlp", QATConfig(learnable=True), "inductor", marks=pytest.mark.long),
        *(
            pytest.param(*each, "aot_eager", marks=pytest.mark.long)
            for each in (
                ("cnn", QATConfig(learnable=True, weight_bits=4, activation_bits=4)),
                ("mlp", QATConfig()),
                ("mlp", QATConfig(activation_observer=HistogramObserver)),
            )
        ),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else ("learned" if value.learnable else getattr(value.activation_observer, "__name__", "default"))
    ),
)
def test_training_compiles_whole_and_settles(name: str, config: QATConfig, backend: str) -> None:
    prepared = prepare(_model(name), config, (torch.randn(SHAPES[name]),))
    eager = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True, backend=backend)
    losses = _train(compiled, list(prepared.parameters()), SHAPES[name], 2)
    graphs = counters["stats"]["unique_graphs"]
    # The generators start alike, so that the two models go on from the same two steps.
    losses += _train(compiled, list(prepared.parameters()), SHAPES[name], 4)
    assert counters["stats"]["unique_graphs"] == graphs, "no recompilation after the second step"
    assert not counters["graph_break"]
    expected = _train(eager, list(eager.parameters()), SHAPES[name], 2)
    expected += _train(eager, list(eager.parameters()), SHAPES[name], 4)
    assert losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["cnn", pytest.param("mlp", marks=pytest.mark.long)])
def test_evaluation_compiles_whole_to_the_same_integers(name: str) -> None:
    prepared = prepare(_model(name), QATConfig(), (torch.randn(SHAPES[name]),))
    calibrate(prepared, [torch.randn(SHAPES[name]) for _ in range(3)])
    prepared.eval()
    converted = convert(prepared)
    inputs = torch.randn(SHAPES[name])
    with torch.no_grad():
        expected = prepared(inputs)
        for model in (prepared, converted):
            assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(inputs), expected)


def test_a_schedule_recompiles_only_where_it_switches() -> None:
    network = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    prepared = prepare(network, QATConfig(), (torch.randn(SHAPES["mlp"]),))
    schedule = QATSchedule(prepared, quantize_from=2, observe_until=5)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    graphs = []
    for _ in range(9):
        _train(compiled, list(prepared.parameters()), SHAPES["mlp"], 1)
        schedule.step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[6] == graphs[8], "nothing to compile once the schedule has run out"
    assert not counters["graph_break"]


def _halve(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].mul_(0.5)


def _zero(module: nn.Module, args: object, output: Tensor) -> None:
    output.mul_(0)


@pytest.mark.parametrize(
    "where",
    [
        "around both",
        *(pytest.param(where, marks=pytest.mark.long) for where in ("before the reader", "after the maker")),
    ],
)
def test_hooks_that_change_values_in_place_are_seen(where: str) -> None:
    """Codes lie beside values, and a compiler that traces does not count changes of these."""
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 3)))
    prepared = prepare(model, QATConfig(), (torch.randn(64, 12),))
    for _ in range(2):
        prepared(torch.randn(64, 12))
    if where == "before the reader":
        prepared.get_submodule("1.0").register_forward_pre_hook(_halve)
    elif where == "after the maker":
        prepared.get_submodule("0.0").register_forward_hook(_zero)
    else:
        prepared.get_submodule("0").register_forward_hook(_zero)
    inputs = torch.randn(64, 12)
    compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), prepared(inputs), rtol=0, atol=1e-6)


def test_operators_are_calls_in_the_graph() -> None:
    prepared = prepare(_model("cnn"), QATConfig(), (torch.randn(SHAPES["cnn"]),))
    for _ in range(2):
        prepared(torch.randn(SHAPES["cnn"]))
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nodes = [node for module in graph.modules() for node in module.graph.nodes]  # type: ignore[union-attr]
        called.extend(str(node.target) for node in nodes if node.op == "call_function")
        return graph.forward  # type: ignore[no-any-return]

    torch.compile(prepared, fullgraph=True, backend=backend)(torch.randn(SHAPES["cnn"]))
    operators = {name.split(".")[1] for name in called if name.startswith("mlframework_quantization_kernels")}
    assert {"weighted_product", "normalize", "batch_statistics", "update_moving_average"} <= operators
    assert not {name for name in called if "conv2d" in name or "batch_norm" in name}
