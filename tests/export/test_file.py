"""The file: its names, its metadata, its size, and how it gets to where it is."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export.exported_file import ExportedFile, inputs_of, prepared_model
from export.small_networks import INTEGER_NETWORKS, SHAPE, make
from mlframework.quantization import QATConfig, calibrate, convert, prepare
from mlframework.quantization.export import file as file_module
from mlframework.quantization.export.export_onnx import export_onnx

pytestmark = pytest.mark.slow  # exports many files


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return prepared_model(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (6,))


def test_metadata(tmp_path: Path) -> None:
    file = ExportedFile(small_model(), (torch.randn(2, 6),), tmp_path)
    metadata = {entry.key: entry.value for entry in file.model.metadata_props}
    assert metadata["mlframework.quantization.version"] == version("mlframework-quantization")
    assert metadata["mlframework.quantization.target"] == "onnxruntime"
    assert json.loads(metadata["mlframework.quantization.schemes"]) == {
        "activations": ["uint8 [0, 255] affine, per tensor", "uint8 [0, 255] symmetric, per tensor"],
        "weights": ["int8 symmetric, per channel"],
    }
    assert file.model.producer_name == "mlframework-quantization"
    assert not any(node.metadata_props or node.doc_string for node in file.graph.node)
    assert not file.graph.value_info


def test_values_are_called_after_layers(tmp_path: Path) -> None:
    file = ExportedFile(small_model(), (torch.randn(2, 6),), tmp_path)
    assert [value.name for value in file.graph.input] == ["input"]
    assert [value.name for value in file.graph.output] == ["output"]
    made = [output for node in file.graph.node for output in node.output]
    assert {"input_1_fake_quantize", "0"} <= set(made)
    assert file.maker("0").op_type == "QuantizeLinear"


@pytest.mark.parametrize("example", [1, 2, 3])
def test_the_batch_is_of_any_size(example: int, tmp_path: Path) -> None:
    file = ExportedFile(small_model(), (torch.randn(example, 6),), tmp_path)
    dimensions = file.graph.input[0].type.tensor_type.shape.dim
    assert [dimension.dim_param or dimension.dim_value for dimension in dimensions] == ["batch", 6]
    for batch in (1, 2, 7):
        assert file.differences(torch.randn(batch, 6))[0] == {}


def test_a_fixed_batch(tmp_path: Path) -> None:
    file = ExportedFile(small_model(), (torch.randn(1, 6),), tmp_path, dynamic_batch=False)
    dimensions = file.graph.input[0].type.tensor_type.shape.dim
    assert [dimension.dim_value for dimension in dimensions] == [1, 6]
    assert file.differences(torch.randn(1, 6))[0] == {}


@pytest.mark.slow
def test_a_prepared_model_is_converted_first(tmp_path: Path) -> None:
    prepared = small_model()
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    example = (torch.randn(2, 6),)
    export_onnx(prepared, example, tmp_path / "prepared.onnx")
    export_onnx(convert(prepared), example, tmp_path / "converted.onnx")
    assert (tmp_path / "prepared.onnx").read_bytes() == (tmp_path / "converted.onnx").read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())


def test_a_converted_model_is_not_changed(tmp_path: Path) -> None:
    converted = convert(small_model())
    x = torch.randn(5, 6)
    expected, text = converted(x), str(converted)
    export_onnx(converted, (x,), tmp_path / "model.onnx")
    assert torch.equal(converted(x), expected)
    assert str(converted) == text


@pytest.mark.slow
def test_other_dtypes_of_the_model(tmp_path: Path) -> None:
    file = ExportedFile(small_model(), (torch.randn(2, 6),), tmp_path)
    converted = convert(small_model()).to(torch.bfloat16)
    export_onnx(converted, (torch.randn(2, 6, dtype=torch.bfloat16),), tmp_path / "bfloat16.onnx")
    model = onnx.load(tmp_path / "bfloat16.onnx")
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert file.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


class ManyArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.first(x) * scale
        if mask is not None:
            y = y * mask
        return {"hidden": y, "logits": (self.second(y), x)}


def test_keyword_arguments_and_dictionaries(tmp_path: Path) -> None:
    x, mask = torch.randn(3, 4), torch.ones(3, 4)
    prepared = prepare(ManyArguments().eval(), QATConfig(), (x, 2.0), {"mask": mask})
    calibrate(prepared, [{"x": torch.randn(8, 4), "scale": 2.0, "mask": torch.ones(8, 4)}])
    file = ExportedFile(prepared, (x, 2.0), tmp_path, example_kwargs={"mask": mask})
    assert [value.name for value in file.graph.input] == ["x", "mask"]
    assert [value.name for value in file.graph.output] == ["hidden", "logits_0", "logits_1"]
    x, mask = torch.randn(9, 4), torch.rand(9, 4)
    results = file.results(x, mask)
    with torch.no_grad():
        expected = file.converted(x, 2.0, mask=mask)
    assert np.array_equal(results[2], expected["logits"][1].numpy())
    assert np.allclose(results[0], expected["hidden"].numpy(), atol=1e-6)


@pytest.mark.slow
def test_the_file_is_a_quarter_of_the_float_model(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(6)])
    floats = sum(parameter.numel() for parameter in model.parameters()) * 4
    ExportedFile.of(model, (64, 4, 4), tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size < 0.27 * floats


def test_a_failure_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(file_module.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        export_onnx(small_model(), (torch.randn(2, 6),), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_an_old_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    export_onnx(small_model(), (torch.randn(2, 6),), link)
    onnx.checker.check_model(onnx.load(path))
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link.onnx", "model.onnx"]


def test_a_path_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_onnx(small_model(), (torch.randn(2, 6),), "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.slow
def test_codes_of_a_layer_called_twice(tmp_path: Path) -> None:
    file = ExportedFile.of(make(INTEGER_NETWORKS["residual"]), SHAPE, tmp_path)
    codes = file.codes(inputs_of(SHAPE, 2))
    assert {"left", "right", "add", "add_1", "last"} <= set(codes)


class AnyNumber(nn.Module):
    """Of arguments: not traced, so its layers are quantized one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *parts: Tensor) -> Tensor:
        return self.layer(torch.stack(parts).sum(0))


def test_any_number_of_arguments(tmp_path: Path) -> None:
    example = torch.randn(2, 4), torch.randn(2, 4)
    prepared = prepare(AnyNumber().eval(), QATConfig(), example)
    calibrate(prepared, [(torch.randn(8, 4), torch.randn(8, 4))])
    file = ExportedFile(prepared, example, tmp_path)
    assert [value.name for value in file.graph.input] == ["parts_0", "parts_1"]
    assert file.differences(torch.randn(5, 4), torch.randn(5, 4))[0] == {}


class SeveralMeans(nn.Module):
    """One of them is averaged in float, by a node that torch.onnx calls ``mean``, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.gate(x.mean((2, 3), keepdim=True))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        return self.head(torch.softmax(x.mean((2, 3)), -1)), x.exp().mean((2, 3))


def test_layers_with_numbered_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = ExportedFile.of(SeveralMeans(), (3, 8, 8), tmp_path)
    x = inputs_of((3, 8, 8), 3)
    codes = file.codes(x)
    assert {"mean", "mean_1", "add"} <= set(codes)
    assert file.differences(x, float_tolerance=1e-5)[0] == {}
