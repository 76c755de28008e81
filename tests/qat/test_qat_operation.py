"""The sum of two quantized tensors: fake-quantized in training, a sum of codes in evaluation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import FakeQuantizeLayer, QATConfig, QuantizationScheme, dequantize, quantize
from mlframework.quantization.int8.integer_operation import Addition
from mlframework.quantization.qat.qat_operation import QATOperation
from mlframework.quantization.qat.targets import TARGETS

EVERY_GRID = pytest.mark.parametrize(
    "config",
    [
        pytest.param(QATConfig(target=target, activation_bits=bits), id=f"{target}-{bits}")
        for target, bits in (*((target, 8) for target in TARGETS), ("onnxruntime", 4))
    ],
)
EVERY_ACTIVATION = pytest.mark.parametrize(
    "activation", [None, nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1.0, 0.5)], ids=lambda module: str(module)
)


class Operands(nn.Module):
    """A sum with the nodes that quantize what it adds."""

    def __init__(self, config: QATConfig, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.left, self.right = (FakeQuantizeLayer(config.activation_scheme) for _ in range(2))
        self.add = QATOperation(config, Addition(), (self.left, self.right), activation)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.add(self.left(left), self.right(right))


def seen(config: QATConfig, activation: nn.Module | None = None) -> Operands:
    model = Operands(config, activation)
    model(torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5) * 3)
    return model.eval()


@EVERY_GRID
@EVERY_ACTIVATION
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 3, 1, 1), (0, 3, 5, 5)], ids=str)
def test_evaluation_adds_codes(config: QATConfig, activation: nn.Module | None, shape: tuple[int, ...]) -> None:
    model = seen(config, activation)
    left, right = torch.randn(shape), torch.randn(shape if shape[0] == 0 else (4, 3, 5, 5)) * 4
    codes = [quantize(value, node.parameters_on_grid) for value, node in ((left, model.left), (right, model.right))]
    expected = dequantize(model.add.to_integer()(*codes), model.add.output_fake_quantize.parameters_on_grid)
    with torch.no_grad():
        assert torch.equal(model(left, right), expected)


@EVERY_GRID
@EVERY_ACTIVATION
def test_the_simulation_is_within_one_step(config: QATConfig, activation: nn.Module | None) -> None:
    """Both round the same sum, formed in another order: the nearest code may be the next."""
    model = seen(config, activation)
    operands = torch.randn(4, 3, 5, 5) * 2, torch.randn(4, 3, 5, 5) * 4
    parameters = model.add.output_fake_quantize.parameters_on_grid
    with torch.no_grad():
        integers = quantize(model(*operands), parameters)
    simulated = quantize(model(*operands).detach(), parameters)
    assert (integers.int() - simulated.int()).abs().max() <= 1


def test_switched_off_it_is_the_float_sum() -> None:
    model = seen(QATConfig(), nn.ReLU())
    for node in (model.left, model.right, model.add.output_fake_quantize):
        node.fake_quantize_enabled = False
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(left, right), torch.relu(left + right))


@pytest.mark.parametrize("node", ["left", "right", "add.output_fake_quantize"])
def test_one_node_switched_off_ends_the_integers(node: str) -> None:
    model = seen(QATConfig())
    with torch.no_grad():
        assert model.add.computes_integers
        model.get_submodule(node).fake_quantize_enabled = False
        assert not model.add.computes_integers
    assert not seen(QATConfig()).add.computes_integers  # gradients are on


def test_gradients_reach_both_operands() -> None:
    model = Operands(QATConfig(), nn.ReLU())
    left, right = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    model(left, right).sum().backward()
    assert torch.equal(left.grad, torch.ones(2, 3))
    assert torch.equal(right.grad, torch.ones(2, 3))


def test_the_operands_nodes_are_not_its_own() -> None:
    assert all(key.startswith("output_fake_quantize.") for key in Operands(QATConfig()).add.state_dict())


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
    assert other.add.sources == (other.left, other.right)
    with torch.no_grad():
        assert torch.equal(other(left, right), model(left, right))
        other.left.scale.mul_(2)
        assert not torch.equal(other(left, right), model(left, right))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    model = seen(QATConfig()).to(dtype)
    left, right = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    assert model(left, right).dtype is dtype
    with torch.no_grad():
        assert model(left, right).dtype is dtype


def test_evaluation_before_any_data_is_refused() -> None:
    model = Operands(QATConfig()).eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="seen no data"):
        model(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="seen no data"):
        model.add.to_integer()


def test_an_activation_that_does_more_than_clip_is_refused() -> None:
    node = FakeQuantizeLayer(QuantizationScheme())
    with pytest.raises(TypeError, match=r"activation must only clip .* got GELU"):
        QATOperation(QATConfig(), Addition(), (node, node), nn.GELU())


def test_a_relu_gives_the_sum_an_unsigned_grid() -> None:
    assert (
        str(Operands(QATConfig(), nn.ReLU()).add.output_fake_quantize.scheme) == "uint8 [0, 255] symmetric, per tensor"
    )
    assert "ReLU" in repr(Operands(QATConfig(), nn.ReLU()).add)
