"""Operations on quantized tensors: fake-quantized in training, operations on codes in evaluation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from example_engines import ENGINES
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    QuantizationParameters,
    QuantizationScheme,
    dequantize,
    fake_quantize,
    kernels,
    quantize,
)
from mlframework.quantization.graph.subgraph import module_of_nodes
from mlframework.quantization.int8.average_pooling import AveragePooling, Mean
from mlframework.quantization.int8.integer_operation import Addition, Concatenation, IntegerOperation, Multiplication
from mlframework.quantization.int8.lookup import Lookup
from mlframework.quantization.qat.qat_operation import QATOperation

EVERY_GRID = pytest.mark.parametrize(
    "config",
    [
        pytest.param(QATConfig(target=target, activation_bits=bits), id=f"{target}-{bits}")
        for target, bits in (*((target, 8) for target in ENGINES), ("onnxruntime", 4))
    ],
)
EVERY_ACTIVATION = pytest.mark.parametrize(
    "activation", [None, nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1.0, 0.5)], ids=lambda module: str(module)
)


class Operands(nn.Module):
    """An operation with the nodes that quantize what it reads."""

    def __init__(
        self,
        config: QATConfig,
        activation: nn.Module | None = None,
        operation: IntegerOperation | None = None,
        count: int = 2,
    ) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(FakeQuantizeLayer(config.activation_scheme) for _ in range(count))
        self.operation = QATOperation(config, operation or Addition(), tuple(self.nodes), activation)

    def forward(self, *operands: Tensor) -> Tensor:
        return self.operation(*(node(operand) for node, operand in zip(self.nodes, operands, strict=True)))


def seen(config: QATConfig, activation: nn.Module | None = None) -> Operands:
    model = Operands(config, activation)
    model(torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5) * 3)
    return model.eval()


def region(function: Callable[[Tensor], Tensor]) -> nn.Module:
    graph = fx.symbolic_trace(function).graph
    (source,) = (node for node in graph.nodes if node.op == "placeholder")
    return module_of_nodes([node for node in graph.nodes if node.op.startswith("call")], (source,), {})


def lookup(module: nn.Module) -> Lookup:
    return Lookup(module, (module,))


class Kind(NamedTuple):
    """An operation, made anew, and how many operands it reads."""

    make: Callable[[], IntegerOperation]
    count: int = 1
    shapes: tuple[tuple[int, ...], ...] = ((4, 3, 6, 6),) * 3

    def operands(self, **options: Any) -> list[Tensor]:
        return [torch.randn(shape, **options) for shape in self.shapes[: self.count]]

    def model(self, config: QATConfig | None = None) -> Operands:
        return Operands(config or QATConfig(), None, self.make(), self.count)

    def seen(self, config: QATConfig | None = None) -> Operands:
        model = self.model(config)
        model(*(operand * 1.5 for operand in self.operands()))
        return model.eval()


KINDS = {
    "sum": Kind(Addition, 2),
    "product": Kind(Multiplication, 2),
    "gate": Kind(Multiplication, 2, ((4, 3, 6, 6), (4, 3, 1, 1))),
    "concat": Kind(lambda: Concatenation(1), 3, ((4, 3, 6, 6), (4, 1, 6, 6), (4, 2, 6, 6))),
    "average pool": Kind(lambda: AveragePooling(nn.AvgPool2d(3, 2, 1, count_include_pad=False))),
    "adaptive pool": Kind(lambda: AveragePooling(nn.AdaptiveAvgPool2d((4, 1)))),
    "mean": Kind(lambda: AveragePooling(Mean((-1, 2), False))),
    "module": Kind(lambda: lookup(nn.GELU())),
    "module in place": Kind(lambda: lookup(nn.SiLU(inplace=True))),
    "region": Kind(lambda: Lookup(region(lambda x: x * F.relu6(x + 3) / 6))),
    "region in place": Kind(lambda: Lookup(region(lambda x: F.elu(x, 1.0, True) * 2))),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
WITH_MODULES = [KINDS[name] for name in ("average pool", "adaptive pool", "mean", "module", "module in place")]


@EVERY_KIND
def test_training_fake_quantizes_the_values(kind: Kind) -> None:
    model, operands = kind.model(), kind.operands()
    result = model(*operands)
    on_grids = [
        fake_quantize(operand, node.parameters_on_grid) for operand, node in zip(operands, model.nodes, strict=True)
    ]
    values = kind.make().on_values(*on_grids)
    node = model.operation.output_fake_quantize
    assert torch.equal(result, fake_quantize(values, node.parameters_on_grid))
    # The node has seen these very values.
    assert (node.observer.range(node.scheme)[0].item(), node.observer.range(node.scheme)[1].item()) == pytest.approx(
        (min(values.min().item(), 0), max(values.max().item(), 0))
    )


@EVERY_KIND
def test_gradients_are_those_of_the_values(kind: Kind) -> None:
    model, operands = kind.model(), kind.operands(requires_grad=True)
    result = model(*operands)
    weights = torch.randn_like(result)
    (result * weights).sum().backward()
    on_grids = [
        fake_quantize(operand, node.parameters_on_grid).detach().requires_grad_()
        for operand, node in zip(operands, model.nodes, strict=True)
    ]
    # The first batch sets the ranges, so that nothing saturates by more than rounding.
    (kind.make().on_values(*(operand.clone() for operand in on_grids)) * weights).sum().backward()
    for operand, on_grid in zip(operands, on_grids, strict=True):
        torch.testing.assert_close(operand.grad, on_grid.grad)


@EVERY_KIND
@EVERY_GRID
def test_evaluation_computes_on_codes(kind: Kind, config: QATConfig) -> None:
    model = kind.seen(config)
    operands = [operand * 2 for operand in kind.operands()]
    codes = [quantize(operand, node.parameters_on_grid) for operand, node in zip(operands, model.nodes, strict=True)]
    expected = dequantize(model.operation.to_integer()(*codes), model.operation.output_fake_quantize.parameters_on_grid)
    with torch.no_grad():
        result = model(*operands)
    assert torch.equal(result, expected)
    assert result.shape == kind.make().on_values(*operands).shape


@EVERY_KIND
@EVERY_GRID
def test_training_and_evaluation_differ_by_rounding_alone(kind: Kind, config: QATConfig) -> None:
    model, operands = kind.seen(config), kind.operands()
    parameters = model.operation.output_fake_quantize.parameters_on_grid
    with torch.no_grad():
        integers = quantize(model(*(operand.clone() for operand in operands)), parameters)
    simulated = quantize(model(*operands).detach(), parameters)
    assert (integers.int() - simulated.int()).abs().max() <= 1
    assert (integers != simulated).float().mean() < 0.02


@pytest.mark.parametrize("kind", WITH_MODULES, ids=[name for name in KINDS if KINDS[name] in WITH_MODULES])
@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_of_the_users_module_fire_once(kind: Kind, gradients: bool) -> None:
    model, operands, calls = kind.seen(), kind.operands(), []
    (module,) = model.operation.operation.modules()
    with torch.set_grad_enabled(gradients):
        expected = model(*(operand.clone() for operand in operands))
        module.register_forward_hook(lambda module, args, output: calls.append(output.clone()))
        module.register_forward_pre_hook(lambda module, args: calls.append("before"))
        assert torch.equal(model(*(operand.clone() for operand in operands)), expected)
    assert calls[0] == "before"
    assert len(calls) == 2
    on_grid = fake_quantize(operands[0], model.nodes[0].parameters_on_grid)
    assert torch.equal(calls[1], kind.make().on_values(on_grid))


def test_with_hooks_the_result_is_still_that_of_codes() -> None:
    """On grids where the rounding of the floats decides thousands of sums otherwise."""
    activation = nn.Hardtanh(-3.0, 3.0)
    model = Operands(QATConfig(), activation).eval()
    for node, scale, zero_point in zip(
        (*model.nodes, model.operation.output_fake_quantize), (0.0325, 0.0195, 0.013), (139, 111, 59), strict=True
    ):
        node.set_parameters(
            QuantizationParameters(torch.tensor([scale]), torch.tensor([zero_point]), QATConfig().activation_scheme)
        )
    codes = torch.arange(256, dtype=torch.uint8)
    left, right = (
        dequantize(pair, node.parameters_on_grid)
        for pair, node in zip((codes.repeat_interleave(256), codes.repeat(256)), model.nodes, strict=True)
    )
    with torch.no_grad():
        expected = model(left, right)
    assert (model(left, right) != expected).sum() > 1000
    activation.register_forward_hook(lambda module, args, output: None)
    with torch.no_grad():
        assert torch.equal(model(left, right), expected)


@pytest.mark.parametrize("kind", WITH_MODULES, ids=[name for name in KINDS if KINDS[name] in WITH_MODULES])
def test_hooks_do_not_fire_for_a_converted_operation(kind: Kind) -> None:
    model, calls = kind.seen(), []
    (module,) = model.operation.operation.modules()
    module.register_forward_hook(lambda module, args, output: calls.append(output))
    model.operation.to_integer()(*(node.to_codes(x) for node, x in zip(model.nodes, kind.operands(), strict=True)))
    assert not calls


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_kind_keeps_the_dtype(kind: Kind, dtype: torch.dtype) -> None:
    model = kind.seen().to(dtype)
    operands = kind.operands(dtype=dtype)
    assert model(*(operand.clone() for operand in operands)).dtype is dtype
    with torch.no_grad():
        assert model(*operands).dtype is dtype


@EVERY_KIND
def test_evaluation_under_autocast_is_the_same(kind: Kind) -> None:
    model, operands = kind.seen(), kind.operands()
    with torch.no_grad():
        expected = model(*operands)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(*operands), expected)


@EVERY_KIND
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(kind: Kind, duplicate: Any) -> None:
    model, operands = kind.seen(), kind.operands()
    other = duplicate(model)
    assert repr(other) == repr(model)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            results = [each(*(operand.clone() for operand in operands)) for each in (model, other)]
            assert torch.equal(*results)
    with torch.no_grad():
        other.operation.output_fake_quantize.scale.mul_(4)
        assert not torch.equal(other(*operands), model(*operands))


@EVERY_KIND
def test_no_operand_changes(kind: Kind) -> None:
    """In evaluation; what the user's own function does in place, it does in training."""
    model, operands = kind.seen(), kind.operands()
    before = [operand.clone() for operand in operands]
    with torch.no_grad():
        model.operation(*operands)
    assert all(map(torch.equal, operands, before))


@EVERY_KIND
def test_every_kind_evaluates_in_float_before_any_data(kind: Kind) -> None:
    model = kind.model().eval()
    operands = kind.operands()
    expected = model.operation.operation.on_values(*(operand.clone() for operand in operands))
    for activation in model.operation._activation:
        expected = expected if activation is None else activation(expected)
    with torch.no_grad(), pytest.warns(UserWarning, match="seen no data"):
        assert torch.equal(model(*operands), expected)
    with pytest.raises(RuntimeError, match="seen no data"):
        model.operation.to_integer()


@EVERY_KIND
def test_a_batch_of_nothing(kind: Kind) -> None:
    model = kind.seen()
    operands = [operand[:0] for operand in kind.operands()]
    shape = kind.make().on_values(*operands).shape
    with torch.no_grad():
        assert model(*operands).shape == shape
    assert model.train()(*operands).shape == shape


@EVERY_KIND
@pytest.mark.parametrize("target", ENGINES)
def test_results_that_are_never_negative(kind: Kind, target: str) -> None:
    config = QATConfig(target=target)
    nodes = [FakeQuantizeLayer(config.non_negative_activation_scheme) for _ in range(kind.count)]
    operation = QATOperation(config, kind.make(), nodes, non_negative=True)
    assert operation.output_fake_quantize.scheme == config.non_negative_activation_scheme
    operands = [operand.abs() for operand in kind.operands()]
    for _ in range(2):
        with torch.set_grad_enabled(operation.training):
            result = operation(*(node(operand) for node, operand in zip(nodes, operands, strict=True)))
            wanted = kind.make().on_values(*(operand.clone() for operand in operands))
        step = operation.output_fake_quantize.scale.item()
        # The operands' own rounding comes to a step or two of the result's.
        assert (result - wanted.clamp(min=0)).abs().max() <= 3 * step
        assert (result >= 0).all()
        operation.eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if not kind.make().clips], ids=lambda kind: "")
def test_kinds_that_do_not_clip_take_no_activation(kind: Kind) -> None:
    node, operation = FakeQuantizeLayer(QuantizationScheme()), kind.make()
    with pytest.raises(TypeError, match=f"activation must be None for a {operation.kind}, got ReLU"):
        QATOperation(QATConfig(), operation, (node,) * kind.count, nn.ReLU())


@EVERY_GRID
@EVERY_ACTIVATION
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 3, 1, 1), (0, 3, 5, 5)], ids=str)
def test_evaluation_adds_codes(config: QATConfig, activation: nn.Module | None, shape: tuple[int, ...]) -> None:
    model = seen(config, activation)
    left, right = torch.randn(shape), torch.randn(shape if shape[0] == 0 else (4, 3, 5, 5)) * 4
    codes = [
        quantize(value, node.parameters_on_grid) for value, node in ((left, model.nodes[0]), (right, model.nodes[1]))
    ]
    expected = dequantize(model.operation.to_integer()(*codes), model.operation.output_fake_quantize.parameters_on_grid)
    with torch.no_grad():
        assert torch.equal(model(left, right), expected)


@EVERY_GRID
@EVERY_ACTIVATION
def test_the_simulation_is_within_one_step(config: QATConfig, activation: nn.Module | None) -> None:
    """Both round the same sum, formed in another order: the nearest code may be the next."""
    model = seen(config, activation)
    operands = torch.randn(4, 3, 5, 5) * 2, torch.randn(4, 3, 5, 5) * 4
    parameters = model.operation.output_fake_quantize.parameters_on_grid
    with torch.no_grad():
        integers = quantize(model(*operands), parameters)
    simulated = quantize(model(*operands).detach(), parameters)
    assert (integers.int() - simulated.int()).abs().max() <= 1


def test_switched_off_it_is_the_float_sum() -> None:
    model = seen(QATConfig(), nn.ReLU())
    for node in (*model.nodes, model.operation.output_fake_quantize):
        node.fake_quantize_enabled = False
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(left, right), torch.relu(left + right))


@pytest.mark.parametrize("node", ["nodes.0", "nodes.1", "operation.output_fake_quantize"])
def test_one_node_switched_off_ends_the_integers(node: str) -> None:
    model = seen(QATConfig())
    with torch.no_grad():
        assert model.operation.computes_integers
        model.get_submodule(node).fake_quantize_enabled = False
        assert not model.operation.computes_integers
    assert not seen(QATConfig()).operation.computes_integers  # gradients are on


def test_gradients_reach_both_operands() -> None:
    model = Operands(QATConfig(), nn.ReLU())
    left, right = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    model(left, right).sum().backward()
    assert torch.equal(left.grad, torch.ones(2, 3))
    assert torch.equal(right.grad, torch.ones(2, 3))


@pytest.mark.skipif(kernels.active_path() == "reference", reason="needs compiled kernels")
def test_a_sum_on_a_learned_grid_keeps_the_codes_of_its_operands() -> None:
    model = Operands(QATConfig(learnable=True), nn.ReLU())
    operands = [torch.randn(2, 3, 5, 5, requires_grad=True) for _ in range(2)]
    model(*operands)  # the first batch sets the grids
    function = model(*operands).grad_fn
    sizes = [tensor.nbytes for tensor in function.saved_tensors if tensor is not None and tensor.shape == (2, 3, 5, 5)]
    assert sizes == [150, 150]


def test_the_operands_nodes_are_not_its_own() -> None:
    assert all(key.startswith("output_fake_quantize.") for key in Operands(QATConfig()).operation.state_dict())


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_of_the_activation_fire(gradients: bool) -> None:
    activation, calls = nn.ReLU(), []
    model = seen(QATConfig(), activation)
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    with torch.set_grad_enabled(gradients):
        expected = model(left, right)
        activation.register_forward_hook(lambda module, args, output: calls.append(output))
        assert torch.equal(model(left, right), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_operands_nodes(duplicate: Any) -> None:
    model = seen(QATConfig())
    other = duplicate(model)
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    assert other.operation.sources == tuple(other.nodes)
    with torch.no_grad():
        assert torch.equal(other(left, right), model(left, right))
        other.nodes[0].scale.mul_(2)
        assert not torch.equal(other(left, right), model(left, right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    model = seen(QATConfig()).to(dtype)
    left, right = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    assert model(left, right).dtype is dtype
    with torch.no_grad():
        assert model(left, right).dtype is dtype


def test_evaluation_before_any_data_is_in_float() -> None:
    model = Operands(QATConfig()).eval()
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    with torch.no_grad(), pytest.warns(UserWarning, match="seen no data"):
        assert torch.equal(model(left, right), left + right)
    with pytest.raises(RuntimeError, match="seen no data"):
        model.operation.to_integer()


def test_an_activation_that_does_more_than_clip_is_refused() -> None:
    node = FakeQuantizeLayer(QuantizationScheme())
    with pytest.raises(TypeError, match=r"activation must only clip .* got GELU"):
        QATOperation(QATConfig(), Addition(), (node, node), nn.GELU())


def test_a_relu_gives_the_sum_an_unsigned_grid() -> None:
    assert (
        str(Operands(QATConfig(), nn.ReLU()).operation.output_fake_quantize.scheme)
        == "uint8 [0, 255] symmetric, per tensor"
    )
    assert "ReLU" in repr(Operands(QATConfig(), nn.ReLU()).operation)
