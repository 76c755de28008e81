"""Encodings beside a float file: every quantized tensor has one, and it states the values of the quantized file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export.encodings_schema import check_document
from export.exported_file import prepared_model, session_of
from mlframework.quantization import QATConfig, calibrate, convert, export_encodings, prepare
from mlframework.quantization.export import export_encodings as module
from mlframework.quantization.export.float_form import float_form
from zoo import NETWORKS

pytestmark = pytest.mark.slow


class Written:
    """A model's float file and encodings, and the file with quantize and dequantize nodes that they were made of."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...], folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "float_form", self._watched)
            export_encodings(model, example, folder / "model.onnx")
        self.float = onnx.load(folder / "model.onnx")
        self.document = json.loads((folder / "model.encodings").read_text())
        self.constants = {value.name: numpy_helper.to_array(value) for value in self.quantized.graph.initializer}

    def _watched(self, quantized: Any) -> Any:
        self.quantized = quantized
        result, self.encodings = float_form(quantized)
        return result, self.encodings

    def nodes(self, kind: str) -> list[Any]:
        return [node for node in self.quantized.graph.node if node.op_type == kind]

    def activations(self, document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
        """The entry, scale and zero point of every quantized value."""
        entries = _entries_of(document)
        for node in self.nodes("QuantizeLinear"):
            # It is called like its codes, or, where the model takes or returns it, like itself.
            returned = [other.output[0] for other in self.nodes("DequantizeLinear") if other.input[0] == node.output[0]]
            names = (node.output[0], node.input[0], *returned)
            scale, zero_point = (self.constants[name] for name in node.input[1:])
            yield next(entries[name] for name in names if name in entries), scale, zero_point


def _entries_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for key, entries in document.items() if key != "version" for entry in entries}


@pytest.fixture(
    scope="module", params=[*(pytest.param(name, marks=pytest.mark.long) for name in ("mobilenet_v2", "unet")), "gpt"]
)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any, Written]:
    """A float model, an example, and what is written of its prepared form."""
    network = NETWORKS[request.param]
    model, example = network.make().eval(), network.example_inputs(2)
    prepared = prepare(network.make().eval(), QATConfig(), example)
    calibrate(prepared, [network.example_inputs(4)])
    return model, example, Written(prepared, example, tmp_path_factory.mktemp("encodings"))


def test_every_quantized_tensor_has_an_encoding(network: tuple[nn.Module, Any, Written]) -> None:
    *_, written = network
    quantized = {(node.input[0], *node.input[1:]) for node in written.nodes("QuantizeLinear")}
    assert len(written.document["activation_encodings"]) == len(quantized) > 10
    constants = {tuple(node.input) for node in written.nodes("DequantizeLinear") if node.input[0] in written.constants}
    tables = [
        node for node in written.nodes("Gather") if written.constants.get(node.input[0], np.zeros(0)).dtype == "i1"
    ]
    assert len(written.document["param_encodings"]) == len(constants) + len(tables) > 10


def test_encodings_are_of_the_format(network: tuple[nn.Module, Any, Written]) -> None:
    *_, written = network
    check_document(written.document)


def test_tensors_of_encodings_are_in_the_file(network: tuple[nn.Module, Any, Written]) -> None:
    *_, written = network
    graph = written.float.graph
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.node}
    values = {value.name for value in graph.input} | {name for node in graph.node for name in node.output}
    constants = {value.name for value in graph.initializer}
    assert {entry["name"] for entry in written.document["activation_encodings"]} <= values
    assert {entry["name"] for entry in written.document["param_encodings"]} <= constants


def test_activations_have_the_values_of_their_codes(network: tuple[nn.Module, Any, Written]) -> None:
    *_, written = network
    for entry, scale, zero_point in written.activations(written.document):
        codes = _all_codes(zero_point.dtype)
        assert np.array_equal(_values_of(entry, codes), _dequantized(codes, scale, zero_point))


def test_parameters_have_the_values_of_their_codes(network: tuple[nn.Module, Any, Written]) -> None:
    *_, written = network
    constants = {value.name: numpy_helper.to_array(value) for value in written.float.graph.initializer}
    entries = _entries_of(written.document)
    for node in written.nodes("DequantizeLinear"):
        if node.input[0] in written.constants:
            codes, scale, *zero_points = (written.constants[name] for name in node.input)
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            name = node.input[1].replace("weights.scale", "weight").replace("weights.bias_scale", "bias")
            expected = _dequantized(codes, scale, *zero_points, axis=axis)
            assert np.array_equal(_values_of(entries[name], codes, axis), expected)
            assert np.array_equal(constants[name], expected)


def test_the_float_file_is_the_model_with_rounded_weights(network: tuple[nn.Module, Any, Written]) -> None:
    model, example, written = network
    feed = {value.name: tensor.numpy() for value, tensor in zip(written.float.graph.input, example, strict=True)}
    (result,) = session_of(written.float.SerializeToString()).run(None, feed)
    with torch.no_grad():
        expected = model(*example).numpy()
    # Weights of 8 bits per channel are rounded to within a 250th of the largest one.
    assert np.square(result - expected).sum() < 1e-3 * np.square(expected).sum()


class Plain(nn.Module):
    """Layers without anything to fold, whose rounded weights can be put back into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu6(self.first(images))
        hidden = self.up(hidden + self.second(hidden))
        return self.last(hidden.mean((2, 3)))


def test_the_float_file_computes_what_the_model_would(tmp_path: Path) -> None:
    model = Plain()
    prepared = prepared_model(model, (3, 8, 8))
    written = Written(prepared, (torch.randn(2, 3, 8, 8),), tmp_path)
    converted, rounded = convert(prepared), Plain()
    for name, layer in converted.named_modules():
        if hasattr(layer, "weight_scale"):
            shape = [-1 if axis == (1 if name == "up" else 0) else 1 for axis in range(layer.weight.dim())]
            with torch.no_grad():
                scale = layer.weight_scale.reshape(shape)
                rounded.get_parameter(f"{name}.weight").copy_(layer.weight.to(torch.float32) * scale)
                rounded.get_parameter(f"{name}.bias").copy_(
                    layer.bias.to(torch.float32) * layer.input_scale * layer.weight_scale
                )
    images = torch.randn(2, 3, 8, 8)
    (result,) = session_of(written.float.SerializeToString()).run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = rounded(images)
    assert torch.allclose(torch.from_numpy(result), expected, atol=1e-5)  # the order of sums


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "executorch"])
def test_grids_of_every_target_in_every_version(target: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    written = Written(prepared_model(model, (3, 8, 8), target), (torch.randn(2, 3, 8, 8),), tmp_path)
    newer = module.document(written.encodings, "2.0.0")
    for document in (written.document, newer):
        check_document(document)
        for entry, scale, zero_point in written.activations(document):
            codes = _all_codes(zero_point.dtype)
            assert np.array_equal(_values_of(entry, codes), _dequantized(codes, scale, zero_point))
            if document is newer:
                assert entry["output_dtype"] == "uint8"  # as AIMET has it
            else:
                assert entry["is_sym"] == (zero_point.dtype == np.int8 and zero_point == 0)
    older, weight = (_entries_of(document)["0.weight"] for document in (written.document, newer))
    assert {"enc_type": "PER_CHANNEL", "bw": 8, "is_sym": True, "offset": [-128] * 4}.items() <= older.items()
    assert older["scale"] == weight["y_scale"]
    assert weight == {"name": "0.weight", "output_dtype": "int8", "y_scale": older["scale"], "axis": 0}


def test_codes_of_fewer_bits_are_those_that_they_are_stored_in(tmp_path: Path) -> None:
    """Values are clipped where the narrower grid ends."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    written = Written(prepared_model(model, (6,), activation_bits=4, weight_bits=4), (torch.randn(2, 6),), tmp_path)
    assert [entry["bw"] for name, entry in _entries_of(written.document).items() if "bias" not in name] == [8] * 4
    (result,) = session_of(written.float.SerializeToString()).run(None, {"input": np.full((2, 6), 1e6, np.float32)})
    assert np.abs(result).max() < 100


def test_the_version_that_was_asked_for(tmp_path: Path) -> None:
    export_encodings(linear(), (torch.randn(2, 6),), tmp_path / "m.onnx", version="2.0.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.encodings", "m.onnx"]
    document = json.loads((tmp_path / "m.encodings").read_text())
    check_document(document)
    assert document["version"] == "2.0.0"


@pytest.mark.parametrize("per_channel", [True, False])
def test_tables_of_rows(per_channel: bool, tmp_path: Path) -> None:
    """A table per row is looked up as it is; rows of one per tensor are on its grid."""
    table = numpy_helper.from_array(np.arange(-6, 6, dtype=np.int8).reshape(4, 3), "token.table")
    scales = np.float32([[0.1], [0.2], [0.3], [0.4]]) if per_channel else np.float32(0.1)
    nodes = [helper.make_node("Gather", ["token.table", "rows"], ["picked"])]
    if per_channel:
        nodes += [
            helper.make_node("Cast", ["picked"], ["cast"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["token.scale", "rows"], ["scales"]),
            helper.make_node("Mul", ["cast", "scales"], ["output"]),
        ]
    else:
        nodes += [helper.make_node("DequantizeLinear", ["picked", "token.scale"], ["output"])]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [2, 3])],
        [table, numpy_helper.from_array(scales, "token.scale")],
    )
    model = _model_of(graph)
    result, encodings = float_form(model)
    feed = {"rows": np.int64([3, 1])}
    assert np.array_equal(*(session_of(each.SerializeToString()).run(None, feed)[0] for each in (model, result)))
    assert [encoding.name for encoding in encodings] == ["token.weight"] + ["output"] * (not per_channel)
    assert encodings[0].axis == (0 if per_channel else None)
    assert len(encodings[0].scale) == (4 if per_channel else 1)


def test_a_value_on_several_grids_is_several_tensors() -> None:
    """And one that is read as a float as well stays one; codes of one grid brought to another are another tensor."""
    graph = _graph(
        [
            helper.make_node("Abs", ["x"], ["value"]),
            helper.make_node("QuantizeLinear", ["value", "s1", "zero"], ["one"]),
            helper.make_node("QuantizeLinear", ["value", "s2", "zero"], ["other"]),
            helper.make_node("DequantizeLinear", ["one", "s1", "zero"], ["one_values"]),
            helper.make_node("DequantizeLinear", ["other", "s2", "zero"], ["other_values"]),
            helper.make_node("QuantizeLinear", ["one_values", "s3", "zero"], ["third"]),
            helper.make_node("DequantizeLinear", ["third", "s3", "zero"], ["third_values"]),
            helper.make_node("Sum", ["value", "one_values", "other_values", "third_values"], ["y"]),
        ]
    )
    result, encodings = float_form(_model_of(graph))
    onnx.checker.check_model(result, full_check=True)
    assert {encoding.name: encoding.scale[0] for encoding in encodings} == {"one": 0.5, "other": 0.25, "third": 0.125}
    kinds = {node.output[0]: (node.op_type, list(node.input)) for node in result.graph.node}
    assert kinds == {
        "value": ("Abs", ["x"]),
        "one": ("Identity", ["value"]),
        "other": ("Identity", ["value"]),
        "third": ("Identity", ["one"]),
        "y": ("Sum", ["value", "one", "other", "third"]),
    }


def test_what_a_model_returns_keeps_its_name() -> None:
    """A value that is returned as it is, or twice, has a copy under each name; each has the encoding."""
    graph = _graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s1", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "s1", "zero"], ["y"]),
            helper.make_node("DequantizeLinear", ["codes", "s1", "zero"], ["again"]),
            helper.make_node("Abs", ["again"], ["size"]),
            helper.make_node("QuantizeLinear", ["size", "s2", "zero"], ["size_codes"]),
            helper.make_node("DequantizeLinear", ["size_codes", "s2", "zero"], ["z"]),
        ],
        outputs=("y", "z"),
    )
    result, encodings = float_form(_model_of(graph))
    onnx.checker.check_model(result, full_check=True)
    assert [(encoding.name, encoding.scale[0]) for encoding in encodings] == [("x", 0.5), ("y", 0.5), ("z", 0.25)]
    kinds = {node.output[0]: (node.op_type, list(node.input)) for node in result.graph.node}
    assert kinds == {"y": ("Identity", ["x"]), "z": ("Abs", ["x"])}


_REFUSED: dict[str, tuple[list[Any], str]] = {
    "codes that are computed on": (
        [
            helper.make_node("QuantizeLinear", ["x", "s1", "zero"], ["codes"]),
            helper.make_node("Clip", ["codes"], ["clipped"], name="clip"),
            helper.make_node("DequantizeLinear", ["clipped", "s1", "zero"], ["y"]),
        ],
        r"must dequantize codes before anything reads them, got Clip 'clip' on the codes 'codes'.*'onnxruntime'",
    ),
    "codes that are returned": (
        [helper.make_node("Abs", ["x"], ["size"]), helper.make_node("QuantizeLinear", ["size", "s1", "zero"], ["y"])],
        "must dequantize codes before it returns them, got the codes 'y'",
    ),
    "codes of another grid": (
        [
            helper.make_node("QuantizeLinear", ["x", "s1", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "s2", "zero"], ["y"], name="dequantize"),
        ],
        r"must dequantize codes with their own grid, got 'codes' with another in 'dequantize'.*'onnxruntime'",
    ),
    "codes of another origin": (
        [
            helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.UINT8),
            helper.make_node("DequantizeLinear", ["cast", "s1", "zero"], ["y"]),
        ],
        "must quantize what it dequantizes, got codes of another origin: 'cast'",
    ),
    "a scale that is computed": (
        [
            helper.make_node("Abs", ["s1"], ["scale"]),
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], name="quantize"),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "must have constant scales and zero points, got QuantizeLinear 'quantize'",
    ),
}


@pytest.mark.parametrize(("nodes", "message"), _REFUSED.values(), ids=_REFUSED)
def test_files_without_a_float_form(nodes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        float_form(_model_of(_graph(nodes)))


def test_activations_per_channel_need_the_newer_version() -> None:
    scales = numpy_helper.from_array(np.float32([1, 2]), "scales")
    zeros = numpy_helper.from_array(np.int8([0, 0]), "zeros")
    graph = _graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scales", "zeros"], ["codes"], axis=0),
            helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["y"], axis=0),
        ],
        constants=(scales, zeros),
    )
    _, encodings = float_form(_model_of(graph))
    with pytest.raises(ValueError, match=r"version must be '2\.0\.0' for activations .* got '1\.0\.0' and x"):
        module.document(encodings, "1.0.0")
    check_document(module.document(encodings, "2.0.0"))


def linear() -> nn.Module:
    return prepared_model(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (6,))


@pytest.mark.parametrize(
    ("model", "options", "path", "error", "message"),
    [
        (linear, {"version": "0.6.1"}, "m.onnx", ValueError, r"version must be one of 1\.0\.0, 2\.0\.0, got '0\.6\.1'"),
        (linear, {}, "m.encodings", ValueError, "path must be that of the ONNX file, got '.*m.encodings'"),
        (linear, {}, "there/m.onnx", FileNotFoundError, "path must be in a folder that exists"),
        (lambda: nn.Linear(6, 2), {}, "m.onnx", TypeError, "model must be prepared or converted"),
        (linear, {"example_kwargs": 3}, "m.onnx", TypeError, "example_kwargs must be a mapping"),
    ],
)
def test_bad_input(
    model: Callable[[], nn.Module],
    options: dict[str, Any],
    path: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        export_encodings(model(), (torch.randn(2, 6),), tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m.onnx", "m.encodings"):
        (tmp_path / name).write_text("before")
    calls = 0

    def fails_the_second_time(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("no space left")

    monkeypatch.setattr(module.os, "fsync", fails_the_second_time)
    with pytest.raises(OSError, match="no space left"):
        export_encodings(linear(), (torch.randn(2, 6),), tmp_path / "m.onnx")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.onnx": "before", "m.encodings": "before"}


def _all_codes(dtype: np.dtype) -> np.ndarray:
    ends = np.iinfo(dtype)
    return np.arange(ends.min, ends.max + 1).astype(dtype)


def _values_of(entry: dict[str, Any], codes: np.ndarray, axis: int = 0) -> np.ndarray:
    """What an entry says that codes stand for, by the specification's formulas.

    Args:
        axis: of the channels; the older version has none, and takes the one of a layer's outputs.
    """
    integers = codes.astype(np.int64)
    if "enc_type" in entry:  # counted from the lowest code
        scales, zero_points = entry["scale"], [-offset for offset in entry["offset"]]
        integers = integers - np.iinfo(codes.dtype).min
        per_tensor = entry["enc_type"] == "PER_TENSOR"
    else:
        per_tensor = "axis" not in entry
        axis = entry.get("axis", 0)
        scales = [entry["y_scale"]] if per_tensor else entry["y_scale"]
        zero_points = entry.get("y_zero_point", 0)
        zero_points = [zero_points] * len(scales) if isinstance(zero_points, int) else zero_points
        integers = integers - np.iinfo(codes.dtype).min + np.iinfo(entry["output_dtype"]).min
    shape = [-1 if not per_tensor and dimension == axis else 1 for dimension in range(codes.ndim)]
    steps = integers - np.int64(zero_points).reshape(shape)
    return steps.astype(np.float32) * np.float32(scales).reshape(shape)


@cache
def _dequantize(dtype: str, axis: int, has_zero_point: bool) -> onnxruntime.InferenceSession:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    types = {"codes": kind, "scale": TensorProto.FLOAT, "zero_point": kind}
    inputs = list(types)[: 2 + has_zero_point]
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", inputs, ["values"], axis=axis)],
        "dequantize",
        [helper.make_tensor_value_info(name, types[name], None) for name in inputs],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, None)],
    )
    return session_of(_model_of(graph).SerializeToString())


def _dequantized(codes: np.ndarray, scale: np.ndarray, *zero_point: np.ndarray, axis: int = 0) -> np.ndarray:
    """What ONNX Runtime makes of codes."""
    session = _dequantize(codes.dtype.name, axis, bool(zero_point))
    feed = dict(zip(("codes", "scale", "zero_point"), (codes, scale, *zero_point), strict=False))
    (values,) = session.run(None, feed)
    return values


def _graph(nodes: list[Any], outputs: tuple[str, ...] = ("y",), constants: tuple[Any, ...] = ()) -> Any:
    """A graph of "x" with scales "s1" to "s3" and a zero point of uint8."""
    arrays = {"s1": np.float32(0.5), "s2": np.float32(0.25), "s3": np.float32(0.125), "zero": np.uint8(0)}
    return helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in outputs],
        [*(numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()), *constants],
    )


def _model_of(graph: Any) -> Any:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
