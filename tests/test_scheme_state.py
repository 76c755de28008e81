"""State dicts that no grid can have are refused by name, before any of them is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, convert, prepare

pytestmark = pytest.mark.slow

INPUTS = torch.randn(16, 6)
State = dict[str, Tensor]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(4, 3), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:
        hidden: Tensor = self.first(input).relu()
        return self.last(hidden) + self.table(torch.zeros(1, dtype=torch.long)).sum()  # type: ignore[no-any-return]


def prepared_model(**fields: Any) -> nn.Module:
    prepared = prepare(Model(), QATConfig(**fields), (INPUTS,))
    calibrate(prepared, [INPUTS])
    return prepared


def converted_model() -> nn.Module:
    return convert(prepared_model())


def assert_refused(model: nn.Module, state: State, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@cache
def made_once(make: Callable[[], nn.Module]) -> nn.Module:
    """For states that are refused, which leave it as it is."""
    return make()


def with_values(state: State, name: str, value: float | Tensor) -> State:
    changed = copy.deepcopy(dict(state))
    changed[name] = value if isinstance(value, Tensor) else torch.full_like(state[name], value)
    for other in state:  # so that something would have been loaded
        if other != name and other.endswith("bias"):
            changed[other] = state[other] + 1
    return changed


@pytest.mark.parametrize("value", [math.nan, 0.0, -0.5, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (prepared_model, "first.output_fake_quantize.scale"),
        (prepared_model, "last.weight_fake_quantize.scale"),
        (lambda: prepared_model(learnable=True), "last.weight_fake_quantize.scale"),
        (converted_model, "first.output_scale"),
        (converted_model, "last.weight_scale"),
        (converted_model, "table.weight_scale"),
    ],
)
def test_a_scale_must_be_finite_and_positive(make: Callable[[], nn.Module], name: str, value: float) -> None:
    model = made_once(make)
    assert_refused(model, with_values(model.state_dict(), name, value), f"{name} must be finite and positive, got")


@pytest.mark.parametrize("value", [999, -1, 256])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (prepared_model, "first.output_fake_quantize.zero_point"),
        (lambda: prepared_model(learnable=True), "first.output_fake_quantize.zero_point"),
        (converted_model, "first.input_zero_point"),
        (converted_model, "last.input_zero_point"),
    ],
)
def test_a_zero_point_must_lie_on_its_grid(make: Callable[[], nn.Module], name: str, value: int) -> None:
    model = made_once(make)
    state = with_values(model.state_dict(), name, value)
    assert_refused(model, state, rf"{name} must lie on the grid, from 0 to 255, got \[{value}")


def test_a_zero_point_that_is_nan() -> None:
    model, name = prepared_model(), "first.output_fake_quantize.zero_point"
    assert_refused(model, with_values(model.state_dict(), name, math.nan), "must lie on the grid")


@pytest.mark.parametrize("name", ["first.weight", "table.weight", "first.bias", "last.input_zero_point"])
def test_integers_must_be_integers(name: str) -> None:
    model = converted_model()
    state = dict(model.state_dict())
    assert_refused(model, {**state, name: state[name].float() + 0.5}, f"{name} must be of dtype torch.int")


@pytest.mark.parametrize(
    "grid",
    [
        torch.tensor([99, 1, 1, 1, 0]),
        torch.tensor([8, 1, 1]),
        torch.tensor(8),
        torch.tensor([[8, 1, 1, 1, 0]]),
        torch.full((5,), math.nan),
    ],
    ids=["bits", "short", "a number", "a matrix", "NaN"],
)
@pytest.mark.parametrize(
    ("make", "name"), [(prepared_model, "first.weight_fake_quantize.grid"), (converted_model, "first.input_grid")]
)
def test_a_malformed_grid(make: Callable[[], nn.Module], name: str, grid: Tensor) -> None:
    model = make()
    assert_refused(model, {**model.state_dict(), name: grid}, rf"{name} must be five integers \[bits, signed")


def test_a_module_alone_refuses_too() -> None:
    layer = converted_model().get_submodule("first")
    assert_refused(layer, with_values(layer.state_dict(), "weight_scale", 0.0), "weight_scale must be finite")


def test_the_grid_is_saved_and_is_no_buffer() -> None:
    for model in (prepared_model(), converted_model()):
        names = [name for name in model.state_dict() if name.endswith("grid")]
        assert names
        assert not [name for name, _ in model.named_buffers() if name.endswith("grid")]
        loaded = load(save(model.state_dict()))
        assert all(torch.equal(loaded[name], model.state_dict()[name]) for name in names)
        assert str(model.load_state_dict(loaded)) == "<All keys matched successfully>"


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (prepared_model, lambda: Model().state_dict()),
        (lambda: prepared_model(quantize_last_linear=True), lambda: prepared_model().state_dict()),
        (prepared_model, lambda: prepared_model(quantize_last_linear=True).state_dict()),
    ],
    ids=["float", "a node less", "a node more"],
)
def test_keys_of_other_nodes_come_with_a_hint(make: Callable[[], nn.Module], state: Callable[[], State]) -> None:
    with pytest.raises(
        RuntimeError, match=r"load_float_state_dict\(\), which leaves activations to calibrate\(\)"
    ) as caught:
        make().load_state_dict(state())
    assert str(caught.value).count("calibrate()") == 1


def test_what_the_hint_says_is_so() -> None:
    prepared, trained = prepared_model(), Model()
    with torch.no_grad():
        trained.first.weight.mul_(3)
    missing, unexpected = prepared.load_state_dict(trained.state_dict(), strict=False)
    assert "first.weight_fake_quantize.scale" in missing
    assert not unexpected
    calibrate(prepared, [INPUTS])
    expected = prepare(trained, QATConfig(), (INPUTS,))
    calibrate(expected, [INPUTS])
    with torch.no_grad():
        assert torch.equal(convert(prepared)(INPUTS), convert(expected)(INPUTS))
