"""Files of every version of the operators that can be asked for compute the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.exported_file import ExportedFile, prepared_model
from mlframework.quantization import export_onnx
from mlframework.quantization.export.onnx_model import OPSET, OPSETS

pytestmark = pytest.mark.slow

_OLDEST_RUNTIME = 10, 21  # the IR version and the operators that ONNX Runtime 1.20 reads


class Versions(nn.Module):
    """Operators that differ from version to version: padding, GELU, averages, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.other = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.other(F.relu6(self.stem(x))))
        rows = hidden.flatten(2).transpose(1, 2).unsqueeze(1)
        return self.last(F.scaled_dot_product_attention(rows, rows, rows).mean((1, 2)))


@pytest.fixture(scope="module")
def prepared() -> nn.Module:
    return prepared_model(Versions(), (3, 8, 8))


@pytest.mark.parametrize(
    "opset",
    [pytest.param(opset, marks=() if opset in (OPSETS[0], OPSETS[-1]) else pytest.mark.long) for opset in OPSETS],
)
def test_the_same_codes(opset: int, prepared: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    file = ExportedFile(prepared, (x,), tmp_path, opset_version=opset)
    assert [(each.domain, each.version) for each in file.model.opset_import] == [("", opset)]
    assert file.model.ir_version <= _OLDEST_RUNTIME[0]
    differing, compared = file.differences(x, float_tolerance=1e-5)  # attention is the engine's own
    assert differing == {}
    assert compared >= 3


def test_the_oldest_runtime_reads_what_is_written_by_default(prepared: nn.Module, tmp_path: Path) -> None:
    export_onnx(prepared, (torch.randn(2, 3, 8, 8),), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert model.ir_version <= _OLDEST_RUNTIME[0]
    assert model.opset_import[0].version == OPSET <= _OLDEST_RUNTIME[1]


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        (18, ValueError, "opset_version must be from 19 to 23, got 18"),
        (24, ValueError, "opset_version must be from 19 to 23, got 24"),
        (True, TypeError, "opset_version must be an int or None, got True"),
        ("20", TypeError, "opset_version must be an int or None, got '20'"),
    ],
)
def test_versions_that_are_not_written(
    version: Any, error: type[Exception], message: str, prepared: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_onnx(prepared, (torch.randn(2, 3, 8, 8),), tmp_path / "model.onnx", opset_version=version)


def test_versions_that_the_installed_onnx_does_not_know(
    prepared: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 22)
    with pytest.raises(ValueError, match="opset_version must be one that the installed onnx has, up to 22, got 23"):
        export_onnx(prepared, (torch.randn(2, 3, 8, 8),), tmp_path / "model.onnx", opset_version=23)
