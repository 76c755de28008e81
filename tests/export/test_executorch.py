"""Files for ExecuTorch, run by ExecuTorch: the integers of the converted model, code for code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from docs.page_setups import run_blocks
from mlframework.quantization import (
    ComparisonReport,
    NotExportableError,
    QATConfig,
    calibrate,
    convert,
    export,
    export_onnx,
    prepare,
    verify,
)

from .small_networks import CalledTwice, Everything, NumbersToo

pytestmark = pytest.mark.slow
pytest.importorskip("executorch")


def prepared_for_executorch(model: nn.Module, *shape: int, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    prepared = prepare(model.eval(), QATConfig.for_target("executorch", **fields), (torch.randn(1, *shape),))
    calibrate(prepared, [torch.randn(16, *shape) for _ in range(2)])
    return prepared


def verified(prepared: nn.Module, folder: Path, *shape: int, batch: int = 64) -> ComparisonReport:
    path = folder / "model.pte"
    export(prepared, (torch.randn(1, *reversed(shape)).transpose(1, -1),), path)
    return verify(prepared, [torch.randn(batch, *shape)], path=path)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.long)])
def test_codes_are_those_of_the_converted_model(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Everything()
    prepared = prepared_for_executorch(model, 3, 16, 16, weight_bits=bits, activation_bits=bits)
    report = verified(prepared, tmp_path, 3, 16, 16)
    assert report.engine == "ExecuTorch"
    assert report.layers[-1].exported is not None
    assert report.layers[-1].exported.elements == 64 * 5
    assert len(convert(prepared)(torch.randn(64, 3, 16, 16)).unique()) > (10 if bits == 8 else 5)


def test_one_dimension(tmp_path: Path) -> None:
    """A depthwise-separable network of audio."""
    torch.manual_seed(2)
    body = nn.Conv1d(8, 8, 5, groups=8, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(nn.Conv1d(1, 8, 9, stride=4, padding=4), nn.ReLU(), *body, *head)
    report = verified(prepared_for_executorch(model, 1, 128), tmp_path, 1, 128)
    assert report.layers[-1].exported is not None


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """Two layers, and their file for batches of four."""
    torch.manual_seed(3)
    prepared = prepared_for_executorch(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 6)
    path = tmp_path_factory.mktemp("linear") / "model.pte"
    export(prepared, (torch.randn(4, 6),), path)
    return prepared, path


def test_linear_layers_batches_and_a_file_in_another_process(linear: tuple[nn.Module, Path]) -> None:
    """The file takes its example's batch; larger ones are verified in parts. Nothing of this library runs it."""
    prepared, path = linear
    verify(prepared, [torch.randn(4, 6), torch.randn(12, 6)], path=path)
    for wrong in (torch.randn(6, 6), torch.randn(2, 6)):
        with pytest.raises(ValueError, match=r"batches must have the shapes that the file at path takes, \[\(4, 6\)\]"):
            verify(prepared, [wrong], path=path)
    with pytest.raises(ValueError, match=r"session_options and providers are ONNX Runtime's"):
        verify(prepared, [torch.randn(4, 6)], path=path, providers=["CPUExecutionProvider"])
    x = torch.randn(4, 6)
    code = (
        "import json, sys, torch\n"
        "from executorch.extension.pybindings import _C\n"  # its executorch.runtime imports the lowering, too
        "outputs = _C._load_for_executorch(sys.argv[1])([torch.tensor(json.loads(sys.argv[2]))])\n"
        "print(json.dumps(outputs[0].tolist()), any(name.startswith('mlframework') for name in sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(path), json.dumps(x.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    outputs, imported = result.stdout.strip().rsplit(" ", 1)
    assert imported == "False"
    assert json.loads(outputs) == convert(prepared)(x).tolist()


def test_a_layer_called_twice_by_the_code_of_its_module(tmp_path: Path) -> None:
    """It has one bias in the file, and a ReLU between two grids is not fused over the first of them."""

    torch.manual_seed(4)
    verified(prepared_for_executorch(CalledTwice(), 8), tmp_path, 8)


def test_a_batch_of_any_size_up_to_the_largest(tmp_path: Path) -> None:
    torch.manual_seed(5)
    prepared = prepared_for_executorch(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 3, 6, 6)
    path = tmp_path / "model.pte"
    shapes = {"input": {0: torch.export.Dim("batch", max=32)}}
    export(prepared, (torch.randn(2, 3, 6, 6),), path, dynamic_shapes=shapes)
    verify(prepared, [torch.randn(size, 3, 6, 6) for size in (1, 7, 32, 64)], path=path)


def test_an_operator_that_executorch_lacks_is_named(tmp_path: Path) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfinv(x)

    prepared = prepared_for_executorch(nn.Sequential(nn.Linear(4, 4), Inverse()), 4)
    with pytest.raises(NotExportableError, match=r"no form of aten\.erfinv\.default in 1.*: Operator"):
        export(prepared, (torch.randn(1, 4),), tmp_path / "model.pte")


def test_numbers_among_arguments_and_results(tmp_path: Path) -> None:
    report = verified(prepared_for_executorch(NumbersToo(), 4), tmp_path, 4)
    assert [layer.name for layer in report.layers[-2:]] == ["output 0", "output 1"]


def test_a_damaged_file_is_refused(linear: tuple[nn.Module, Path], tmp_path: Path) -> None:
    prepared, whole = linear
    path = tmp_path / "model.pte"
    path.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"path must be a program that ExecuTorch loads"):
        verify(prepared, [torch.randn(4, 6)], path=path)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    """A layer of three dimensions, which XNNPACK has none of."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 2))
    prepared = prepared_for_executorch(model, 3, 8, 8)
    path = tmp_path / "model.pte"
    path.write_bytes(b"before")
    with pytest.raises(NotExportableError, match=r"XNNPACK has no integer form of aten\.convolution\.default in 2"):
        export(prepared, (torch.randn(1, 3, 8, 8),), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_operators_outside_of_the_delegate_are_named(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.body(x), 1)

    prepared = prepared_for_executorch(Model(), 4)
    with pytest.warns(UserWarning, match=r"outside of XNNPACK.*aten\.cumsum\.default in the model"):
        export(prepared, (torch.randn(1, 4),), tmp_path / "model.pte")


def test_sums_of_scales_too_far_apart_are_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
            with torch.no_grad():
                for parameter in self.right.parameters():
                    parameter.mul_(1e-5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.left(x) + self.right(x))

    prepared = prepared_for_executorch(Model(), 3, 4, 4)
    with pytest.raises(NotExportableError, match=r"add is a sum whose operands' scales .* XNNPACK takes"):
        export(prepared, (torch.randn(1, 3, 4, 4),), tmp_path / "model.pte")


def test_models_for_other_engines_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    prepared = prepare(model, QATConfig(), (torch.randn(1, 3, 4, 4),))
    calibrate(prepared, [torch.randn(4, 3, 4, 4)])
    with pytest.raises(ValueError, match=r"'executorch' has activations in int8 .* but 0"):
        export(prepared, (torch.randn(1, 3, 4, 4),), tmp_path / "model.pte", "executorch")
    ours = prepared_for_executorch(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"target must be one that reads \.onnx files .*'executorch', which reads \.pte"
    ):
        export_onnx(ours, (torch.randn(1, 3, 4, 4),), tmp_path / "model.onnx", "executorch")


@pytest.mark.parametrize("page", ["how-to/executorch.md", "index.md"])
# It is about the processor: this one's plain products saturate.
@pytest.mark.filterwarnings("ignore:.*saturat:UserWarning")
def test_pages_that_have_a_file_for_it(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks run here, because ExecuTorch takes ten seconds to import."""
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_without_executorch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_for_executorch(nn.Linear(4, 2), 4)
    for name in [name for name in sys.modules if name.split(".")[0] == "executorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match=r"pip install 'mlframework-quantization\[executorch\]'"):
        export(prepared, (torch.randn(1, 4),), tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())
