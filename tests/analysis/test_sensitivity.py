"""What a layer costs alone, and what the others cost without it, against models made by hand and by configuration."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_architectures import SmallResNet
from mlframework.quantization import (
    FakeQuantizeLayer,
    MinMaxObserver,
    QATConfig,
    SensitivityReport,
    analyze_sensitivity,
    calibrate,
    prepare,
)
from mlframework.quantization.analysis.checkpoint import fingerprint_of_values
from zoo import NETWORKS, roughen_batch_norms

CONFIG = QATConfig(activation_observer=MinMaxObserver)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def calibrated(model: nn.Module, inputs: Tensor, config: QATConfig = CONFIG) -> nn.Module:
    prepared = prepare(model, config, (inputs[:2],)).eval()
    calibrate(prepared, [inputs])
    return prepared


def error(outputs: Tensor, reference: Tensor) -> float:
    outputs, reference = outputs.detach().double(), reference.detach().double()
    return float((outputs - reference).square().sum() / reference.square().sum())


def on_grid(values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    """In float64, by the formula."""
    scale, values = scale.double(), values.double()
    codes = (torch.round(values / scale) + zero_point).clamp(lowest, highest)
    return (codes - zero_point) * scale


def symmetric_rows(weight: Tensor, bits: int) -> Tensor:
    highest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True) / highest
    return on_grid(weight, scale, torch.zeros(1), -highest, highest)


def test_a_layer_alone_has_its_weight_and_if_activations_count_its_input_on_grids_and_nothing_else() -> None:
    model, inputs = mlp(), torch.randn(32, 8)
    prepared = calibrated(model, inputs)
    report = analyze_sensitivity(prepared, [inputs[:16], inputs[16:]], bits=(8,))
    of_weights = analyze_sensitivity(prepared, [inputs[:16], inputs[16:]], bits=(8,), activations=False)
    model = model.double()
    hidden = F.relu(model[0](inputs.double()))
    grid = prepared.get_submodule("0").output_fake_quantize
    assert isinstance(grid, FakeQuantizeLayer)
    entering = on_grid(hidden, grid.scale, grid.zero_point, 0, 255)
    weight = symmetric_rows(model[2].weight, 8)
    reference = model(inputs.double())
    layer = report.at(8)[1]
    alone = model[4](F.relu(F.linear(entering, weight, model[2].bias)))
    assert layer.alone.relative_error == pytest.approx(error(alone, reference), rel=1e-2)  # sums in float32
    own = F.relu(F.linear(hidden, model[2].weight, model[2].bias))
    by_weight = F.relu(F.linear(hidden, weight, model[2].bias))
    by_input = F.relu(F.linear(entering, model[2].weight, model[2].bias))
    assert layer.split.weight == pytest.approx(error(by_weight, own), rel=1e-2)
    assert layer.split.rounded == pytest.approx(error(by_input, own), rel=1e-2)
    assert layer.split.clipped == layer.split.clipped_share == 0
    weight_alone = model[4](F.relu(F.linear(hidden, weight, model[2].bias)))
    assert of_weights.at(8)[1].alone.relative_error == pytest.approx(error(weight_alone, reference), rel=1e-2)
    assert of_weights.at(8)[1].split == layer.split
    assert "alone: the weight" in str(of_weights)
    assert "alone: the weight" not in str(report)


def test_what_lies_outside_of_the_grid_is_clipped_and_not_rounded() -> None:
    inputs = torch.randn(64, 8)
    prepared = calibrated(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), inputs)
    report = analyze_sensitivity(prepared, [inputs * 4], bits=(8,))
    node = prepared.get_submodule("input_1_fake_quantize")
    lowest, highest = (float((end - node.zero_point) * node.scale) for end in (0, 255))
    outside = ((inputs * 4 < lowest - node.scale / 2) | (inputs * 4 > highest + node.scale / 2)).double().mean()
    split = report.layers[0].split
    assert split.clipped_share == pytest.approx(float(outside))
    assert split.clipped > 100 * split.rounded
    assert split.cause == "clipped"


@pytest.mark.parametrize(("network", "name"), [("residual", "block.conv1"), ("vit", "head")])
def test_all_but_a_layer_is_the_model_that_skips_it(network: str, name: str) -> None:
    if network == "residual":
        model, inputs = roughened(SmallResNet()), torch.randn(8, 3, 8, 8)
    else:
        model, inputs = roughened(NETWORKS[network].make()), NETWORKS[network].example_inputs(8)[0]
    report = analyze_sensitivity(calibrated(model, inputs), [inputs], bits=(8,))
    with torch.no_grad():
        reference = model.eval()(inputs)
    without = calibrated(model, inputs, QATConfig(activation_observer=MinMaxObserver, skip=(name,)))
    with torch.no_grad():
        expected = error(without(inputs), reference)
    (layer,) = [layer for layer in report.layers if layer.name == name]
    assert layer.all_but.relative_error == pytest.approx(expected, rel=1e-3)


def roughened(model: nn.Module) -> nn.Module:
    roughen_batch_norms(model)
    return model


@pytest.mark.parametrize("bits", [8, 3])
def test_everything_at_a_width_is_the_model_prepared_with_it(bits: int) -> None:
    model, inputs = roughened(SmallResNet()), torch.randn(8, 3, 8, 8)
    report = analyze_sensitivity(calibrated(model, inputs), [inputs], bits=(bits,))
    config = QATConfig(activation_observer=MinMaxObserver, weight_bits=bits)
    with torch.no_grad():
        expected = error(calibrated(model, inputs, config)(inputs), model.eval()(inputs))
    assert report.quantized[bits].relative_error == pytest.approx(expected, rel=1e-6)


def test_learned_scales_of_the_prepared_width_are_the_ones_measured() -> None:
    model, inputs = mlp(), torch.randn(32, 8)
    prepared = prepare(model, QATConfig(weight_bits=4, learnable=True), (inputs,))
    prepared(inputs)
    prepared.eval()
    with torch.no_grad():
        prepared.get_submodule("2").weight_fake_quantize.scale.mul_(3)  # type: ignore[operator,union-attr]
        outputs = prepared(inputs)
        reference = model.eval()(inputs)
    report = analyze_sensitivity(prepared, [inputs], bits=(4, 8))
    assert report.quantized[4].relative_error == pytest.approx(error(outputs, reference), rel=1e-6)
    assert report.quantized[8].snr > report.quantized[4].snr + 6


class Counting(nn.Module):
    """Counts its calls; a layer twice, functions that are layers, a random draw in training."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(self.drop(F.relu(F.linear(x, self.weight))))


def count_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def test_layers_are_those_that_a_configuration_can_select() -> None:
    inputs = torch.randn(16, 8)
    prepared = calibrated(Counting(), inputs)
    report = analyze_sensitivity(prepared, [inputs], bits=(8, 4))
    assert report.names == ("twice", "", "head")  # the root's own code calls the function
    assert [layer.weights for layer in report.at(4)] == [64, 64, 24]
    assert [layer.scales for layer in report.at(4)] == [8, 8, 3]


def test_two_passes_a_layer_and_width_at_the_most() -> None:
    inputs = torch.randn(16, 8)
    prepared = calibrated(Counting(), inputs)
    calls = count_calls(prepared)
    report = analyze_sensitivity(prepared, [inputs[:8], inputs[8:]], bits=(8, 4, 2))
    batches, widths = 2, 3
    assert len(calls) == batches * (2 + widths + 2 * len(report.layers) + 2 * len(report.activations))
    calls.clear()
    report = analyze_sensitivity(prepared, [inputs], bits=(8,), activations=False)
    assert report.activations == ()
    assert len(calls) == 2 + 1 + 2 * len(report.layers)


def test_an_activation_alone_is_all_that_is_quantized() -> None:
    model, inputs = mlp(), torch.randn(32, 8)
    prepared = calibrated(model, inputs)
    report = analyze_sensitivity(prepared, [inputs], bits=(8,))
    assert [(each.name, each.role) for each in report.activations] == [
        ("input_1", "output"),
        ("0", "output"),
        ("2", "output"),
    ]
    node = prepared.get_submodule("2").output_fake_quantize
    assert isinstance(node, FakeQuantizeLayer)
    with torch.no_grad():
        hidden = model[3](model[2](model[1](model[0](inputs))))
        alone = model[4](on_grid(hidden, node.scale, node.zero_point, 0, 255).float())
        assert report.activations[2].alone.relative_error == pytest.approx(error(alone, model(inputs)), rel=1e-2)
        outputs = prepared(inputs)
        assert report.prepared.relative_error == pytest.approx(error(outputs, model(inputs)), rel=1e-6)
        node.fake_quantize_enabled = False
        without = prepared(inputs)
    assert report.activations[2].all_but.relative_error == pytest.approx(error(without, model(inputs)), rel=1e-6)


def test_the_activation_that_spoils_a_network_stands_out() -> None:
    class Uneven(nn.Module):
        """A layer that reads one channel with large values, and small weights for it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            with torch.no_grad():
                self.head.weight[:, 0] /= 500

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x) * torch.tensor([500.0] + [1.0] * 7))

    inputs = torch.randn(64, 8)
    report = analyze_sensitivity(calibrated(Uneven(), inputs), [inputs], bits=(8,))
    worst = min(report.activations, key=lambda activation: activation.alone.snr)
    assert worst.name != "x"
    assert worst.alone.snr < min(layer.alone.snr for layer in report.layers if layer.name != "head") - 6
    assert max(report.activations, key=lambda activation: activation.all_but.snr).name == worst.name


class Stopped(BaseException):
    """As an interruption from the keyboard is, no Exception."""


def frozen(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)},
        "modes": [module.training for module in model.modules()],
        "modules": [id(module) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "switches": [m.fake_quantize_enabled for m in model.modules() if isinstance(m, FakeQuantizeLayer)],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = frozen(model)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    assert torch.equal(before.pop("random"), after["random"])
    assert before == {name: after[name] for name in before}


@pytest.mark.parametrize("failure", [None, RuntimeError, Stopped])
def test_the_model_is_left_as_it_was(failure: type[BaseException] | None) -> None:
    inputs = torch.randn(16, 8)
    prepared = calibrated(Counting(), inputs).train()
    prepared.get_submodule("drop").eval()
    prepared.get_submodule("head").weight_fake_quantize.fake_quantize_enabled = False  # type: ignore[union-attr]
    before, calls = frozen(prepared), []

    def loss(outputs: Tensor, batch: Tensor) -> Tensor:
        torch.rand(3)
        calls.append(1)
        if failure is not None and len(calls) == 6:
            raise failure
        return outputs.square().mean()

    if failure is None:
        analyze_sensitivity(prepared, [inputs], bits=(8, 3), loss=loss)
    else:
        with pytest.raises(failure):
            analyze_sensitivity(prepared, [inputs], bits=(8, 3), loss=loss)
    assert_unchanged(before, prepared)


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    inputs, path = torch.randn(16, 8), tmp_path / "sensitivity.json"
    prepared = calibrated(mlp(), inputs)
    expected = analyze_sensitivity(prepared, [inputs], bits=(8, 4))
    calls = count_calls(prepared)
    handle = prepared.register_forward_pre_hook(lambda module, args: stop_at(calls, 7))
    with pytest.raises(Stopped):
        analyze_sensitivity(prepared, [inputs], bits=(8, 4), checkpoint=path)
    handle.remove()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    done = len(json.loads(path.read_text())["results"])
    assert done == 7 - 1 - 1  # without the reference, and the pass that was interrupted
    calls.clear()
    report = analyze_sensitivity(prepared, [inputs], bits=(8, 4), checkpoint=path)
    assert report == expected
    assert len(calls) == 1 + (1 + 2 + 2 * 6 + 2 * 3) - done


def stop_at(calls: list[int], count: int) -> None:
    if len(calls) == count:
        raise Stopped


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    inputs, path = torch.randn(16, 8), tmp_path / "sensitivity.json"
    prepared = calibrated(mlp(), inputs)
    analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path)
    other = calibrated(mlp(), inputs)
    with pytest.raises(
        ValueError, match=r"sensitivity\.json' is of a Sequential with other state than a Sequential here"
    ):
        analyze_sensitivity(other, [inputs], bits=(8,), checkpoint=path)
    with pytest.raises(ValueError, match="with other batches, inputs than"):
        analyze_sensitivity(prepared, [inputs + 1], bits=(8,), checkpoint=path)
    with pytest.raises(ValueError, match="with other inputs than"):
        analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path, inputs=lambda batch: batch.flip(0))
    with pytest.raises(ValueError, match="with other loss than"):
        analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path, loss=lambda outputs, batch: 0.0)
    data = json.loads(path.read_text())
    data["subject"]["version"] = "0.0.1"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="with other version than"):
        analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a file of this analysis"):
        analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path)


def test_losses_of_one_name_are_told_apart_by_what_they_return(tmp_path: Path) -> None:
    inputs, path = torch.randn(16, 8), tmp_path / "sensitivity.json"
    prepared = calibrated(mlp(), inputs)
    power, size = (lambda outputs, batch: outputs.square().sum()), (lambda outputs, batch: outputs.abs().sum())
    first = analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path, loss=power)
    assert analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path, loss=power) == first
    with pytest.raises(ValueError, match="with other loss than"):
        analyze_sensitivity(prepared, [inputs], bits=(8,), checkpoint=path, loss=size)


def test_arrays_in_batches_count_with_all_their_values() -> None:
    arrays = [torch.zeros(2000).numpy() for _ in range(2)]
    arrays[1][1000] = 1.0
    assert str(arrays[0]) == str(arrays[1])
    assert fingerprint_of_values([arrays[0]]) != fingerprint_of_values([arrays[1]])


def test_a_loss_sees_labels() -> None:
    inputs, labels = torch.randn(32, 8), torch.randint(4, (32,))
    model = mlp()
    batches = [(inputs, labels)]
    report = analyze_sensitivity(
        calibrated(model, inputs),
        batches,
        bits=(8, 2),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        inputs=lambda batch: batch[0],
    )
    with torch.no_grad():
        assert report.reference_loss == pytest.approx(float(F.cross_entropy(model(inputs), labels)), rel=1e-6)
    assert all(layer.alone.loss is not None for layer in report.layers)
    assert "loss" in str(report)


def test_agreement_counts_the_same_argmax() -> None:
    inputs = torch.randn(64, 8)
    model = mlp()
    prepared = calibrated(model, inputs, QATConfig(activation_observer=MinMaxObserver, weight_bits=2))
    report = analyze_sensitivity(prepared, [inputs], bits=(2,))
    with torch.no_grad():
        agrees = prepared(inputs).argmax(1) == model(inputs).argmax(1)
    assert report.quantized[2].agreement == pytest.approx(float(agrees.double().mean()))


def test_several_outputs_count_alike() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"small": self.small(x) * 1e-3, "large": self.large(x) * 1e3, "count": torch.tensor(1)}

    inputs = torch.randn(32, 8)
    small, large = analyze_sensitivity(calibrated(Two(), inputs), [inputs], bits=(4,)).layers
    assert 0.2 < small.alone.relative_error / large.alone.relative_error < 5
    assert small.alone.agreement is None


def test_it_prints_and_becomes_plain_data_and_html() -> None:
    inputs = torch.randn(16, 8)
    report = analyze_sensitivity(calibrated(mlp(), inputs), [inputs], bits=(8, 4))
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["layer", "kind", "bits"]
    assert len(lines) == (1 + 6) + 1 + (1 + 3) + 3
    assert lines[8].split()[:3] == ["activation", "role", "bits"]
    assert lines[-1].startswith("everything at 4 bits: ")
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["bits"] == 4
    assert report._repr_html_().count("<tr>") == 7 + 4


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(16, 8)
    prepared = calibrated(mlp(), inputs)
    analyze_sensitivity(prepared, [inputs], bits=(8,))
    assert capsys.readouterr().out == ""
    analyze_sensitivity(prepared, [inputs], bits=(8,), progress=True)
    assert "14/14" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"mlframework-quantization\[analysis\]"):
        analyze_sensitivity(prepared, [inputs], bits=(8,), progress=True)


@pytest.mark.parametrize("bits", [(), (1,), (9,), (True,), (4.0,)])
def test_widths_are_checked(bits: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="bits must"):
        analyze_sensitivity(calibrated(mlp(), torch.randn(4, 8)), [torch.randn(4, 8)], bits=bits)


def test_bad_arguments_are_refused() -> None:
    inputs = torch.randn(4, 8)
    with pytest.raises(TypeError, match="model must be a prepared model"):
        analyze_sensitivity(mlp(), [inputs])
    with pytest.raises(ValueError, match="model must be calibrated or trained first"):
        analyze_sensitivity(prepare(mlp(), CONFIG, (inputs,)), [inputs])
    prepared = calibrated(mlp(), inputs)
    with pytest.raises(TypeError, match="batches must be an iterable of batches"):
        analyze_sensitivity(prepared, inputs)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        analyze_sensitivity(prepared, [])
    with pytest.raises(TypeError, match="bits must be an iterable"):
        analyze_sensitivity(prepared, [inputs], bits=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss must return one number"):
        analyze_sensitivity(prepared, [inputs], loss=lambda outputs, batch: outputs)


def test_a_model_that_changes_its_arguments_sees_the_same_ones_in_every_pass() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(0.5))

    inputs = torch.randn(16, 8)
    kept = inputs.clone()
    prepared = prepare(InPlace(), CONFIG, (inputs.clone(),))
    calibrate(prepared, [inputs.clone()])
    report: SensitivityReport = analyze_sensitivity(prepared, [inputs], bits=(8,))
    assert torch.equal(inputs, kept)
    assert report.layers[0].alone.snr > 25


@pytest.mark.parametrize("network", ["gpt_tied", "mobilenet_v2", "unet"])
def test_networks_of_the_zoo(network: str) -> None:
    made = NETWORKS[network]
    prepared = prepare(made.make(), CONFIG, made.example_inputs(2))
    calibrate(prepared, [made.example_inputs(4)])
    before = copy.deepcopy(prepared.state_dict())
    report = analyze_sensitivity(prepared, [made.example_inputs(2)], bits=(8,))
    assert all(layer.alone.snr > report.quantized[8].snr - 3 for layer in report.layers)
    for name, value in prepared.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[name]), name
