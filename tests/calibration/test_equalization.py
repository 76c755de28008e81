"""Equalization leaves the float function as it is, bit for bit, and evens out what shares a grid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_models import OTHERS_LONG, Example, all_equal, results
from mlframework.quantization import FakeQuantizeLayer, MinMaxObserver, QATConfig, calibrate, convert, equalize, prepare

IMAGES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@torch.no_grad()
def unbalanced(model: nn.Module) -> nn.Module:
    """Channels a hundred times larger than others, as pretrained depthwise networks have them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            spread = 10 ** (2 * torch.rand(module.weight.shape[0], generator=generator) - 1)
            module.weight.mul_(spread.reshape(-1, *[1] * (module.weight.dim() - 1)))
    return model.eval()


def chain(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return unbalanced(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            activation(),
            nn.MaxPool2d(2, 1),
            nn.ZeroPad2d(1),
            nn.Conv2d(8, 8, 3, groups=8),
            activation(),
            nn.Conv2d(8, 6, 1, groups=2),
            activation(),
            nn.Conv2d(6, 4, 1),
        )
    )


def normalized() -> nn.Module:
    model = unbalanced(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    model[1].weight.data = torch.tensor([0.02, 5.0, -3.0, 0.5, 1.0, 0.0, 0.1, 10.0])
    return model


def linear() -> nn.Module:
    return unbalanced(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)))


MODELS = {"chain": chain, "normalized": normalized, "linear": linear}


def in_float(model: nn.Module, batch: Tensor) -> list[Tensor]:
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = False
    with torch.no_grad():
        return results(model, batch)


def noise(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        expected = reference(IMAGES[1])
        return float((model.eval()(IMAGES[1]) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_float_function_stays(make: Any, per_channel: bool) -> None:
    model = make()
    state = copy.deepcopy(model.state_dict())
    bits = {"weight_bits": 6, "activation_bits": 6}
    config = QATConfig(**bits, activation_observer=MinMaxObserver, per_channel_weights=per_channel)
    prepared = prepare(model, config, (IMAGES[0],))
    calibrate(prepared, IMAGES)
    before = noise(prepared, model)
    report = equalize(prepared, IMAGES)
    assert report.changed
    assert not report.left_out
    with torch.no_grad():
        assert all_equal(results(model, IMAGES[1]), in_float(prepared, IMAGES[1]))
    if make is chain:
        assert noise(prepared, model) < 0.8 * before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(prepared(IMAGES[1]), convert(prepared)(IMAGES[1]))


def test_channels_before_a_depthwise_layer_get_one_range() -> None:
    model = chain()
    prepared = prepare(model, QATConfig(), (IMAGES[0],))
    equalize(prepared, IMAGES)
    with torch.no_grad():
        before = model[1](model[0](torch.cat(IMAGES))).amax((0, 2, 3))
        weight = prepared.state_dict()["0.weight"] / model[0].weight
        after = before * weight.flatten(1)[:, 0]
    assert float(before.max() / before.min()) > 10
    assert float(after.max() / after.min()) <= 2  # numbers are powers of two


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardtanh], ids=["ReLU6", "Hardtanh"])
def test_what_clips_is_left_out(activation: type[nn.Module]) -> None:
    prepared = prepare(chain(activation), QATConfig(), (IMAGES[0],))
    report = equalize(prepared, IMAGES)
    assert not report.changed
    assert all("clips at" in reason for reason in report.left_out.values())
    assert list(report.left_out) == ["0", "4", "6"]


@OTHERS_LONG
def test_any_model_keeps_its_function(example: Example) -> None:
    batches = [example.inputs(), example.inputs(3)]
    model = example.make().eval()
    prepared = prepare(model, QATConfig(), batches[0])
    equalize(prepared, batches)
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeLayer):
            module.fake_quantize_enabled = False
    with torch.no_grad():
        assert all_equal(results(model, *batches[1]), results(prepared.eval(), *batches[1]))


class ReadTwice(nn.Module):
    """A value that a layer reads, and that is also returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        return x, self.second(x)


def test_a_value_that_something_else_reads_is_left_alone() -> None:
    prepared = prepare(ReadTwice(), QATConfig(), (IMAGES[0],))
    assert not equalize(prepared, IMAGES).changed


def test_learned_scales_follow() -> None:
    prepared = prepare(chain(), QATConfig(learnable=True), (IMAGES[0],))
    equalize(prepared, IMAGES)
    observed = prepare(chain(), QATConfig(), (IMAGES[0],))
    observed.load_state_dict(prepared.state_dict(), strict=False)
    equalize(observed, IMAGES)
    for name, module in prepared.named_modules():
        if name.endswith("weight_fake_quantize"):
            expected = module.observer.range(module.scheme)[1] / module.scheme.quant_max
            assert bool((module.scale >= expected * 0.999).all())


def test_a_hook_that_changes_the_value_has_the_pair_undone() -> None:
    prepared = prepare(chain(), QATConfig(), (IMAGES[0],))
    prepared.get_submodule("0").register_forward_hook(lambda module, args, output: output.square())
    report = equalize(prepared, IMAGES)
    assert report.left_out == {"0": "the float model would compute something else"}
    assert report.changed == ["4", "6"]
