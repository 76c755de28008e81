"""Whole models on the kernels for GPUs, in the interpreter, and the same on those of the CPU."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from example_codes import SIGNED, UNSIGNED, random_codes
from example_models import EXAMPLES, all_equal, results, train_briefly
from example_steps import assert_steps_agree, step_of
from mlframework.quantization import QATConfig, convert, kernels, prepare
from mlframework.quantization.kernels import ConvolutionGeometry, ConvolutionProduct, Epilogue, devices
from mlframework.quantization.kernels.backends.triton_gpu import TRITON_GPU
from mlframework.quantization.kernels.operators.declaration import DECLARED
from mlframework.quantization.kernels.triton_gpu import availability

pytestmark = pytest.mark.interpreter

SOME = pytest.mark.parametrize("name", ["cnn", "mlp"])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often kernels for GPUs run layers, by operator."""
    counts: Counter[str] = Counter()

    def counting(name: str, run: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return run(*arguments)

        return call

    for name in ("train_layer", "weighted_product", "folded_layer"):
        monkeypatch.setattr(DECLARED[name], "on_gpu", counting(name, DECLARED[name].on_gpu))
    return counts


def prepared(name: str, **options: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    inputs = EXAMPLES[name].inputs()
    return prepare(EXAMPLES[name].make(), QATConfig(), example_inputs=inputs, **options), inputs


@SOME
def test_evaluation_and_conversion_give_the_same_codes(name: str, runs: Counter[str]) -> None:
    model, inputs = prepared(name)
    train_briefly(model, inputs)
    converted = convert(model.eval())
    with torch.no_grad():
        expected = results(model, *inputs)
        assert all_equal(results(converted, *inputs), expected)
        assert not runs
        with kernels.interpreted_kernels():
            assert all_equal(results(copy.deepcopy(model), *inputs), expected)
            evaluated = runs["folded_layer"]
            assert evaluated > 0
            assert all_equal(results(converted, *inputs), expected)
            assert runs["folded_layer"] == 2 * evaluated


@pytest.mark.parametrize(("name", "recompute"), [("cnn", False), ("cnn", True), ("mlp", False)])
def test_training_computes_the_same(name: str, recompute: bool, runs: Counter[str]) -> None:
    """But for sums of float32 in another order."""
    model, inputs = prepared(name, recompute=recompute)
    train_briefly(model, inputs)  # now its nodes have seen data
    torch.manual_seed(9)  # of a dropout
    expected = step_of(model, *inputs)
    assert not runs
    torch.manual_seed(9)
    with kernels.interpreted_kernels():
        actual = step_of(model, *inputs)
    assert runs["train_layer"] > 0
    assert (runs["weighted_product"] > 0) is recompute
    assert_steps_agree(actual, expected, rtol=1e-3)


def test_under_autocast_a_layer_returns_its_dtype(runs: Counter[str]) -> None:
    """As a float layer does, and gradients are their parameters'."""
    model, inputs = prepared("mlp")
    train_briefly(model, inputs)
    with kernels.interpreted_kernels(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(*inputs)
        assert output.dtype is torch.bfloat16
        output.float().square().mean().backward()
    assert runs["train_layer"] > 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32


def test_a_model_in_half_precision_trains_on_integers(runs: Counter[str]) -> None:
    """Which on a CPU it does not."""
    model, inputs = prepared("cnn", recompute=True)
    train_briefly(model, inputs)
    model = model.bfloat16()
    with kernels.interpreted_kernels():
        output = model(inputs[0].bfloat16())
        output.float().square().mean().backward()
    assert output.dtype is torch.bfloat16
    assert runs["train_layer"] > 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.bfloat16
        assert parameter.grad.isfinite().all()


def test_a_graph_holds_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of a GPU that only stand for some, as a compiler has them."""
    weight = random_codes((8, 4, 3, 3), SIGNED)
    product = ConvolutionProduct(weight, 3, UNSIGNED, ConvolutionGeometry((1, 1), (1, 1), (1, 1)))
    layer: Any = TRITON_GPU.layer(product, Epilogue(torch.zeros(8, dtype=torch.int32), torch.ones(1)))
    monkeypatch.setattr(availability, "runs_on", lambda index: True)
    monkeypatch.setattr(devices, "is_traced", lambda: True)
    with FakeTensorMode():
        layer.arguments = [
            torch.empty(each.shape, dtype=each.dtype, device="cuda") if isinstance(each, Tensor) else each
            for each in layer.arguments
        ]
        codes = torch.empty((2, 4, 5, 6), dtype=torch.uint8, device="cuda")
        graph = make_fx(layer)(codes).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [call.target for call in calls] == [DECLARED["folded_layer"].overload]
    assert calls[0].meta["val"].shape == (2, 8, 5, 6)
