"""Checkpoints of the float model in a prepared one, and the other way round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from example_architectures import SmallResNet
from mlframework.quantization import QATConfig, calibrate, convert, float_state_dict, load_float_state_dict, prepare
from zoo.gpt import GPT


class HandedOver(nn.Module):
    """Hands its weight to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.kernel)


class CalledTwice(nn.Module):
    """One layer at two places, and a second name for another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.also = self.second

    def forward(self, input: Tensor) -> Tensor:
        return self.also(self.second(self.first(self.first(input).relu()).relu()))


def _checkpointed() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))


class Versioned(nn.Linear):
    """Another layout of its state before."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


NETWORKS = {
    "called twice": (CalledTwice, torch.randn(2, 4)),
    "checkpointed": (_checkpointed, torch.randn(2, 4)),
    "convolutions": (SmallResNet, torch.randn(2, 3, 8, 8)),
    "tied": (lambda: GPT(12, 8, 16, 1, 2, tied=True), torch.zeros(2, 8, dtype=torch.long)),
    "one layer": (lambda: nn.Linear(4, 2), torch.randn(2, 4)),
    "parametrized": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 2)), nn.ReLU()), torch.randn(2, 4)),
    "handed over": (HandedOver, torch.randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_goes_in_and_out(name: str, learnable: bool) -> None:
    make, input = NETWORKS[name]
    torch.manual_seed(0)
    config = QATConfig(weight_bits=4, learnable=learnable)
    model, other = prepare(make(), config, (input,)), make()
    load_float_state_dict(model, other.state_dict())
    state = float_state_dict(model)
    assert list(state) == list(other.state_dict())
    make().load_state_dict(state, strict=True)
    # As if the other weights had been prepared from the first.
    expected = prepare(copy.deepcopy(other), config, (input,))
    if name == "handed over" and learnable:
        model.train()(input)
    for each in (model, expected):
        calibrate(each, [input])
        each.eval()
    with torch.no_grad():
        outputs = model(input)
        assert torch.equal(outputs, expected(input))
        assert torch.equal(outputs, convert(model)(input))


def test_versions_go_with_it() -> None:
    model = prepare(nn.Sequential(Versioned(4, 2)), QATConfig(), (torch.randn(2, 4),))
    nn.Sequential(Versioned(4, 2)).load_state_dict(float_state_dict(model))


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 2), lambda: weight_norm(nn.Linear(4, 2))])
def test_a_learned_scale_follows_where_other_keys_are_let_go(make: Any) -> None:
    """``strict=False`` with the float model's state, by PyTorch's own means."""
    torch.manual_seed(0)
    config, input = QATConfig(learnable=True), torch.randn(2, 4)
    other = nn.Sequential(make())
    model = prepare(nn.Sequential(make()), config, (input,))
    model.load_state_dict(other.state_dict(), strict=False)
    expected = prepare(other, config, (input,))
    assert torch.equal(model[0].weight_fake_quantize.scale, expected[0].weight_fake_quantize.scale)


def test_scales_of_activations_stay() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig(), (torch.randn(2, 4),))
    calibrate(model, [torch.randn(16, 4)])
    before = model.input_1_fake_quantize.scale.clone()
    load_float_state_dict(model, nn.Sequential(nn.Linear(4, 2)).state_dict())
    assert torch.equal(model.input_1_fake_quantize.scale, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.bias"), r"0\.bias is missing"),
        (lambda state: state.update(more=torch.ones(1)), r"more is not expected"),
        (lambda state: state.update({"0.bias": 1}), r"0\.bias must be a tensor, got int"),
        (lambda state: state["0.bias"].fill_(torch.nan), r"0\.bias holds NaN or infinite values"),
        (lambda state: state.update({"0.bias": torch.ones(3)}), r"0\.bias must be of shape \(2,\), got \(3,\)"),
        (lambda state: state.update({"0.bias": torch.ones(2).int()}), r"0\.bias must be of a floating-point"),
    ],
)
def test_another_models_state_changes_nothing(change: object, message: str) -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig(learnable=True), (torch.randn(2, 4),))
    state = nn.Sequential(nn.Linear(4, 2)).state_dict()
    change(state)  # type: ignore[operator]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        load_float_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
