"""OpenVINO runs the files in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.exported_file import ExportedFile, inputs_of
from export.openvino_engine import compiled_model, openvino_saturates
from export.small_networks import INTEGER_NETWORKS, SHAPE, make

pytestmark = pytest.mark.slow

NETWORKS = (
    "sum with relu",
    "product",
    "concat",
    "hardswish",
    "padded average pool",
    "max pool",
    "upsample",
    "depthwise, grouped, dilated, strided",
    "linear layers",
    "transposed",
)


@pytest.mark.parametrize("target", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_run_in_int8(name: str, target: str, tmp_path: Path) -> None:
    # Of weights within 7 bits no sum of two products saturates. OpenVINO raises int8 activations to uint8, so that they
    # are no exception.
    weight_bits = 7 if openvino_saturates() else 8
    file = ExportedFile.of(make(INTEGER_NETWORKS[name]), SHAPE, tmp_path, target, weight_bits=weight_bits)
    compiled = compiled_model(file.path)
    information = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    precisions = [
        info["runtimePrecision"].astype(str)
        for info in information
        if info["layerType"].astype(str) in ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
    ]
    assert precisions
    assert set(precisions) <= {"u8", "i8"}
    x = inputs_of(SHAPE, 200)
    with torch.no_grad():
        expected = file.converted(x).numpy()
    # OpenVINO adds and pools by sums of its own: codes part by a step here and there.
    errors = np.abs(compiled([x.numpy()])[0] - expected)
    assert errors.max() < 0.1 * np.abs(expected).max()
    assert errors.mean() < 0.005 * np.abs(expected).max()
