"""Oscillating weights: against algorithm 1 written for one weight, and a network that oscillates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.quantization import OscillationFreezer, QATConfig, calibrate, convert, dampening_loss, prepare
from mlframework.quantization.training.latent_weights import latent_weights


def prepared_linear(learnable: bool = False, bits: int = 3, features: int = 4) -> nn.Module:
    inputs = torch.randn(6, features)
    model = prepare(nn.Linear(features, 3), QATConfig(weight_bits=bits, learnable=learnable), (inputs,))
    model(inputs)
    return model


def by_hand(
    history: list[list[float]], scales: list[float], zero: int, lowest: int, highest: int, freezer: OscillationFreezer
) -> tuple[list[float], bool, float]:
    """Algorithm 1 of the paper for one weight, with Python's numbers."""
    import math

    def code(value: float, scale: float) -> int:
        return min(max(round(value / scale) + zero, lowest), highest)

    last, direction, frequency, frozen = code(history[0][0], scales[0]), 0, 0.0, False
    average = float(last)
    values = []
    for step, ((value,), scale) in enumerate(zip(history[1:], scales[1:], strict=True)):
        span = freezer.first_threshold - freezer.last_threshold
        threshold = freezer.last_threshold + span * (1 + math.cos(math.pi * step / freezer.steps)) / 2
        now = last if frozen else code(value, scale)
        change = (now > last) - (now < last)
        frequency += freezer.momentum * ((change * direction < 0) - frequency)
        average += freezer.momentum * (now - average)
        direction = change or direction
        if frequency > threshold and not frozen:
            frozen, now = True, round(average)
        last = now
        values.append((now - zero) * scale if frozen else value)
    return values, frozen, frequency


@pytest.mark.parametrize("learnable", [False, True])
def test_freezing_follows_the_algorithm(learnable: bool) -> None:
    model = prepared_linear(learnable)
    weight, node = model.weight, model.weight_fake_quantize
    freezer = OscillationFreezer(model, steps=40, threshold=(0.5, 0.1), momentum=0.2)
    generator = torch.Generator().manual_seed(3)
    history, scales, results = [weight.detach().clone()], [node.scale.detach().clone()], []
    for step in range(40):
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * node.scale[:, None] * (0.7 if step % 3 else 0.1))
            node.scale.mul_(1 + 0.02 * torch.randn(3, generator=generator).abs())
        history.append(weight.detach().clone())
        scales.append(node.scale.detach().clone())
        freezer.step()
        results.append(weight.detach().clone())
    scheme = node.scheme
    frozen = 0
    for row in range(3):
        for column in range(4):
            # The weights that the optimizer would have made do not depend on what the freezer put back: a frozen one
            # is put back at every step.
            values, is_frozen, frequency = by_hand(
                [[each[row, column].item()] for each in history],
                [each[row].item() for each in scales],
                0,
                scheme.quant_min,
                scheme.quant_max,
                freezer,
            )
            got = [each[row, column].item() for each in results]
            assert got == pytest.approx(values, rel=1e-5, abs=1e-6)
            tracker = freezer._trackers[""]
            assert bool(tracker.is_frozen[row, column]) == is_frozen
            assert tracker.frequency[row, column].item() == pytest.approx(frequency, rel=1e-4, abs=1e-6)
            frozen += is_frozen
    assert 0 < frozen < 12
    assert freezer.frozen() == {"": pytest.approx(frozen / 12)}


def test_a_weight_that_drifts_one_way_is_left_alone() -> None:
    model = prepared_linear(learnable=True)
    freezer = OscillationFreezer(model, steps=10, threshold=(0.01, 0.01), momentum=0.1)
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(model.weight_fake_quantize.scale[:, None])
        freezer.step()
    assert freezer.oscillating() == freezer.frozen() == {"": 0.0}


def toggled(model: nn.Module, step: int) -> None:
    """Half of the weights cross a boundary to and fro."""
    scale = model.weight_fake_quantize.scale.detach()[:, None]
    with torch.no_grad():
        model.weight[:, :2].copy_(torch.where(torch.tensor(step % 2 == 0), 0.4, 0.6) * scale)


def test_shares_are_reported_and_frozen_weights_lie_at_the_centre_of_their_bins() -> None:
    model = prepared_linear(learnable=True)
    freezer = OscillationFreezer(model, steps=100, threshold=(0.6, 0.6), momentum=0.1)
    for step in range(4):
        toggled(model, step)
        freezer.step()
    assert freezer.oscillating() == {"": 0.5}
    for step in range(30):
        toggled(model, step)
        freezer.step()
    assert freezer.frozen() == {"": 0.5}
    codes = model.weight.detach() / model.weight_fake_quantize.scale.detach()[:, None]
    torch.testing.assert_close(codes[:, :2], codes[:, :2].round())


def test_a_resumed_freezer_goes_on_as_if_nothing_had_happened() -> None:
    model = prepared_linear(learnable=True)
    other = copy.deepcopy(model)
    freezers = [OscillationFreezer(each, steps=40, threshold=(0.3, 0.2), momentum=0.1) for each in (model, other)]
    for step in range(5):
        toggled(model, step)
        freezers[0].step()
    other.load_state_dict(model.state_dict())
    freezers[1].load_state_dict(freezers[0].state_dict())
    for step in range(5, 20):
        for each, freezer in zip((model, other), freezers, strict=True):
            toggled(each, step)
            freezer.step()
    assert torch.equal(model.weight, other.weight)
    assert freezers[0].frozen() == freezers[1].frozen() != {"": 0.0}
    with pytest.raises(ValueError, match=r"layers of the model, got \['x'\]"):
        freezers[1].load_state_dict({"steps_taken": 1, "layers": {"x": {}}})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))  # type: ignore[no-any-return]


def test_a_weight_that_two_layers_share_counts_once() -> None:
    tokens = torch.randint(7, (2, 3))
    model = prepare(Tied(), QATConfig(weight_bits=4), (tokens,))
    assert len(latent_weights(model)) == 1
    freezer = OscillationFreezer(model, steps=2)
    model(tokens).sum().backward()
    freezer.step()
    assert len(freezer.frozen()) == 1


def test_dampening_against_equation_five_in_float64() -> None:
    model = prepared_linear(learnable=True, bits=2)
    weight, scale = model.weight.detach().double(), model.weight_fake_quantize.scale.detach().double()[:, None]
    with torch.no_grad():
        model.weight[0, 0] = 10.0  # beyond the end of the grid
        weight[0, 0] = 10.0
    scheme = model.weight_fake_quantize.scheme
    clipped = weight.clamp(scheme.quant_min * scale, scheme.quant_max * scale)
    centres = (weight / scale).round().clamp(scheme.quant_min, scheme.quant_max) * scale
    loss = dampening_loss(model)
    assert loss.item() == pytest.approx((centres - clipped).square().sum().item(), rel=1e-5)
    loss.backward()
    inside = (weight == clipped).float()
    torch.testing.assert_close(model.weight.grad.double(), 2 * (weight - centres) * inside, rtol=1e-4, atol=1e-6)
    assert model.weight_fake_quantize.scale.grad is None


def test_dampening_makes_weights_settle_on_the_grid() -> None:
    model = prepared_linear(learnable=True, features=16)
    optimizer = torch.optim.SGD([model.weight], lr=0.2)
    before = dampening_loss(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        dampening_loss(model).backward()
        optimizer.step()
    assert dampening_loss(model).item() < 1e-3 * before


def test_frozen_weights_convert_to_the_codes_that_they_are_frozen_at() -> None:
    model = prepared_linear(learnable=True)
    freezer = OscillationFreezer(model, steps=30, threshold=(0.2, 0.2), momentum=0.1)
    for step in range(30):
        toggled(model, step)
        freezer.step()
    tracker = freezer._trackers[""]
    assert bool(tracker.is_frozen.any())
    int8: Any = convert(model)
    inputs = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(int8(inputs), model.eval()(inputs))
    assert torch.equal(latent_weights(model)[0].codes[tracker.is_frozen], tracker.last_codes[tracker.is_frozen].float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a positive int, got 0"),
        ({"steps": 2, "threshold": (0.1, 0.0)}, "threshold must be two positive numbers"),
        ({"steps": 2, "momentum": 1.0}, "momentum must be between 0 and 1, got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OscillationFreezer(prepared_linear(), **arguments)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="quantized weights in training, got none"):
        dampening_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="prepared model with quantized layers, got none"):
        OscillationFreezer(nn.Linear(2, 2), steps=1)


class OwnCall(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 1.0 if self.bias is None else self.weight, self.bias)


def test_a_weight_that_the_models_code_hands_to_a_function_counts() -> None:
    inputs = torch.randn(6, 4)
    model = prepare(nn.Sequential(OwnCall(4, 3), nn.ReLU(), OwnCall(3, 2, bias=False)), QATConfig(), (inputs,))
    freezer = OscillationFreezer(model, steps=2)
    assert freezer.frozen() == {}
    model(inputs).sum().backward()
    freezer.step()
    (weight,) = latent_weights(model)  # the other is computed
    assert weight.weight is model[0].weight
    assert list(freezer.frozen()) == [weight.name]
    assert len(latent_weights(copy.deepcopy(model))) == 0  # until it has run
    other = OscillationFreezer(copy.deepcopy(model), steps=2)
    other.load_state_dict(freezer.state_dict())
    other.model(inputs)
    other.step()
    assert list(other.frozen()) == [weight.name]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(F.linear(x, self.weight)))  # type: ignore[no-any-return]


def test_weights_given_to_functions_are_those_of_the_prepared_model_after_it_got_its_own() -> None:
    model, inputs = Functional(), torch.randn(32, 8)
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, QATConfig(weight_bits=2), (inputs,))
    calibrate(prepared, [inputs], method="round_weights")
    assert prepared.weight is not model.weight
    freezer = OscillationFreezer(prepared, steps=40, threshold=(1e-3, 1e-3), momentum=0.5)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1.0)
    for step in range(40):
        optimizer.zero_grad()
        prepared(inputs)
        for parameter in prepared.parameters():  # to and fro across a boundary
            parameter.grad = torch.full_like(parameter, -1.0 if step % 2 else 1.0)
        optimizer.step()
        freezer.step()
    assert freezer.frozen()["linear"] > 0.5
    codes = prepared.linear.weight_fake_quantize.to_codes
    is_frozen, held = freezer._trackers["linear"].is_frozen.clone(), codes(prepared.weight)
    for direction in (1.0, -1.0):
        prepared(inputs)
        prepared.weight.grad = torch.full_like(prepared.weight, direction)
        optimizer.step()
        assert not torch.equal(codes(prepared.weight)[is_frozen], held[is_frozen])
        freezer.step()
        assert torch.equal(codes(prepared.weight)[is_frozen], held[is_frozen])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_parameter_that_a_model_no_longer_has_is_no_weight_of_it() -> None:
    model, inputs = Functional(), torch.randn(4, 8)
    prepared = prepare(model, QATConfig(weight_bits=4), (inputs,))
    prepared(inputs)
    assert [weight.name for weight in latent_weights(prepared)] == ["last", "linear"]
    prepared.weight = nn.Parameter(prepared.weight.detach().clone())
    assert [weight.name for weight in latent_weights(prepared)] == ["last"]
    prepared(inputs)
    assert latent_weights(prepared)[1].weight is prepared.weight
