"""The engine-neutral program: PyTorch's operators, integers as they are stored, and the values that they stand for."""

from __future__ import annotations

import io
import os

import pytest
import torch
from torch import nn

from mlframework.quantization import QATConfig, calibrate, convert, export_program, prepare

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", ["onnxruntime", "executorch"])
def test_weights_biases_and_operators(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is written, and so no folder has to be one that may be written to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    config = QATConfig.for_target(target, quantize_last_linear=True)
    prepared = prepare(model.eval(), config, (torch.randn(2, 3, 6, 6),))
    calibrate(prepared, [torch.randn(8, 3, 6, 6)])
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    program = export_program(prepared, (torch.randn(2, 3, 6, 6),))
    torch.export.save(program, io.BytesIO())  # which checks that its signature is that of its graph
    kinds = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert kinds == {"aten", "quantized_decomposed"}
    dtypes = sorted(str(value.dtype) for name, value in program.state_dict.items() if name.endswith("codes"))
    assert dtypes == ["torch.int32", "torch.int32", "torch.int8", "torch.int8"]
    converted, x = convert(prepared), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        difference = (program.module()(x) - converted(x)).abs()
    step = next(
        module.output_scale for module in reversed(list(converted.modules())) if hasattr(module, "output_scale")
    )
    # Floats simulate the integers: one rounding of the first layer may come out otherwise, and of what follows one.
    assert difference.max() <= 1.001 * step
