"""Where the error comes in: networks that were broken at a known place, in a known way."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import (
    Explanation,
    MinMaxObserver,
    PercentileObserver,
    QATConfig,
    calibrate,
    explain,
    prepare,
)
from zoo import NETWORKS, roughen_batch_norms, train_steps

CONFIG = QATConfig(activation_observer=MinMaxObserver)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def explained(model: nn.Module, inputs: Tensor, config: QATConfig = CONFIG, threshold: float = 20.0) -> Explanation:
    prepared = prepare(model, config, (inputs[:2],))
    calibrate(prepared, [inputs])
    return explain(model, prepared, [inputs], threshold=threshold)


def test_a_sound_network_has_no_break() -> None:
    explanation = explained(network(), torch.randn(64, 16))
    assert explanation.first_break is None
    assert explanation.bad == ()
    assert explanation.verdict.endswith("no layer is below 20 dB")


@pytest.mark.parametrize("layer", ["0", "2", "4", "6"])
def test_the_layer_with_few_bits_is_named(layer: str) -> None:
    config = QATConfig(
        activation_observer=MinMaxObserver,
        overrides={layer: QATConfig(weight_bits=2, activation_observer=MinMaxObserver)},
    )
    explanation = explained(network(), torch.randn(64, 16), config)
    assert explanation.first_break is not None
    assert [bad.name for bad in explanation.bad] == [layer]
    assert explanation.first_break.own.cause == "weight"
    assert "weight_bits=4" in str(explanation.first_break.advice)
    assert f"the first layer that breaks is {layer} at" in str(explanation)


def test_signal_to_noise_is_that_of_the_outputs() -> None:
    model, inputs = network(), torch.randn(64, 16)
    prepared = prepare(model, QATConfig(weight_bits=4, activation_observer=MinMaxObserver), (inputs,))
    calibrate(prepared, [inputs])
    explanation = explain(model, prepared, [inputs[:32], inputs[32:]])
    with torch.no_grad():
        hidden, expected = (
            prepared.eval().get_submodule("0")(prepared.get_submodule("input_1_fake_quantize")(inputs)),
            model[1](model[0](inputs)),
        )
        outputs, results = prepared(inputs), model(inputs)
    by_name = {layer.name: layer for layer in explanation.layers}
    for name, one, other in (("0", hidden, expected), ("6", outputs, results)):
        error = (one - other).double().square().sum() / other.double().square().sum()
        assert by_name[name].error == pytest.approx(float(error), rel=1e-5)
    assert explanation.outputs.relative_error == pytest.approx(by_name["6"].error)


def test_a_scale_per_channel_is_proposed_for_a_weight_without() -> None:
    model = network()
    with torch.no_grad():
        model[6].weight[3] *= 500
        model[6].bias.zero_()
    config = QATConfig(activation_observer=MinMaxObserver, per_channel_weights=False)

    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) * torch.tensor([1.0, 1.0, 1.0, 1 / 500])

    explanation = explained(Rescaled(), torch.randn(64, 16), config, threshold=60)
    (layer,) = [layer for layer in explanation.layers if layer.name == "model.6"]
    assert layer.own.cause == "weight"
    assert "per_channel_weights=True" in str(layer.advice)


def test_what_is_clipped_is_told_of_a_wider_range() -> None:
    config = QATConfig(activation_observer=lambda: PercentileObserver(80.0))
    explanation = explained(network(), torch.randn(256, 16), config)
    layer = explanation.layers[0]
    assert layer.own.cause == "clipped"
    assert layer.own.clipped_share == pytest.approx(0.4, abs=0.02)  # beyond the 20th and the 80th percentile
    assert "a wider range" in str(layer.advice)


def test_uneven_channels_are_told_of_equalization() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[3] *= 1000
        model[2].bias[3] *= 1000
        model[4].weight[:, 3] /= 1000
    explanation = explained(model, torch.randn(64, 16), threshold=60)
    (layer,) = [layer for layer in explanation.layers if layer.name == "2"]
    assert layer.channel_ratio > 100
    assert "equalization" in str(layer.advice)


def test_outliers_are_told_of_percentiles() -> None:
    inputs = torch.randn(4096, 16)
    inputs[torch.arange(16), torch.arange(16)] = 400.0  # in every channel alike
    explanation = explained(network(), inputs, threshold=30)
    layer = explanation.layers[0]
    assert layer.own.cause == "rounded"
    assert layer.peak > 20
    assert "PercentileObserver" in str(layer.advice)


def test_few_bits_of_activations_are_told_of_more() -> None:
    config = QATConfig(activation_bits=3, activation_observer=MinMaxObserver)
    explanation = explained(network(), torch.randn(64, 16), config)
    assert "activation_bits=6" in str(explanation.layers[0].advice)


def test_a_constant_error_is_told_of_bias_correction() -> None:
    inputs = 5 + torch.randn(64, 16)
    config = QATConfig(weight_bits=3, activation_observer=MinMaxObserver)
    explanation = explained(nn.Sequential(nn.Linear(16, 8)), inputs, config)
    layer = explanation.layers[-1]
    assert layer.mean_share > 0.5
    assert "bias correction" in str(layer.advice)


def test_errors_that_add_up_break_no_single_layer() -> None:
    layers = [part for _ in range(12) for part in (nn.Linear(16, 16), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.4)  # type: ignore[arg-type]
    config = QATConfig(activation_observer=MinMaxObserver, weight_bits=5)
    explanation = explained(nn.Sequential(*layers), torch.randn(64, 16), config)
    deepest = explanation.layers[-1]
    assert deepest.own_share < 0.5
    explanation = replace(explanation, threshold=min(layer.snr for layer in explanation.layers) + 0.1)
    assert explanation.first_break is None
    assert "no single layer breaks, errors add up; the largest of their own: " in explanation.verdict


def test_a_float_model_that_shares_trained_weights_is_refused() -> None:
    made = NETWORKS["resnet20"]
    model = made.make()
    roughen_batch_norms(model)
    own = copy.deepcopy(model)
    inputs = made.example_inputs(8)
    prepared = prepare(model, CONFIG, inputs)
    calibrate(prepared, [inputs])
    assert not explain(model, prepared, [inputs]).trained
    train_steps(prepared, made, 1)
    with pytest.raises(ValueError, match=r"it shares Parameters with model that were changed since.*deepcopy"):
        explain(model, prepared, [inputs])
    explanation = explain(own, prepared, [inputs])
    assert explanation.trained
    assert "the weights were trained since" in str(explanation)
    with torch.no_grad():
        outputs, expected = prepared.eval()(*inputs), own.eval()(*inputs)
    error = (outputs - expected).double().square().sum() / expected.double().square().sum()
    assert explanation.outputs.relative_error == pytest.approx(float(error), rel=1e-5)


def test_another_network_is_refused() -> None:
    inputs = torch.randn(8, 16)
    prepared = prepare(network(), CONFIG, (inputs,))
    calibrate(prepared, [inputs])
    with pytest.raises(ValueError, match="must be the network that model was prepared from"):
        explain(nn.Sequential(nn.Linear(16, 4)), prepared, [inputs])
    with pytest.raises(ValueError, match="must be the float network, got a prepared one"):
        explain(prepared, prepared, [inputs])
    with pytest.raises(TypeError, match=r"float_model must be a torch\.nn\.Module, got str"):
        explain("resnet", prepared, [inputs])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one batch"):
        explain(network(), prepared, [])


def test_both_models_are_left_as_they_were() -> None:
    made = NETWORKS["mobilenet_v2"]
    model = made.make().train()
    inputs = made.example_inputs(4)
    prepared = prepare(model, CONFIG, inputs)
    calibrate(prepared, [inputs])
    prepared.train()
    before = copy.deepcopy((model.state_dict(), prepared.state_dict()))
    explain(model, prepared, [inputs])
    assert model.training
    assert all(module.training for module in prepared.modules())
    for state, kept in zip((model.state_dict(), prepared.state_dict()), before, strict=True):
        for name, value in state.items():
            assert not isinstance(value, Tensor) or torch.equal(value, kept[name]), name


@pytest.mark.parametrize("name", ["gpt_tied", "unet", "vit"])
def test_networks_of_the_zoo(name: str) -> None:
    made = NETWORKS[name]
    model, inputs = made.make(), made.example_inputs(4)
    prepared = prepare(model, CONFIG, inputs)
    calibrate(prepared, [inputs])
    explanation = explain(model, prepared, [inputs])
    assert {layer.kind for layer in explanation.layers} >= {"Linear"} or name == "unet"
    assert json.loads(json.dumps(explanation.to_dict()))["layers"][0]["name"] == explanation.layers[0].name
    assert explanation._repr_html_().count("<tr>") == len(explanation.layers) + 1


def test_where_errors_add_up_the_largest_get_advice() -> None:
    layers = [part for _ in range(24) for part in (nn.Linear(16, 16), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.4)  # type: ignore[arg-type]
    config = QATConfig(activation_observer=MinMaxObserver, weight_bits=6)
    model, inputs = nn.Sequential(*layers), torch.randn(64, 16)
    prepared = prepare(model, config, (inputs,))
    calibrate(prepared, [inputs])
    snr = explain(model, prepared, [inputs]).outputs.snr
    explanation = explain(model, prepared, [inputs], threshold=snr + 0.1)
    worst = sorted(explanation.layers, key=lambda layer: layer.own_snr)[:3]
    assert explanation.first_break is None
    assert {layer.name for layer in explanation.bad} == {layer.name for layer in worst}
