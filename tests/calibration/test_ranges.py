"""Where calibration takes ranges from, and what training goes on with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import (
    FakeQuantizeLayer,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    QATConfig,
    calibrate,
    convert,
    prepare,
)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    several = [torch.randn(64, 6, generator=generator) for _ in range(3)]
    several[1][0, 0] = 40.0  # an outlier, which the extremes would follow
    return several


def activation_nodes(model: nn.Module) -> list[FakeQuantizeLayer]:
    nodes = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizeLayer)}
    return [node for name, node in nodes.items() if "weight" not in name]


def test_the_default_is_the_range_of_least_squared_error() -> None:
    model = prepare(network(), QATConfig(activation_bits=4), (batches()[0],))
    calibrate(model, batches())
    node = activation_nodes(model)[-1]
    values = torch.cat(batches())
    observer = HistogramObserver()
    for batch in batches():
        observer(batch)
    low, high = observer.range(node.scheme)
    assert type(node.observer) is MovingAverageObserver
    assert torch.equal(torch.cat(node.observer.range(node.scheme)), torch.cat([low, high]))
    assert node.scale.item() < (values.max() - values.min()).item() / 15  # the outlier saturates


def test_an_observer_of_the_configuration_calibrates() -> None:
    model = prepare(network(), QATConfig(activation_observer=MinMaxObserver), (batches()[0],))
    calibrate(model, batches())
    node = activation_nodes(model)[-1]
    values = torch.cat(batches())
    assert isinstance(node.observer, MinMaxObserver)
    assert node.scale.item() == pytest.approx((values.max() - values.min()).item() / 255, rel=1e-6)


def test_training_goes_on_from_the_calibrated_range() -> None:
    model = prepare(network(), QATConfig(), (batches()[0],))
    calibrate(model, batches())
    node = activation_nodes(model)[-1]
    before = torch.cat(node.observer.range(node.scheme))
    batch = torch.randn(64, 6)
    model.train()(batch)
    expected = before + 0.01 * (torch.stack(batch.aminmax()) - before)
    torch.testing.assert_close(torch.cat(node.observer.range(node.scheme)), expected)


def test_an_interrupted_calibration_gives_the_observers_back() -> None:
    def broken() -> object:
        yield batches()[0]
        raise KeyboardInterrupt

    model = prepare(network(), QATConfig(), (batches()[0],))
    calibrate(model, batches())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, broken())
    assert all(type(node.observer) is MovingAverageObserver for node in activation_nodes(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if torch.is_tensor(value))


def squared_error(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    codes = (weight.double() / scale.double()[:, None]).round().clamp(-largest, largest)
    return (codes * scale.double()[:, None] - weight.double()).square().sum(1)


@pytest.mark.parametrize("learnable", [False, True])
def test_weights_of_few_bits_have_scales_of_least_squared_error(learnable: bool) -> None:
    model = prepare(network(), QATConfig(weight_bits=3, learnable=learnable), (batches()[0],))
    calibrate(model, batches())
    wrapper = model[0]
    weight, scale = wrapper.weight.detach(), wrapper.weight_fake_quantize.scale.detach()
    found = squared_error(weight, scale, 3)
    # A search over many more scales than the library tries: it may be a little better, by what lies between its steps.
    tried = torch.stack(
        [squared_error(weight, weight.abs().amax(1) * share / 3, 3) for share in torch.linspace(0.2, 1.2, 2000)]
    )
    assert (found <= tried.amin(0) * 1.02).all()
    assert (found < squared_error(weight, weight.abs().amax(1) / 3, 3)).any()


def test_the_scales_of_weights_of_few_bits_follow_the_weights_and_are_kept_by_copies() -> None:
    model = prepare(network(), QATConfig(weight_bits=4), (batches()[0],))
    calibrate(model, batches())
    scale = model[0].weight_fake_quantize.scale.clone()
    model.train()(batches()[0])
    torch.testing.assert_close(model[0].weight_fake_quantize.scale, scale)  # what was found, of the largest magnitude
    with torch.no_grad():
        model[0].weight.mul_(3)
        model(batches()[0])
        torch.testing.assert_close(model[0].weight_fake_quantize.scale, 3 * scale)
        model.eval()
        expected = model(batches()[2])
        torch.testing.assert_close(model[0].weight_fake_quantize.scale, 3 * scale)
        assert torch.equal(convert(model)(batches()[2]), expected)
        assert torch.equal(copy.deepcopy(model)(batches()[2]), expected)
        fresh = prepare(network(), QATConfig(weight_bits=4), (batches()[0],)).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(batches()[2]), expected)


def test_the_scales_of_weights_of_8_bits_follow_the_weights() -> None:
    model = prepare(network(), QATConfig(), (batches()[0],))
    calibrate(model, batches())
    with torch.no_grad():
        model[0].weight.mul_(2)
        model.eval()(batches()[0])
    wrapper = model[0]
    torch.testing.assert_close(wrapper.weight_fake_quantize.scale, wrapper.weight.detach().abs().amax(1) / 127)


def test_methods_are_refused_where_ranks_would_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(network(), QATConfig(), (batches()[0],))
    monkeypatch.setattr("mlframework.quantization.calibration.calibrate.is_distributed", lambda: True)
    with pytest.raises(RuntimeError, match=r"method must be empty under torch.distributed, got \('correct_bias',\)"):
        calibrate(model, batches(), method="correct_bias")


def test_a_held_scale_of_a_weight_is_held() -> None:
    model = prepare(network(), QATConfig(weight_bits=4), (batches()[0],))
    calibrate(model, batches(), method="round_weights")
    before = [model[index].weight_fake_quantize.scale.clone() for index in (0, 2)]
    calibrate(model, batches())
    assert all(map(torch.equal, before, [model[index].weight_fake_quantize.scale for index in (0, 2)]))
