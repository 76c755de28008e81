"""The converted model against an exported file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from example_models import EXAMPLES
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

pytestmark = [
    pytest.mark.slow,  # exports many files
    pytest.mark.filterwarnings("ignore:ONNX Runtime's plain session differs:UserWarning"),  # where it saturates
]


class Scaled(nn.Module):
    """Takes two tensors, one of them by name, and returns two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, image: Tensor, weight: Tensor) -> dict[str, Tensor]:
        features = self.stem(image)
        return {"scores": self.head(features.mean((2, 3))) * weight, "features": features}


@pytest.fixture(scope="module")
def prepared() -> nn.Module:
    torch.manual_seed(0)
    model = prepare(Scaled(), QATConfig(), batch(2))
    calibrate(model, [batch(8)])
    return model.eval()


@pytest.fixture(scope="module")
def path(prepared: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(prepared, batch(2), file)
    return file


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 6, 6), torch.rand(size, 2)


def test_the_file_agrees(prepared: nn.Module, path: Path) -> None:
    image, weight = batch(5)
    report = verify(prepared, [batch(3), {"weight": weight, "image": image}], path=path)
    compared = {layer.name: layer.exported.elements for layer in report.layers if layer.exported is not None}
    assert compared["stem.0"] == 8 * 4 * 36
    assert compared["output 0"] == 8 * 2
    assert compared["output 1"] == 8 * 4 * 36


def test_another_file_is_found_out(prepared: nn.Module, path: Path, tmp_path: Path) -> None:
    model = onnx.load(str(path))
    (weight,) = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [4, 3, 3, 3]]
    values = numpy_helper.to_array(weight).copy()
    values[0] = -values[0]
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.int8), weight.name))
    onnx.save(model, str(tmp_path / "tampered.onnx"))
    report = compare_outputs(prepared, [batch(4)], path=str(tmp_path / "tampered.onnx"))
    assert report.first_difference is not None
    assert report.first_difference.name == "stem.0"
    assert report.first_difference.exported is not None
    assert report.first_difference.exported.largest > 1
    assert all(layer.converted.differing == 0 for layer in report.layers)
    with pytest.raises(VerificationError, match="ONNX Runtime"):
        verify(prepared, [batch(4)], path=tmp_path / "tampered.onnx")


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_files_for_other_engines_run_too(target: str, tmp_path: Path) -> None:
    """Their int8 activations are not what ONNX Runtime runs best, but it takes them when it is told to."""
    example = EXAMPLES["cnn"]
    model = prepare(example.make(), QATConfig.for_target(target), example.inputs())
    calibrate(model, [example.inputs(8)])
    export_onnx(model, example.inputs(), tmp_path / "model.onnx", target)
    report = compare_outputs(model, [example.inputs(8)], path=tmp_path / "model.onnx")
    for layer in report.layers:
        if layer.exported is not None and layer.compared == "codes":
            assert layer.exported.largest <= 1
            assert layer.exported.differing <= 0.01 * layer.exported.elements


def test_codes_that_a_file_holds_as_unsigned_ones(tmp_path: Path) -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x), self.right(x)], 1))

    inputs = torch.randn(4, 3, 6, 6)
    model = prepare(Joins(), QATConfig.for_target("openvino"), (inputs,))
    calibrate(model, [inputs])
    export_onnx(model, (inputs,), tmp_path / "model.onnx")
    report = compare_outputs(model, [inputs], path=tmp_path / "model.onnx")
    assert (
        max(
            layer.exported.largest
            for layer in report.layers
            if layer.exported is not None and layer.compared == "codes"
        )
        <= 1
    )


def test_floats_after_the_last_layer_may_differ_by_a_tolerance(tmp_path: Path) -> None:
    inputs = torch.randn(64, 3, 6, 6)
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Softmax(1)), None, (inputs,))
    calibrate(model, [inputs])
    export_onnx(model, (inputs,), tmp_path / "model.onnx")
    verify(model, [inputs], path=tmp_path / "model.onnx", float_tolerance=1e-6)


def test_a_file_of_another_network_is_refused(path: Path, tmp_path: Path) -> None:
    example = EXAMPLES["mlp"]
    model = prepare(example.make(), None, example.inputs())
    calibrate(model, [example.inputs(4)])
    with pytest.raises(ValueError, match=r"path must be of the same network as model: it takes 2 tensors"):
        compare_outputs(model, [example.inputs()], path=path)


def test_a_file_that_is_not_there(prepared: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compare_outputs(prepared, [batch(2)], path=tmp_path / "missing.onnx")


def test_without_onnx_runtime(prepared: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'mlframework-quantization\[onnx\]'"):
        compare_outputs(prepared, [batch(2)], converted=convert(prepared), path=path)
