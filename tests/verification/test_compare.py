"""The prepared model against the converted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_models import EXAMPLES, OTHERS_LONG, Example, train_briefly
from mlframework.quantization import (
    QATConfig,
    VerificationError,
    calibrate,
    compare_outputs,
    convert,
    export_onnx,
    prepare,
    verify,
)
from mlframework.quantization.qat.qat_module_wrapper import QATModuleWrapper


def trained(example: Example, config: QATConfig | None = None) -> nn.Module:
    prepared = prepare(example.make(), config, example.inputs())
    train_briefly(prepared, example.inputs(6))
    return prepared


def tampered(prepared: nn.Module, layer: str) -> nn.Module:
    """The converted model with one layer's first output channel set to zero."""
    converted = convert(prepared)
    state = converted.state_dict()
    state[f"{layer}.weight"][0] = 0
    state[f"{layer}.bias"][0] = 0
    converted.load_state_dict(state)
    return converted


@OTHERS_LONG
@pytest.mark.filterwarnings("ignore:no data reached")
def test_every_quantized_layer_is_compared_and_agrees(example: Example) -> None:
    prepared = trained(example)
    report = verify(prepared, [example.inputs(), example.inputs(3)])
    names = {layer.name for layer in report.layers}
    reached = {entry.name for entry in prepared.preparation_report.quantized}
    wrappers = {name for name, module in prepared.named_modules() if isinstance(module, QATModuleWrapper)}
    assert wrappers & reached <= names
    assert any(name.startswith("output") for name in names)
    assert all(layer.converted.elements > 0 and layer.exported is None for layer in report.layers)


def test_a_fault_is_found_in_its_layer() -> None:
    example = EXAMPLES["resnet"]
    prepared = trained(example)
    inputs = example.inputs(4)
    report = compare_outputs(prepared, [inputs], converted=tampered(prepared, "block.conv2"))
    assert not report.agrees
    assert report.first_difference is not None
    assert report.first_difference.name == "block.conv2"
    before = [layer.name for layer in report.layers if layer.agrees]
    assert before == ["x_fake_quantize", "stem", "block.conv1"]
    with pytest.raises(VerificationError, match=r"the models part at block\.conv2") as caught:
        verify(prepared, [inputs], converted=tampered(prepared, "block.conv2"))
    assert caught.value.report.first_difference == report.first_difference


def test_batches_add_up() -> None:
    example = EXAMPLES["resnet"]
    prepared = trained(example)
    (inputs,) = example.inputs(4)
    batches: list[Any] = [inputs, (inputs,), [inputs], {"x": inputs}]
    once, four = compare_outputs(prepared, [inputs]), compare_outputs(prepared, batches)
    for one, all_of_them in zip(once.layers, four.layers, strict=True):
        assert all_of_them.converted.elements == 4 * one.converted.elements


def test_models_are_left_as_they_were() -> None:
    example = EXAMPLES["resnet"]
    prepared = trained(example).train()
    converted = convert(prepared)
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    compare_outputs(prepared, [example.inputs()], converted=converted)
    assert prepared.training
    assert not converted.training
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())
    wrapper = prepared.stem
    assert not wrapper._forward_hooks
    assert not converted.stem._forward_hooks


def test_a_wrapper_alone_and_a_layer_called_twice() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            while x.abs().sum() < 100:  # cannot be traced
                x = self.layer(x) * 3 + 1
            return x

    inputs = torch.rand(3, 4)
    prepared = prepare(Loops(), QATConfig(quantize_last_linear=True), (inputs,))
    calibrate(prepared, [inputs])
    report = verify(prepared, [inputs])
    assert report.layers[0].name == "layer"
    assert report.layers[0].converted.elements > inputs.numel()  # several calls
    alone = prepare(nn.Linear(4, 2), None, (inputs,))
    calibrate(alone, [inputs])
    assert [layer.kind for layer in verify(alone, [inputs]).layers] == ["Int8WithFloatEdges", "result"]


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        compare_outputs(trained(EXAMPLES["mlp"]), [])


def test_a_float_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be prepared"):
        compare_outputs(nn.Linear(4, 2), [torch.randn(1, 4)])


def test_a_batch_with_labels_is_refused() -> None:
    with pytest.raises(TypeError, match="drop the labels"):
        compare_outputs(trained(EXAMPLES["mlp"]), [(*EXAMPLES["mlp"].inputs(), torch.zeros(2))])


def test_another_network_is_refused() -> None:
    prepared = trained(EXAMPLES["mlp"])
    with pytest.raises(ValueError, match="converted must be the converted form of model"):
        compare_outputs(prepared, [EXAMPLES["mlp"].inputs()], converted=nn.Identity())
    wide, narrow = (prepare(nn.Sequential(nn.Linear(4, n), nn.Linear(n, 2)), None, (torch.rand(1, 4),)) for n in (6, 5))
    for model in (wide, narrow):
        calibrate(model, [torch.rand(8, 4)])
    with pytest.raises(ValueError, match="got other shapes at 0"):
        compare_outputs(wide, [torch.rand(8, 4)], converted=convert(narrow))


def test_one_batch_is_no_iterable_of_batches() -> None:
    prepared = trained(EXAMPLES["mlp"])
    (inputs,) = EXAMPLES["mlp"].inputs()
    for run in (compare_outputs, calibrate):
        with pytest.raises(TypeError, match="batches must be an iterable of batches"):
            run(prepared, inputs)


def test_what_changes_a_layers_output_in_place_does_not_change_what_was_recorded() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x.cumsum_(1)
            return self.last(x)

    inputs = torch.randn(2, 3, 6, 6)
    prepared = prepare(Changes(), None, (inputs,))
    calibrate(prepared, [inputs])
    verify(prepared, [inputs])


def test_a_linear_layer_of_sequences_that_gives_floats_compares_with_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    prepared = prepare(model, None, (torch.randn(2, 5, 6),))
    calibrate(prepared, [torch.randn(8, 5, 6)])
    export_onnx(convert(prepared.eval()), (torch.randn(2, 5, 6),), tmp_path / "model.onnx")
    report = compare_outputs(prepared, [(torch.randn(3, 5, 6),)], path=tmp_path / "model.onnx")
    (layer,) = (layer for layer in report.layers if layer.name == "0")
    assert layer.compared == "floats"
    assert layer.exported is not None
    assert (layer.exported.elements, layer.exported.differing) == (3 * 5 * 8, 0)
