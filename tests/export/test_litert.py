"""Files for LiteRT, run by LiteRT: the integers of the converted model, code for code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlframework.quantization import (
    ComparisonReport,
    NotExportableError,
    QATConfig,
    calibrate,
    convert,
    export,
    prepare,
    verify,
)

from .small_networks import CalledTwice, Everything

pytestmark = pytest.mark.slow
interpreters = pytest.importorskip("ai_edge_litert.interpreter")


def prepared_for_litert(model: nn.Module, *shape: int, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    prepared = prepare(model.eval(), QATConfig.for_target("litert", **fields), (torch.randn(1, *shape),))
    calibrate(prepared, [torch.randn(16, *shape) for _ in range(2)])
    return prepared


def verified(prepared: nn.Module, folder: Path, *shape: int, batch: int = 32) -> ComparisonReport:
    path = folder / "model.tflite"
    export(prepared, (torch.randn(1, *shape),), path)
    return verify(prepared, [torch.randn(batch, *shape)], path=path)


def test_codes_are_those_of_the_converted_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    prepared = prepared_for_litert(Everything(), 3, 16, 16)
    report = verified(prepared, tmp_path, 3, 16, 16)
    assert report.engine == "LiteRT"
    assert report.layers[-1].exported is not None
    assert report.layers[-1].exported.elements == 32 * 5
    assert len(convert(prepared)(torch.randn(64, 3, 16, 16)).unique()) > 10


def test_codes_of_four_bits_end_where_their_grids_do(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Hardtanh(-0.5, 0.5), nn.Conv2d(8, 4, 1)
    )
    prepared = prepared_for_litert(model, 3, 8, 8, weight_bits=4, activation_bits=4)
    verified(prepared, tmp_path, 3, 8, 8)
    assert len(convert(prepared)(3 * torch.randn(64, 3, 8, 8)).unique()) == 16


def test_xnnpack_runs_all_of_it(tmp_path: Path) -> None:
    """LiteRT's own kernels, which round otherwise, run nothing: the delegate turns the input into the output."""
    path = tmp_path / "model.tflite"
    export(prepared_for_litert(Everything(), 3, 16, 16), (torch.randn(1, 3, 16, 16),), path)
    interpreter = interpreters.Interpreter(str(path))
    interpreter.allocate_tensors()
    delegates = [details for details in interpreter._get_ops_details() if details["op_name"] == "DELEGATE"]
    (delegate,) = delegates
    assert list(delegate["outputs"]) == [interpreter.get_output_details()[0]["index"]]
    assert interpreter.get_input_details()[0]["index"] in delegate["inputs"]


def test_floats_that_xnnpack_does_not_make_are_named(tmp_path: Path) -> None:
    """It takes six axes. LiteRT's own kernel dequantizes an ulp apart."""
    shape = (2, 1, 2, 1, 2, 8)
    prepared = prepared_for_litert(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), *shape)
    with pytest.warns(UserWarning, match="outside of XNNPACK, by LiteRT's own kernels, run output in the model"):
        export(prepared, (torch.randn(1, *shape),), tmp_path / "model.tflite")


class Images(nn.Module):
    """Strides and paddings that LiteRT's two ways of padding do not have, and edges cut off a larger image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.wide = nn.Conv2d(8, 16, (1, 3), padding=(0, 1), groups=8)
        self.up = nn.ConvTranspose2d(16, 4, 3, stride=2, padding=1, output_padding=1)
        self.longer = nn.ConvTranspose2d(4, 4, (2, 3), stride=(2, 3), output_padding=(1, 2))
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.head = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem(x)), 3, stride=2, padding=1)
        x = self.wide(F.relu6(self.dilated(x)))
        x = F.pad(self.mirrored(self.longer(self.up(x))), (1, 0, 2, 1))
        x = F.interpolate(x, scale_factor=2)
        return self.head(F.max_pool2d(x, 2, ceil_mode=True)).permute(0, 2, 3, 1)


def test_paddings_strides_and_sizes(tmp_path: Path) -> None:
    torch.manual_seed(2)
    verified(prepared_for_litert(Images(), 3, 19, 16), tmp_path, 3, 19, 16)


def test_one_dimension(tmp_path: Path) -> None:
    """A depthwise-separable network of audio, of which no axis is moved between its layers."""
    torch.manual_seed(2)
    body = nn.Conv1d(8, 8, 5, groups=8, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(nn.Conv1d(1, 8, 9, stride=4, padding=4), nn.ReLU(), *body, *head)
    verified(prepared_for_litert(model, 1, 128), tmp_path, 1, 128)
    interpreter = interpreters.Interpreter(str(tmp_path / "model.tflite"))
    names = [details["op_name"] for details in interpreter._get_ops_details()]
    assert names.count("TRANSPOSE") <= 1
    assert names.count("RESHAPE") <= 4


class Views(nn.Module):
    """Codes that are read as floats in two orders."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(F.hardswish(x) + F.hardswish(x.transpose(2, 3)))


def test_one_tensor_in_two_orders(tmp_path: Path) -> None:
    torch.manual_seed(2)
    verified(prepared_for_litert(Views(), 3, 8, 8), tmp_path, 3, 8, 8)


class Attention(nn.Module):
    """Tokens, a mask and layers left in floats."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(16, 8), nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.query_key_value, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        parts = self.query_key_value(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.gelu(x + self.out(mixed.transpose(1, 2).flatten(2)))


def test_tokens_and_attention(tmp_path: Path) -> None:
    """Its softmax, mean and GELU are LiteRT's on floats: as near as those of float32 are to one another, and where one
    of them falls to another side of a rounding, a step."""
    torch.manual_seed(3)
    tokens = torch.randint(16, (4, 6))
    prepared = prepare(Attention().eval(), QATConfig.for_target("litert"), (tokens,))
    calibrate(prepared, [tokens])
    path = tmp_path / "model.tflite"
    export(prepared, (tokens[:1],), path)
    converted = convert(prepared)
    interpreter = interpreters.Interpreter(str(path))
    run = interpreter.get_signature_runner()
    for index in range(4):
        found = run(tokens=tokens[index : index + 1].numpy())["output_0"]
        assert torch.allclose(torch.from_numpy(found), converted(tokens[index : index + 1]), atol=1e-5)


def linear_file(folder: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    prepared = prepared_for_litert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 6)
    path = folder / "model.tflite"
    export(prepared, (torch.randn(4, 6),), path)
    return prepared, path


def test_batches_in_parts(tmp_path: Path) -> None:
    """The file takes its example's batch."""
    prepared, path = linear_file(tmp_path)
    verify(prepared, [torch.randn(4, 6), torch.randn(12, 6)], path=path)
    for wrong in (torch.randn(6, 6), torch.randn(2, 6)):
        with pytest.raises(ValueError, match=r"batches must have the shapes that the file at path takes, \[\(4, 6\)\]"):
            verify(prepared, [wrong], path=path)
    with pytest.raises(ValueError, match=r"session_options and providers are ONNX Runtime's"):
        verify(prepared, [torch.randn(4, 6)], path=path, providers=["CPUExecutionProvider"])


def test_a_file_in_another_process(tmp_path: Path) -> None:
    """Nothing of this library runs it; its arguments have the names of the model's."""
    prepared, path = linear_file(tmp_path)
    x = torch.randn(4, 6)
    code = (
        "import json, sys, numpy\n"
        "from ai_edge_litert.interpreter import Interpreter\n"
        "run = Interpreter(sys.argv[1]).get_signature_runner('serving_default')\n"
        "outputs = run(input=numpy.array(json.loads(sys.argv[2]), numpy.float32))\n"
        "print(json.dumps(outputs['output_0'].tolist()), any(name.startswith('mlframework') for name in sys.modules))\n"
    )
    command = [sys.executable, "-c", code, str(path), json.dumps(x.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    outputs, imported = result.stdout.strip().rsplit(" ", 1)
    assert imported == "False"
    assert json.loads(outputs) == convert(prepared)(x).tolist()


def test_a_model_prepared_for_executorch(tmp_path: Path) -> None:
    """Both run on XNNPACK."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    prepared = prepare(model.eval(), QATConfig.for_target("executorch"), (torch.randn(1, 3, 6, 6),))
    calibrate(prepared, [torch.randn(8, 3, 6, 6)])
    export(prepared, (torch.randn(1, 3, 6, 6),), tmp_path / "model.tflite", "litert")
    verify(prepared, [torch.randn(4, 3, 6, 6)], path=tmp_path / "model.tflite")


def test_a_layer_called_twice_by_the_code_of_its_module(tmp_path: Path) -> None:
    torch.manual_seed(4)
    verified(prepared_for_litert(CalledTwice(), 8), tmp_path, 8)


def test_numbers_among_arguments_and_results(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 6)

        def forward(self, x: Tensor, flag: bool = True) -> tuple[Tensor, int, None, Tensor, Tensor]:
            return self.body(x), x.shape[1], None, x, x.amax((0, 1))

    report = verified(prepared_for_litert(Model(), 4), tmp_path, 4, batch=1)
    assert [layer.name for layer in report.layers[-3:]] == ["output 0", "output 1", "output 2"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    prepared, path = linear_file(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"path must be a model that LiteRT loads"):
        verify(prepared, [torch.randn(4, 6)], path=path)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.body(x)


class Levels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long().clamp(max=3)


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(x)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), Inverse()), (4,), r"aten\.erfinv\.default in 1.*no operator"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 2)),
            (3, 8, 8),
            r"aten\.convolution\.default in 2.*two dimensions, got 3",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=2)),
            (4, 4, 4),
            r"aten\.convolution\.default in 1.*transposed convolutions have neither dilation nor groups",
        ),
        (
            nn.Sequential(nn.Linear(4, 4), Levels()),
            (4,),
            r"does not load the model that was made for it: aten\.clamp\.default in 1",
        ),
        (Counter(), (4,), "its forward changes .*calls, and its files keep nothing between calls"),
    ],
    ids=["operator", "three dimensions", "groups", "dtypes", "state"],
)
def test_what_litert_has_not_is_named(model: nn.Module, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    """What was at the path is left."""
    path = tmp_path / "model.tflite"
    path.write_bytes(b"before")
    with pytest.raises(NotExportableError, match=message):
        export(prepared_for_litert(model, *shape), (torch.randn(1, *shape),), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_argument_of_a_type_that_litert_has_not_is_named(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, signal: Tensor) -> Tensor:
            return self.body(signal.float())

    signal = torch.randn(2, 4, dtype=torch.float64)
    prepared = prepare(Model().eval(), QATConfig.for_target("litert"), (signal,))
    calibrate(prepared, [signal])
    with pytest.raises(NotExportableError, match=r"signal in the model: tensors of torch\.float64 have no form"):
        export(prepared, (signal,), tmp_path / "model.tflite")


def test_axes_of_any_size_are_refused(tmp_path: Path) -> None:
    prepared = prepared_for_litert(nn.Linear(4, 2), 4)
    shapes = {"input": {0: torch.export.Dim("batch", max=32)}}
    with pytest.raises(ValueError, match="dynamic_shapes must be None for 'litert'"):
        export(prepared, (torch.randn(2, 4),), tmp_path / "model.tflite", dynamic_shapes=shapes)


def test_without_litert_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_for_litert(nn.Linear(4, 2), 4)
    for name in [name for name in sys.modules if name.split(".")[0] == "ai_edge_litert"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(ImportError, match=r"pip install 'mlframework-quantization\[litert\]'"):
        export(prepared, (torch.randn(1, 4),), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())
