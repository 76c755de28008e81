"""Code that goes for one batch size gets a file for that size, and a warning that shows the code."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from export.exported_file import ExportedFile, inputs_of
from mlframework.quantization import QATConfig, calibrate, prepare


class Fixed(nn.Module):
    """A number where the batch size belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(2, 3, 2)


class Pairs(Fixed):
    """Even batches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(x.shape[0] // 2, 12)


class Inside(nn.Module):
    """The code is a submodule's, which is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = Untraced()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Untraced(Fixed):
    def forward(self, *parts: Tensor) -> Tensor:
        hidden = sum(self.layer(part) for part in parts)
        return hidden * torch.arange(2.0).reshape(2, 1).expand(parts[0].shape[0], 1)


CODE = {
    Fixed: "the model itself (reshape = layer.reshape(2, 3, 2))",
    Pairs: "the model itself (reshape = layer.reshape(floordiv, 12))",
    Inside: "block (return hidden * torch.arange(2.0).reshape(2, 1).expand(parts[0].shape[0], 1))",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", CODE, ids=lambda model: model.__name__)
def test_a_model_of_a_fixed_batch(
    model: type[nn.Module],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    prepared = prepared_with(model())
    example = inputs_of((6,), 2)
    file = ExportedFile(prepared, (example,), tmp_path)
    (warning,) = recwarn.list
    assert str(warning.message) == (
        f"the file takes the batch size of example_inputs only, because the code of {CODE[model]} assumes it "
        "(with dynamic_batch=False there is no warning)"
    )
    assert [axis.dim_value for axis in file.graph.input[0].type.tensor_type.shape.dim] == [2, 6]
    assert file.differences(example)[0] == {}
    assert "symbolic_shapes" not in capsys.readouterr().err  # where PyTorch logs
    recwarn.clear()
    ExportedFile(prepared, (example,), tmp_path, dynamic_batch=False)
    assert not recwarn.list
    onnx.checker.check_model(file.model)


@pytest.mark.slow
def test_what_is_logged_is_as_before(tmp_path: Path) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.level, list(logger.filters)
    ExportedFile.of(nn.Linear(6, 2), (6,), tmp_path)
    assert (logger.level, list(logger.filters)) == before


def prepared_with(model: nn.Module) -> nn.Module:
    """Calibrated on batches of two alone."""
    prepared = prepare(model.eval(), QATConfig(), (inputs_of((6,), 2),))
    calibrate(prepared, [inputs_of((6,), 2) for _ in range(4)])
    return prepared
