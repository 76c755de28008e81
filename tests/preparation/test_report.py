"""The account of a preparation names every layer, what became of it, and why."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn

from example_architectures import SmallResNet
from example_models import EXAMPLES, Example
from mlframework.quantization import PreparationReport, QATConfig, preparation_report, prepare
from mlframework.quantization.preparation.report import ReportEntry
from mlframework.quantization.qat.layer_types import layer_type_of


def report_on(example: Example, config: QATConfig | None = None) -> PreparationReport:
    return preparation_report(prepare(example.make(), config, example.inputs()))


def reasons(report: PreparationReport) -> dict[str, str]:
    return {entry.name: entry.detail for entry in report.left_float}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_every_layer_has_an_entry(example: Example) -> None:
    layers = {name for name, module in example.make().named_modules() if layer_type_of(module) is not None}
    report = report_on(example)
    assert layers <= {entry.name for entry in report.entries}
    assert len(report.quantized) + len(report.left_float) == len(report.entries)
    assert all(entry.detail for entry in report.entries)


def test_entries_tell_grids() -> None:
    report = report_on(EXAMPLES["resnet"])
    entries = {entry.name: entry for entry in report.entries}
    assert list(entries) == ["x", "stem", "block.conv1", "block.conv2", "block.add", "average", "head"]
    assert not report.left_float
    assert entries["x"] == ReportEntry("x", "input", True, "uint8 [0, 255] affine, per tensor")
    assert entries["stem"].kind == "Conv2d"
    assert entries["stem"].detail == (
        "weight int8 [-127, 127] symmetric, per channel 0, output uint8 [0, 255] symmetric, per tensor"
    )
    assert entries["block.add"].kind == "sum"
    assert entries["average"].kind == "average pool"
    assert entries["average"].detail == "output uint8 [0, 255] symmetric, per tensor"
    assert entries["head"].detail.endswith("output float")


@pytest.mark.parametrize(
    ("name", "config", "layer", "reason"),
    [
        ("resnet", QATConfig(skip=("head",)), "head", "skipped by the configuration"),
        ("resnet", QATConfig(skip=(nn.Conv2d,)), "block.conv1", "skipped by the configuration"),
        ("unused", None, "spare", "the forward never reaches it"),
        ("attention", None, "attention.out_proj", "its weight is read without a call"),
        ("unet", None, "up", "it is called with more than its input"),
        ("transformer", None, "softmax", "no integer form"),
    ],
)
def test_what_stays_float_has_a_reason(name: str, config: QATConfig | None, layer: str, reason: str) -> None:
    assert reasons(report_on(EXAMPLES[name], config))[layer].startswith(reason)  # and on which grid its output is


@pytest.mark.parametrize(("name", "layer"), [("branches inside", "inner.layer"), ("branches at root", "conv")])
def test_layers_that_stand_alone_tell_why(name: str, layer: str) -> None:
    (entry,) = [entry for entry in report_on(EXAMPLES[name]).quantized if entry.name == layer]
    assert "alone, between floats" in entry.detail
    assert "does not trace" in entry.detail


def test_a_layer_that_cannot_be_quantized_tells_its_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 1))
    for config in (QATConfig(), QATConfig(per_channel_weights=False)):
        report = preparation_report(prepare(model, config, (torch.randn(2, 3, 4, 4),)))
        assert "transposed convolution with groups has no integer form" in reasons(report)["1"]
        assert "1" not in [entry.name for entry in report.quantized]


def test_a_parametrized_layer_is_quantized() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    report = preparation_report(prepare(model, None, (torch.randn(2, 3),)))
    assert [entry.kind for entry in report.quantized if entry.name == "1"] == ["Linear"]


def test_a_skipped_layer_before_a_quantized_one_is_float_with_its_output_on_a_grid() -> None:
    report = report_on(EXAMPLES["resnet"], QATConfig(skip=("block.conv1",)))
    assert reasons(report)["block.conv1"] == "skipped by the configuration"
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    report = preparation_report(prepare(model, QATConfig(skip=("0",)), (torch.randn(2, 3),)))
    assert reasons(report)["0"] == "skipped by the configuration, read as uint8 [0, 255] affine, per tensor"


def test_it_prints_as_a_table() -> None:
    text = str(report_on(EXAMPLES["unused"]))
    first, *rows, last, shares = text.splitlines()
    assert first.split() == ["name", "kind", "how,", "or", "why", "not"]
    assert len({row.index("  float") if " float " in row else row.index("  int8") for row in rows}) == 1
    assert last == "3 quantized, 1 float"
    # The layer that is never reached holds 30 of 72 weights, and multiplies nothing.
    assert shares == "58.3% of the weights and 100.0% of the multiply-adds are quantized"


def test_the_shares_say_that_they_do_not_count_what_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    report = preparation_report(prepare(model, QATConfig(skip=("0",)), (torch.randn(2, 3),)))
    assert str(report).endswith(
        "100.0% of the weights and 100.0% of the multiply-adds are quantized, not counting what the configuration skips"
    )


def test_only_a_prepared_model_has_one() -> None:
    with pytest.raises(TypeError, match="model must be a prepared model, got SmallResNet"):
        preparation_report(SmallResNet())


@pytest.mark.filterwarnings("ignore:only .* of the multiply-adds are quantized")
@pytest.mark.parametrize("branches", [False, True])
def test_a_replaced_forward_is_named(branches: bool) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    own = model[0][0].forward
    model[0][0].forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    if branches:
        model[0].forward = MethodType(lambda self, x: self[0](x), model[0])  # type: ignore[method-assign]
    report = preparation_report(prepare(model, None, (torch.randn(2, 4),)))
    (entry,) = [entry for entry in report.entries if entry.name == "0.0"]
    assert (entry.kind, entry.quantized) == ("Linear", False)
    assert entry.detail.startswith("its forward was replaced on the instance")
