"""What each engine expects of a file is what is in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.exported_file import ExportedFile, inputs_of, prepared_model
from export.small_networks import INTEGER_NETWORKS, SHAPE, make
from mlframework.quantization import (
    FakeQuantizeLayer,
    QATConfig,
    QuantizationScheme,
    calibrate,
    convert,
    export_onnx,
    prepare,
)
from mlframework.quantization.export.targets import disagreement, resolved_target

pytestmark = pytest.mark.slow

TARGETS = ["onnxruntime", "tensorrt", "openvino"]
NETWORKS = ("residual", "concat", "depthwise, grouped, dilated, strided", "linear layers", "transposed")


Files = Callable[[str, str], ExportedFile]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """By target and network, each exported once."""

    @cache
    def file_of(target: str, name: str) -> ExportedFile:
        return ExportedFile.of(make(INTEGER_NETWORKS[name]), SHAPE, tmp_path_factory.mktemp("export"), target)

    return file_of


@pytest.fixture(
    scope="module",
    params=[  # each network for one engine or two, each engine with two networks or three; all in the long tests
        pytest.param((target, name), marks=pytest.mark.long if (row + column) % 2 else ())
        for row, target in enumerate(TARGETS)
        for column, name in enumerate(NETWORKS)
    ],
    ids=str,
)
def exported(request: pytest.FixtureRequest, files: Files) -> tuple[str, ExportedFile]:
    target, name = request.param
    return target, files(target, name)


def test_weights_are_int8_per_channel_and_biases_int32(exported: tuple[str, ExportedFile]) -> None:
    _, file = exported
    layers = [node for kind in ("Conv", "Gemm", "ConvTranspose") for node in file.nodes(kind)]
    assert layers
    for layer in layers:
        weight, bias = (file.maker(value) for value in layer.input[1:3])
        codes, scale, zero_point = map(file.constant, weight.input)
        assert codes.dtype == zero_point.dtype == np.int8
        assert codes.min() >= -127
        axis = 1 if layer.op_type == "ConvTranspose" else 0
        assert _attribute(weight, "axis") == axis
        assert scale.shape == zero_point.shape == (codes.shape[axis],)
        assert not zero_point.any()
        bias_codes, bias_scale = map(file.constant, bias.input)
        assert bias_codes.dtype == np.int32
        input_scale = file.constant(file.maker(layer.input[0]).input[1])
        assert np.array_equal(bias_scale, input_scale * scale)


def test_grids_of_activations(exported: tuple[str, ExportedFile]) -> None:
    target, file = exported
    for node in file.nodes("QuantizeLinear"):
        scale, zero_point = map(file.constant, node.input[1:])
        assert scale.shape == zero_point.shape == ()
        assert scale.dtype == np.float32
        follows_relu = file.maker(node.input[0]) is not None and file.maker(node.input[0]).op_type == "Relu"
        if target == "tensorrt":
            assert zero_point.dtype == np.int8
            assert zero_point == 0
        elif follows_relu:
            assert zero_point.dtype == np.uint8
            assert zero_point == 0
        elif target == "onnxruntime":
            assert zero_point.dtype == np.uint8
        elif zero_point.dtype == np.uint8:  # never negative, or a concatenation
            assert zero_point in (0, 128)
        else:
            assert zero_point == 0


def test_every_consumer_has_a_dequantize_node_of_its_own(exported: tuple[str, ExportedFile]) -> None:
    _, file = exported
    for node in file.nodes("DequantizeLinear"):
        outputs = [value.name for value in file.graph.output]
        assert len(file.readers(node.output[0])) + outputs.count(node.output[0]) == 1


def test_nothing_reads_codes_but_dequantize_nodes(exported: tuple[str, ExportedFile]) -> None:
    """Elsewhere than in ONNX Runtime, whose file may also clip, pad and look up codes."""
    target, file = exported
    for node in file.nodes("QuantizeLinear"):
        kinds = {reader.op_type for reader in file.readers(node.output[0])}
        assert kinds <= (
            {"DequantizeLinear", "Clip", "Pad", "Reshape"} if target == "onnxruntime" else {"DequantizeLinear"}
        )


def test_only_standard_operators(exported: tuple[str, ExportedFile]) -> None:
    _, file = exported
    assert [(entry.domain, entry.version) for entry in file.model.opset_import] == [("", 20)]
    assert all(node.domain == "" for node in file.graph.node)
    onnx.checker.check_model(file.model, full_check=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_sum_reads_a_quantize_node_of_its_own_for_tensorrt(target: str, files: Files) -> None:
    file = files(target, "residual")
    shared = []
    for addition in file.nodes("Add"):
        for value in addition.input:
            quantize = file.maker(file.maker(value).input[0])
            shared.append(len(file.readers(quantize.output[0])) > 1)
    assert any(shared) == (target != "tensorrt")
    # The copies quantize one value with one grid.
    twins = {tuple(node.input) for node in file.nodes("QuantizeLinear")}
    assert (len(twins) < len(file.nodes("QuantizeLinear"))) == (target == "tensorrt")


def test_concatenations_are_unsigned_for_openvino(files: Files) -> None:
    file = files("openvino", "concat")
    (concatenation,) = file.nodes("Concat")
    (quantize,) = file.readers(concatenation.output[0])
    (dequantize,) = file.readers(quantize.output[0])
    assert file.constant(quantize.input[2]).dtype == np.uint8
    assert file.constant(quantize.input[2]) == 128
    assert dequantize.input[2] == quantize.input[2]
    codes = file.codes(x := inputs_of(SHAPE, 20))
    outputs: dict[str, Any] = {}
    name = quantize.output[0]
    file.converted.get_submodule(name).register_forward_hook(lambda _, args, output: outputs.update(output=output))
    with torch.no_grad():
        file.converted(x)
    assert np.array_equal(codes[name].astype(int), outputs["output"].numpy().astype(int) + 128)


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_is_read_off_the_grids(target: str) -> None:
    converted = convert(prepared_model(make(INTEGER_NETWORKS["residual"]), SHAPE, target, activation_bits=6))
    assert resolved_target(converted, None) == target
    assert resolved_target(converted, target) == target


def test_the_first_layer_that_disagrees_is_named() -> None:
    converted = convert(prepared_model(make(INTEGER_NETWORKS["residual"]), SHAPE, "tensorrt"))
    reason = disagreement(converted, "onnxruntime")
    assert reason is not None
    assert reason.startswith("left has activations in int8 [-128, 127] symmetric")
    with pytest.raises(ValueError, match=r"'onnxruntime' has activations in uint8 .* but left has activations in int8"):
        resolved_target(converted, "onnxruntime")


def test_grids_of_no_target() -> None:
    model = nn.Sequential(FakeQuantizeLayer(QuantizationScheme(symmetric=False)))
    calibrate(model, [torch.randn(4, 3)])
    expected = r"grids of one target .* but 0\.quantize has activations in int8 .* affine"
    with pytest.raises(ValueError, match=expected):
        resolved_target(convert(model), None, "onnx")


def _attribute(node: Any, name: str) -> Any:
    (found,) = [attribute for attribute in node.attribute if attribute.name == name]
    return onnx.helper.get_attribute_value(found)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_file_is_for_the_engine_that_the_model_was_prepared_for(target: str, tmp_path: Path) -> None:
    """The grids alone would not tell: those of TensorRT are among OpenVINO's."""
    inputs = torch.randn(2, 3, 6, 6)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), QATConfig.for_target(target), (inputs,))
    calibrate(model, [inputs])
    export_onnx(model, (inputs,), tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "model.onnx")).metadata_props}
    assert metadata["mlframework.quantization.target"] == target
