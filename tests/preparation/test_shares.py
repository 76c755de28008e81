"""How much of a model is quantized is counted, reported, and warned of where it is little."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_layers import SameConv2d
from mlframework.quantization import PreparationReport, QATConfig, preparation_report, prepare
from mlframework.quantization.preparation.report import Share
from placement_probes import Runs


def report_on(model: nn.Module, inputs: Tensor, config: QATConfig | None = None) -> PreparationReport:
    return preparation_report(prepare(model, config, (inputs,)))


def test_layers_are_counted_from_their_shapes() -> None:
    model = nn.Sequential(
        SameConv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 5)
    )
    report = report_on(model, torch.randn(2, 3, 8, 8))
    work = {entry.name: entry.multiply_adds for entry in report.quantized}
    assert work == {"input_1": 0, "0": 2 * 8 * 16 * 27, "2": 2 * 8 * 4 * 18, "4": 2 * 5 * 32}
    assert report.multiply_adds == Share(sum(work.values()), sum(work.values()))
    weights = 8 * 27 + 8 * 18 + 32 * 5
    assert report.weights == Share(weights, weights)


def test_a_transposed_convolution_and_a_function_in_the_model_itself() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.conv2d(x, model.conv.weight), model.up.weight, stride=2)

    model = Runs(run, conv=nn.Conv2d(3, 4, 1), up=nn.ConvTranspose2d(4, 6, 2))
    report = report_on(model, torch.randn(2, 3, 5, 5))
    work = [2 * 25 * 12, 2 * 25 * 4 * 6 * 4]
    assert [entry.multiply_adds for entry in report.quantized] == [0, *work]
    assert report.multiply_adds == Share(sum(work), sum(work))
    assert report.weights == Share(12 + 96, 12 + 96)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


def test_products_of_activations_count_as_float() -> None:
    with pytest.warns(UserWarning, match=r"only 100.0% of the weights and 40.0% .*; float: 1.matmul \(matmul\)"):
        report = report_on(nn.Sequential(nn.Linear(4, 4), Scores(), nn.Linear(4, 4)), torch.randn(2, 6, 4))
    layers, products = 2 * 2 * 6 * 16, 2 * 2 * 6 * 6 * 4
    assert report.multiply_adds == Share(layers, layers + products)
    assert report.weights == Share(32, 32)


class Branches(nn.Module):
    """Cannot be traced; multiplies beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 1e9 else self.layer(x) @ torch.ones(4, 4)


def test_a_layer_whose_weight_is_read_without_a_call_is_float() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            return self.proj(F.linear(x, self.qkv.weight))

    report = report_on(nn.Sequential(Reads(), nn.Linear(4, 4)), torch.randn(3, 4))
    (entry,) = [entry for entry in report.left_float if entry.name == "0.qkv"]
    assert entry.detail == "its weight is read without a call"
    assert report.multiply_adds == Share(2 * 48, 3 * 48)
    assert report.weights == Share(32, 48)


@pytest.mark.parametrize("depth", [0, 1])
def test_what_modules_multiply_that_run_their_own_code(depth: int) -> None:
    model: nn.Module = Branches()
    for _ in range(depth):
        model = nn.Sequential(model, nn.Linear(4, 4))
    report = report_on(model, torch.randn(3, 4))
    entries = {entry.name: entry for entry in report.entries}
    name = "0" if depth else ""
    assert not entries[name].quantized
    assert "does not trace" in entries[name].detail
    assert entries[name].multiply_adds == 3 * 16
    assert entries["0.layer" if depth else "layer"].multiply_adds == 3 * 16
    assert report.multiply_adds == Share(3 * 16 * (1 + depth), 3 * 16 * (2 + depth))


def test_attention_by_its_own_code_counts() -> None:
    """Evaluation may compute it by one fused operator."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match="reads the weights of its layers without calling them"):
        report = report_on(nn.Sequential(encoder, nn.Linear(8, 8)), torch.randn(2, 5, 8))
    tokens = 2 * 5
    assert report.multiply_adds == Share(tokens * 64, tokens * (64 * 4 + 2 * 5 * 8 + 2 * 128 + 64))
    assert report.weights == Share(64, 64 * 4 + 2 * 128 + 64)


def test_the_warning_tells_shares_and_causes_once() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.linear(x, model.large.weight * x.mean())
        return model.small(x)

    with pytest.warns(UserWarning, match="float") as caught:
        prepare(Runs(run, large=nn.Linear(4, 4), small=nn.Linear(4, 4)), None, (torch.randn(2, 4),))
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("only 50.0% of the weights and 25.0% of the multiply-adds are quantized; float: ")
    assert "linear and 2 more (linear): its weight depends on the input, or is random" in text
    assert warning.filename == __file__


@pytest.mark.parametrize("skip", [("1",), (nn.Linear,), ("0", "1"), ("*",)])
def test_what_the_configuration_skips_is_not_warned_of(skip: tuple[str | type[nn.Module], ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 64))
    model = nn.Sequential(model[0], nn.Sequential(model[1]), model[2]) if skip == ("*",) else model
    names = {"1": "2"}
    skip = tuple(names.get(each, each) if isinstance(each, str) else each for each in skip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = report_on(model, torch.randn(2, 3, 8, 8), QATConfig(skip=skip))
    assert report.weights.fraction == report.multiply_adds.fraction == 1


def test_a_function_that_is_skipped_is_not_counted() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model.conv(F.conv2d(x, model.kernels))

    model = Runs(run, conv=nn.Conv2d(4, 4, 1))
    model.kernels = nn.Parameter(torch.randn(4, 3, 3, 3))
    report = report_on(model, torch.randn(2, 3, 8, 8), QATConfig(skip=("",)))
    assert report.weights == Share(16, 16)
    assert report.multiply_adds == Share(2 * 36 * 16, 2 * 36 * 16)


def test_names_are_the_models() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x)) + self.layer(self.norm(2 * x))

    report = report_on(nn.Sequential(nn.Sequential(Block()), nn.Linear(4, 4)), torch.randn(2, 4))
    names = [entry.name for entry in report.entries]
    assert names.count("0.0.norm") == 1
    assert not any("_0_norm" in name for name in names)


def test_all_of_nothing_is_all() -> None:
    assert Share(0, 0).fraction == 1
    assert str(Share(1, 3)) == "33.3%"
