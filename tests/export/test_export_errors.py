"""Bad input: each a clear error, and nothing written."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.exported_file import prepared_model
from mlframework.quantization import QATConfig, convert, prepare
from mlframework.quantization.export import file as file_module
from mlframework.quantization.export.export_onnx import export_onnx
from mlframework.quantization.export.program import NotExportableError

EXAMPLE = (torch.randn(2, 6),)


def model(target: str = "onnxruntime") -> nn.Module:
    return prepared_model(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (6,), target)


@pytest.fixture(autouse=True)
def _writes_nothing(tmp_path: Path) -> Any:
    yield
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("unprepared", [nn.Linear(6, 2), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())])
def test_an_unprepared_model(unprepared: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be prepared or converted, got a "):
        export_onnx(unprepared, EXAMPLE, tmp_path / "model.onnx")


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        export_onnx("model", EXAMPLE, tmp_path / "model.onnx")  # type: ignore[arg-type]


def test_an_uncalibrated_model(tmp_path: Path) -> None:
    prepared = prepare(nn.Linear(6, 2), QATConfig(), EXAMPLE)
    with pytest.raises(RuntimeError, match="model has seen no data"):
        export_onnx(prepared, EXAMPLE, tmp_path / "model.onnx")


def test_an_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target must be one of onnxruntime, tensorrt, openvino, got 'tflite'"):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx", "tflite")
    with pytest.raises(TypeError, match="target must be a str or None, got 3"):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx", 3)  # type: ignore[arg-type]


def test_executorch_reads_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'executorch', which reads \.pte files"):
        export_onnx(model("executorch"), EXAMPLE, tmp_path / "model.onnx", "executorch")


@pytest.mark.parametrize(("prepared_for", "target"), [("tensorrt", "onnxruntime"), ("onnxruntime", "openvino")])
def test_a_target_with_other_grids(prepared_for: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"target must be the one .* {target!r} has .* but 0 has activations in u?int8"
    ):
        export_onnx(model(prepared_for), EXAMPLE, tmp_path / "model.onnx", target)


@pytest.mark.parametrize("example", [torch.randn(2, 6), [torch.randn(2, 6)]], ids=["tensor", "list"])
def test_examples_that_are_no_tuple(example: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="example_inputs must be a tuple of arguments, got "):
        export_onnx(model(), example, tmp_path / "model.onnx")


@pytest.mark.parametrize("example", [(), (torch.randn(2, 6), torch.randn(2, 6))], ids=["none", "two"])
def test_examples_of_another_arity(example: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="example_inputs and example_kwargs must fit the model's forward"):
        export_onnx(model(), example, tmp_path / "model.onnx")


def test_unknown_keyword(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must fit the model's forward.*'mask'"):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx", example_kwargs={"mask": None})
    with pytest.raises(TypeError, match="example_kwargs must be a mapping from names to arguments, got tuple"):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx", example_kwargs=())  # type: ignore[arg-type]


def test_an_example_of_another_shape_names_the_layer(tmp_path: Path) -> None:
    expected = r"example_inputs must run through the model, got \[\(2, 5\)\], which fails in 0: "
    with pytest.raises(ValueError, match=expected):
        export_onnx(model(), (torch.randn(2, 5),), tmp_path / "model.onnx")


def test_an_example_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"example_inputs must run through the model, got \['x'\], which fails in "):
        export_onnx(model(), ("x",), tmp_path / "model.onnx")


def test_dynamic_batch_is_a_bool(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dynamic_batch must be a bool, got 'yes'"):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx", dynamic_batch="yes")  # type: ignore[arg-type]


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strange = Spectrum()
        self.strange.register_forward_hook(lambda module, args, output: None)  # which keeps it whole

    def forward(self, x: Tensor) -> Tensor:
        return self.strange(x)


@pytest.mark.slow
def test_an_operator_without_counterpart_is_named_with_its_layer(tmp_path: Path) -> None:
    prepared = prepared_model(nn.Sequential(nn.Linear(6, 4), Inner(), nn.Linear(4, 2)), (6,))
    with pytest.raises(NotExportableError, match=r"1\.strange calls prims\.bessel_i0.*, which has no ONNX counterpart"):
        export_onnx(prepared, EXAMPLE, tmp_path / "model.onnx")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        return self.layer(x)


def test_code_that_branches_on_values_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepared = prepared_model(nn.Sequential(nn.Linear(6, 6), Branches()), (6,))
    capfd.readouterr()
    with pytest.raises(NotExportableError, match=r"torch\.export failed in 1: .*data-dep"):
        export_onnx(prepared, EXAMPLE, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path must be in a folder that exists, got "):
        export_onnx(model(), EXAMPLE, tmp_path / "missing" / "model.onnx")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="path must be that of a file, got the folder "):
        export_onnx(model(), EXAMPLE, tmp_path)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match="path must be in a folder that may be written to, got "):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx")


def test_no_path() -> None:
    with pytest.raises(TypeError, match="path must be a str or a path, got int"):
        export_onnx(model(), EXAMPLE, 3)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "_LARGEST", 100)
    with pytest.raises(ValueError, match=r"model must fit one ONNX file of 2 GiB, got [0-9]+ bytes"):
        export_onnx(model(), EXAMPLE, tmp_path / "model.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == missing:
            raise ImportError(f"No module named {missing!r}")
        return original(name, *args, **kwargs)

    converted = convert(model())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"export_onnx needs onnx and onnxscript .*mlframework-quantization\[onnx\]"):
        export_onnx(converted, EXAMPLE, tmp_path / "model.onnx")
