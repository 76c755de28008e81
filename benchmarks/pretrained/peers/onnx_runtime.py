"""ONNX Runtime's static quantization.

"Quantize ONNX models", https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, and for the types
of a processor with VNNI the docstring of ``quantize_static``: QDQ, uint8 activations, int8 weights per channel, after
``quant_pre_process``. Of transformers it says the same.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..methods import Method, Task, Unsupported
from ..protocol import Inputs, Model

LIBRARY = "ONNX Runtime"


def float_file(model: nn.Module, example_inputs: Inputs, path: Path) -> list[str]:
    """Writes the float model with a batch axis of any size; returns the names of its inputs."""
    shapes = tuple({0: torch.export.Dim("batch", min=2)} for _ in example_inputs)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, example_inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(path)
    return [value.name for value in program.model.graph.inputs]


def feeds(names: Sequence[str], batches: Sequence[Inputs]) -> Iterator[dict[str, np.ndarray]]:
    """Batches as sessions take them."""
    for batch in batches:
        yield {name: input.numpy() for name, input in zip(names, batch, strict=True)}


class _Reader:
    def __init__(self, batches: Iterator[dict[str, np.ndarray]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantized(task: Task, calibration: str) -> Model:
    """A session of the quantized file, as a callable."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if task.width != (8, 8):
        raise Unsupported("static quantization is of 8 bits")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "int8"))
        names = float_file(task.study.model(), task.study.example_inputs, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        with contextlib.redirect_stdout(io.StringIO()):
            quantize_static(
                prepared,
                result,
                _Reader(feeds(names, task.study.calibration_batches())),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[calibration],
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(result, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Any:
        outputs = [torch.from_numpy(output) for output in session.run(None, next(feeds(names, [inputs])))]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


METHODS = {
    f"ONNX Runtime {calibration}": Method(
        LIBRARY, partial(quantized, calibration=calibration), distribution="onnxruntime"
    )
    for calibration in ("MinMax", "Percentile", "Entropy")
}
