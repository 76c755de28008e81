"""Hooks fire on the wrapper and on the layer inside, in training and on integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_layers import EVERY_LAYER, EVERY_PRODUCT, LayerExample, wrapped
from mlframework.quantization import QATModuleWrapper

Calls = list[tuple[str, str]]


def record_forward(name: str, module: nn.Module, calls: Calls) -> None:
    module.register_forward_pre_hook(lambda module, args: calls.append((name, "forward pre")))
    module.register_forward_hook(lambda module, args, output: calls.append((name, "forward")))


def record_backward(name: str, module: nn.Module, calls: Calls) -> None:
    module.register_full_backward_pre_hook(lambda module, gradients: calls.append((name, "backward pre")))
    module.register_full_backward_hook(lambda module, inner, outer: calls.append((name, "backward")))


@EVERY_LAYER
@pytest.mark.parametrize("mode", ["training", "evaluation with gradients", "integers"])
def test_forward_hooks_fire_once_each(example: LayerExample, mode: str) -> None:
    wrapper, calls = wrapped(example), Calls()
    record_forward("wrapper", wrapper, calls)
    record_forward("layer", wrapper.layer, calls)
    wrapper.train(mode == "training")
    with torch.set_grad_enabled(mode != "integers"):
        wrapper(*example.inputs())
    assert calls == [
        ("wrapper", "forward pre"),
        ("layer", "forward pre"),
        ("layer", "forward"),
        ("wrapper", "forward"),
    ]


@EVERY_PRODUCT
@pytest.mark.parametrize("training", [True, False])
def test_backward_hooks_fire_once_each(example: LayerExample, training: bool) -> None:
    wrapper, calls = wrapped(example), Calls()
    record_backward("wrapper", wrapper, calls)
    record_backward("layer", wrapper.layer, calls)
    wrapper.train(training)(*example.inputs(requires_grad=True)).sum().backward()
    assert calls == [
        ("wrapper", "backward pre"),
        ("layer", "backward pre"),
        ("layer", "backward"),
        ("wrapper", "backward"),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["batch norm", "activation"])
def test_hooks_of_what_follows_fire_on_integers(which: int) -> None:
    following: tuple[Any, Any] = (nn.BatchNorm2d(4), nn.ReLU())
    wrapper = QATModuleWrapper(nn.Conv2d(3, 4, 3), batch_norm=following[0], activation=following[1])
    wrapper(torch.randn(4, 3, 6, 6))
    for module in (wrapper, *following):
        module.eval()
    calls = Calls()
    record_forward("inside", following[which], calls)
    with torch.no_grad():
        wrapper(torch.randn(2, 3, 6, 6))
    assert calls == [("inside", "forward pre"), ("inside", "forward")]


@EVERY_LAYER
def test_a_hook_that_looks_changes_nothing(example: LayerExample) -> None:
    wrapper, inputs = wrapped(example), example.inputs()
    with torch.no_grad():
        expected = wrapper(*inputs)
        record_forward("layer", wrapper.layer, Calls())
        assert torch.equal(wrapper(*inputs), expected)


def test_a_hook_sees_the_fake_quantized_weight() -> None:
    wrapper = QATModuleWrapper(nn.Linear(3, 2))
    wrapper.weight_fake_quantize.eval()
    seen: list[Tensor] = []
    wrapper.layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach()))
    wrapper(torch.randn(4, 3))
    assert torch.equal(seen[0], wrapper.weight_fake_quantize(wrapper.weight))
    assert isinstance(wrapper.layer.weight, nn.Parameter)


def test_a_forward_that_raises_leaves_the_parameter_in_place() -> None:
    wrapper = QATModuleWrapper(nn.Linear(3, 2))
    weight = wrapper.weight
    with pytest.raises(RuntimeError):
        wrapper(torch.randn(4, 5))
    assert wrapper.weight is wrapper.layer.weight is weight
