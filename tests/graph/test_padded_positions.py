"""Encoders with a padding mask: one result in training, in evaluation and in a file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, calibrate, compare_outputs, convert, export_onnx, prepare
from mlframework.quantization.graph.padded_positions import compute_padded_positions


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding))


class Transformer(nn.Module):
    """The encoder is a part of PyTorch's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        embedded = self.embed(x)
        return self.head(self.transformer(embedded, embedded, src_key_padding_mask=padding))


class Layer(Encoder):
    """One layer, which has no nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.encoder.layers[0]


def inputs() -> tuple[Tensor, Tensor]:
    """(3, 5, 8), of which the first has three true positions and the second four."""
    padding = torch.arange(5) >= torch.tensor([[3], [4], [5]])
    return torch.randn(3, 5, 8), padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_positions_are_those_of_training() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    changed = copy.deepcopy(model)
    compute_padded_positions(changed)
    x, padding = inputs()
    trained = model.train()(x, padding)
    with torch.no_grad():
        evaluated, nested = changed(x, padding), model.eval()(x, padding)
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-6)  # fused layers round otherwise
    torch.testing.assert_close(evaluated[~padding], nested[~padding], rtol=0, atol=1e-6)
    assert (evaluated - nested)[padding].abs().min() > 1e-3  # what the change is for


@pytest.mark.slow
# An encoder is also in Transformer.
@pytest.mark.parametrize("kind", [pytest.param(Encoder, marks=pytest.mark.long), Transformer, Layer])
def test_prepared_converted_and_exported_agree(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    compute_padded_positions(model)
    prepared = prepare(model, QATConfig(), inputs())
    calibrate(prepared, [inputs() for _ in range(3)])
    export_onnx(prepared, inputs(), tmp_path / "model.onnx")
    report = compare_outputs(prepared, [inputs()], path=tmp_path / "model.onnx")
    assert report.layers[-1].converted.differing == 0
    # Sums of floats may part in their last bits before they are quantized; zeros at padded positions are far off.
    assert all(layer.exported.largest <= 1 for layer in report.layers if layer.exported is not None)
    assert report.layers[-1].exported is not None
    assert report.layers[-1].exported.largest < 0.05


@pytest.mark.filterwarnings("ignore:only .* of the weights")
def test_a_layer_by_itself_does_not_go_past_its_layers() -> None:
    """It runs by its own code, which in evaluation computes with the float weights of layers that let it."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    prepared = prepare(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), QATConfig(), (x,))
    calibrate(prepared, [x])
    converted = convert(prepared)
    assert torch.equal(converted(x), prepared(x))
    with torch.no_grad():
        assert torch.equal(converted(x), prepared(x))
