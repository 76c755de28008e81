"""The command: what it says of files is so, and what is wrong is said in words, with 1 as its status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from mlframework.quantization import QATConfig, calibrate, export_encodings, export_onnx, prepare
from mlframework.quantization.command_line import demo
from mlframework.quantization.command_line.app import app
from mlframework.quantization.command_line.comparison import compared
from mlframework.quantization.command_line.entry import main
from mlframework.quantization.command_line.inspection import Inspection, inspected

pytestmark = pytest.mark.slow


class Classifier(nn.Module):
    """With a layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.left_float = nn.Linear(4, 6)
        self.last = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.stem(images))
        hidden = self.grouped(hidden)
        hidden = self.up(hidden + hidden)
        return self.last(self.left_float(hidden.mean((2, 3))))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network for two engines, and its float form with encodings."""
    folder, example = tmp_path_factory.mktemp("files"), (torch.randn(2, 3, 8, 8),)
    paths = {name: folder / f"{name}.onnx" for name in ("onnxruntime", "openvino", "float")}
    for target in ("onnxruntime", "openvino"):
        config = QATConfig(target=target, skip=("left_float",), weight_bits=4, quantize_last_linear=True)
        prepared = prepare(Classifier().eval(), config, example)
        calibrate(prepared, [torch.randn(8, 3, 8, 8)])
        export_onnx(prepared, example, paths[target])
    export_encodings(prepared, example, paths["float"])
    return paths


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: Any) -> str:
    """What is said of bad input, in one line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("error: ")
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def inspection(files: dict[str, Path]) -> Inspection:
    return inspected(files["openvino"])


def test_layers_with_their_grids(inspection: Inspection) -> None:
    layers = {layer.name: layer for layer in inspection.layers}
    assert [layer.operator for layer in layers.values()] == ["Conv", "Conv", "ConvTranspose", "Gemm", "Gemm"]
    assert [layer.is_integer for layer in layers.values()] == [True, True, True, False, True]
    assert list(layers)[:3] == ["stem", "grouped", "up"]
    for layer in layers.values():
        expected = "int4 per channel" if layer.is_integer else "float"
        assert layer.weight_grid == expected
    assert re.fullmatch(r"int8, scale [\d.e-]+, zero 0", layers["stem"].input_grid)
    assert re.fullmatch(r"uint8, scale [\d.e-]+, zero 0", layers["stem"].output_grid)
    assert layers["grouped"].input_grid == layers["stem"].output_grid
    assert inspection.layers[3].input_grid == "float"


def test_weights_and_multiply_adds(inspection: Inspection) -> None:
    weights = [8 * 3 * 9, 8 * 2 * 9, 8 * 4 * 4, 4 * 6, 6 * 5]
    products = [8 * 8 * 8 * 3 * 9, 8 * 4 * 4 * 2 * 9, 8 * 4 * 4 * 4 * 4, 4 * 6, 6 * 5]
    assert [layer.weights for layer in inspection.layers] == weights
    assert [layer.multiply_adds for layer in inspection.layers] == products
    assert inspection.float_weights == 24 / sum(weights)
    assert inspection.float_multiply_adds == 24 / sum(products)
    assert inspection.float_size == 4 * (sum(weights) + 8 + 8 + 4 + 6 + 5)


def test_what_a_file_says_of_itself(inspection: Inspection, files: dict[str, Path]) -> None:
    assert inspection.size == files["openvino"].stat().st_size
    assert inspection.target == "openvino"
    assert inspection.operations == {"Add": (1, 0), "ReduceMean": (0, 1)}
    assert (inspection.opset, inspection.ir_version) == (20, onnx.load(files["openvino"]).ir_version)


def test_inspect_prints_it(files: dict[str, Path]) -> None:
    result = run("inspect", files["onnxruntime"])
    assert result.exit_code == 0
    for text in ("stem", "int4 per channel", "left_float", "of the multiply-adds", "target: onnxruntime", "opset 20"):
        assert text in result.output


def test_files_of_other_tools(tmp_path: Path) -> None:
    path = _shifted(tmp_path / "other.onnx", 1.0)
    result = run("inspect", path)
    assert result.exit_code == 0
    assert "float: no layer" in result.output
    assert "target: not noted" in result.output


def test_differences_between_files(tmp_path: Path) -> None:
    one, other = (_shifted(tmp_path / f"{shift}.onnx", shift) for shift in (0.0, 0.5))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    (comparison,) = compared(one, other, {"x": x})
    energy = np.square(x, dtype=np.float64).sum()
    assert comparison.signal_to_noise == pytest.approx(10 * np.log10(energy / (0.25 * x.size)), rel=1e-5)  # x + 0.5
    assert comparison.largest == pytest.approx(0.5, rel=1e-5)  # is rounded
    assert (comparison.name, comparison.shape, comparison.agreement) == ("y", (4, 3), 1.0)
    (same,) = compared(one, one, {"x": x})
    assert (same.signal_to_noise, same.largest) == (float("inf"), 0.0)


def test_compare_prints_it(files: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", np.random.default_rng(0).normal(size=(5, 3, 8, 8))[:2])  # float64, without a name
    result = run("compare", files["float"], files["openvino"], "--data", tmp_path / "data.npz")
    assert result.exit_code == 0
    assert re.search(r"output .* 2x5 .* \d+\.\d dB .* \d", result.output)


def test_encodings_of_a_file_are_those_of_its_model(files: dict[str, Path], tmp_path: Path) -> None:
    result = run("encodings", files["openvino"], "--output", tmp_path / "written.onnx")
    assert result.exit_code == 0, result.output
    assert "written.encodings" in result.output
    written = json.loads((tmp_path / "written.encodings").read_text())
    assert written == json.loads(files["float"].with_suffix(".encodings").read_text())
    ours, theirs = (onnx.load(path).graph for path in (tmp_path / "written.onnx", files["float"]))
    assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]


def test_encodings_beside_the_file(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(files["openvino"].read_bytes())
    assert run("encodings", tmp_path / "model.onnx", "--version", "2.0.0").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "model_float.encodings",
        "model_float.onnx",
    ]
    assert json.loads((tmp_path / "model_float.encodings").read_text())["version"] == "2.0.0"


def test_a_file_without_a_float_form(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["codes"], to=TensorProto.UINT8), _dequantize("codes", "y")]
    path = _saved(tmp_path / "model.onnx", nodes)
    assert "must quantize what it dequantizes" in fails("encodings", path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert "version must be one of 1.0.0, 2.0.0, got '3'" in fails("encodings", path, "--version", "3")


def test_no_file_and_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").touch()
    good = _shifted(tmp_path / "good.onnx", 0.0)
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "none.npz")
    for command in (["inspect"], ["encodings"]):
        assert "there is no file" in fails(*command, tmp_path / "absent.onnx")
        assert "text.onnx' is not an ONNX file" in fails(*command, tmp_path / "text.onnx")
        assert "empty.onnx' is not an ONNX file: it has no graph" in fails(*command, tmp_path / "empty.onnx")
    assert "there is no file" in fails("compare", good, good, "--data", tmp_path / "absent.npz")
    assert "must be an .npz file of arrays" in fails("compare", good, good, "--data", tmp_path / "text.npz")
    assert "got one without any" in fails("compare", good, good, "--data", tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((2, 3)), "b": np.zeros((2, 3))}, r"an array for each input of '.*' \(x\), got a, b"),
        ({"x": np.zeros((2, 4))}, r"the shape \(any, 3\) for the input 'x', got \(2, 4\)"),
        ({"x": np.zeros(3)}, r"the shape \(any, 3\) for the input 'x', got \(3,\)"),
        ({"x": np.zeros((2, 3), complex)}, "data must be float32 for the input 'x', got complex128"),
    ],
)
def test_data_that_does_not_fit(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    good = _shifted(tmp_path / "good.onnx", 0.0)
    assert re.search(message, fails("compare", good, good, "--data", tmp_path / "data.npz"))


def test_files_that_do_not_run_or_return_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 3), np.float32))
    good = _shifted(tmp_path / "good.onnx", 0.0)
    unknown = _saved(tmp_path / "unknown.onnx", [helper.make_node("NoSuchOperator", ["x"], ["y"])])
    message = fails("compare", good, unknown, "--data", tmp_path / "data.npz")
    assert "unknown.onnx' does not load in ONNX Runtime" in message
    other = _saved(tmp_path / "other.onnx", [helper.make_node("Transpose", ["x"], ["y"])], shape=None)
    message = fails("compare", good, other, "--data", tmp_path / "data.npz")
    assert "both files must return the same shapes, got [(2, 3)] and [(3, 2)]" in message


def test_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_FLOAT_EPOCHS", 1)
    result = run("demo")
    assert result.exit_code == 0, result.output
    accuracies = [float(number) for number in re.findall(r"([\d.]+) %", result.output)]
    assert len(accuracies) == 4
    assert accuracies[-1] > 70  # of ten digits
    assert accuracies[-1] == accuracies[-2]  # what was validated is what is deployed
    assert "none differs" in result.output


def test_without_the_packages_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "mlframework.quantization.command_line.app")
    with pytest.raises(SystemExit, match=r"needs typer.*pip install 'mlframework-quantization\[cli\]'"):
        main()


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'mlframework-quantization[cli]'" in fails("inspect", tmp_path / "model.onnx")


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    path = _shifted(tmp_path / "model.onnx", 0.0)
    command = [sys.executable, "-m", "mlframework.quantization", "inspect", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "float: no layer" in result.stdout


def _shifted(path: Path, shift: float) -> Path:
    """x + shift."""
    constant = helper.make_node("Constant", [], ["shift"], value_float=shift)
    return _saved(path, [constant, helper.make_node("Add", ["x", "shift"], ["y"])])


def _dequantize(codes: str, values: str) -> Any:
    return helper.make_node("DequantizeLinear", [codes, "scale"], [values])


def _saved(path: Path, nodes: list[Any], shape: tuple[Any, ...] | None = ("batch", 3)) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
