"""int8 models as other tools make them, each set up as its own documentation says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

Call = Callable[[], object]


def torch_ao(model: nn.Module, batches: Sequence[Tensor], x: Tensor) -> Call:
    """torch.ao's FX graph mode for x86, in channels-last."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of torch.ao is deprecated
        prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping("x86"), (x,))
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        converted = convert_fx(prepared).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: converted(x)


def float_file(model: nn.Module, x: Tensor, path: Path) -> Path:
    """The float model as ONNX, with a batch axis of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            copy.deepcopy(model).eval(), (x,), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        assert program is not None
        program.save(path)
    return path


class _Batches(CalibrationDataReader):
    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self.feeds = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def onnxruntime_quantized(source: Path, batches: Sequence[Tensor], path: Path) -> Path:
    """ONNX Runtime's static quantization: QDQ, uint8 activations, int8 weights per channel."""
    prepared = path.with_suffix(".preprocessed.onnx")
    quant_pre_process(str(source), str(prepared))
    name = onnx.load(str(prepared)).graph.input[0].name
    quantize_static(
        str(prepared),
        str(path),
        _Batches(name, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return path


def nncf_quantized(source: Path, batches: Sequence[Tensor]) -> openvino.Model:
    """NNCF's post-training quantization of an OpenVINO model."""
    import nncf

    model = openvino.Core().read_model(str(source))
    return nncf.quantize(model, nncf.Dataset([batch.numpy() for batch in batches]))


def onnxruntime_call(path: Path, x: Tensor, threads: int) -> Call:
    """A file in ONNX Runtime on the CPU, with its default graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(model: Path | openvino.Model, x: Tensor, threads: int) -> Call:
    """A model in OpenVINO on the CPU, for the input's own shape."""
    core = openvino.Core()
    if isinstance(model, Path):
        model = core.read_model(str(model))
    model = model.clone()
    model.reshape({model.input(0): list(x.shape)})
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = {0: x.numpy()}
    return lambda: request.infer(feed, share_inputs=True)
