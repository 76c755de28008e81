"""``export``: a prepared or converted model as a file for the engine that it was prepared for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..targets import TARGETS
from .executorch_file import write_executorch
from .export_onnx import export_onnx
from .litert.file import write_litert
from .model_program import check_arguments, converted_for, program_of
from .qdq_program import lower_to_decomposed
from .xnnpack_limits import check_ratios

# Of the formats that are made from PyTorch's own operators.
_WRITERS = {"pte": write_executorch, "tflite": write_litert}


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
) -> None:
    """Writes a model as the file that an engine reads: ONNX, as :func:`export_onnx` does, ExecuTorch's ``.pte``, or
    LiteRT's ``.tflite``.

    ``.pte`` and ``.tflite`` files run through XNNPACK, for the shapes of the example; a ``.pte`` may take other sizes
    along the axes in ``dynamic_shapes``. (Batches of any size, which ONNX files take by default, have to be asked for.)
    Their layers, sums, products and averages compute the integers that the converted model computes, code for code;
    functions of single elements other than ReLU (sigmoid, hardswish, ...) are the engine's own, on floats, at most one
    step off. Both engines take the same models.

    Args:
        model: from :func:`prepare`, with data seen, or from :func:`convert`; it is not changed.
        example_inputs: positional arguments of a typical call, for the shapes.
        path: the file. It is written beside and then moved into place: a failure leaves a file that was there whole.
        target: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, ``"executorch"`` or ``"litert"``; by default the one
            that the model was prepared for; of the last two, the one whose suffix ``path`` has.
        example_kwargs: keyword arguments of that call.
        dynamic_shapes: axes of any size, as :func:`export_onnx` takes them. ExecuTorch plans memory for the largest:
            give each ``torch.export.Dim`` a ``max``. It flattens no axis of any size in XNNPACK, and averages over
            whole images of any size have no integer form. None for LiteRT, whose files are of fixed sizes.

    Warns:
        UserWarning: operators run outside of XNNPACK, by name; or as :func:`export_onnx` does.

    Raises:
        ImportError: onnx and onnxscript, executorch or ai-edge-litert are not installed; the message says
            which extra has them.
        TypeError: the model is neither prepared nor converted, or an argument is not of its type or does not fit the
            model's forward.
        ValueError: an unknown target, one whose grids or arithmetic are not the model's, an example that does not run
            through the model, or axes of any size for LiteRT.
        RuntimeError: the model has seen no data.
        NotExportableError: an operation has no form in the engine (a RuntimeError).
        OSError: the path cannot be written.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        ...                    QATConfig.for_target("executorch"), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> export(prepared, (torch.randn(1, 4),), "model.pte")  # doctest: +SKIP
    """
    check_arguments(model, example_inputs, example_kwargs, target, None, path)
    converted, engine = converted_for(model, target, None, path)
    if TARGETS[engine].file_format == "onnx":
        export_onnx(
            converted, example_inputs, path, engine, example_kwargs=example_kwargs, dynamic_shapes=dynamic_shapes
        )
        return
    if dynamic_shapes is not None and not TARGETS[engine].has_dynamic_shapes:
        raise ValueError(f"dynamic_shapes must be None for {engine!r}, whose files are of fixed sizes")
    check_ratios(converted)
    conventions = TARGETS[engine].conventions
    program, _ = program_of(converted, example_inputs, example_kwargs, conventions, False, dynamic_shapes)
    _WRITERS[TARGETS[engine].file_format](program, path)


def export_program(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    target: str | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
) -> torch.export.ExportedProgram:
    """The model as a program of PyTorch's own operators, for engines that this library has no writer for.

    Operations are on floats between the ``quantized_decomposed`` operators that PyTorch's exporters agree on: weights
    are int8 tensors with a scale for each channel, biases int32, and scales and zero points of activations numbers.
    Run by PyTorch, the program simulates in floats: now and then a code is one step from the converted model's.

    Args:
        model, example_inputs, target, example_kwargs: as of :func:`export`.
        dynamic_shapes: axes of any size, as :func:`export_onnx` takes them; without, batches are.

    Raises:
        TypeError, ValueError, RuntimeError, NotExportableError: as :func:`export`.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(quantize_last_linear=True), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> program = export_program(prepared, (torch.randn(2, 4),))
        >>> program.module()(torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """
    check_arguments(model, example_inputs, example_kwargs, target, None, None)
    converted, engine = converted_for(model, target, None)
    conventions = TARGETS[engine].conventions
    if conventions.exact:
        conventions = type(conventions)()
    program, _ = program_of(
        converted, example_inputs, example_kwargs, conventions, dynamic_shapes is None, dynamic_shapes
    )
    lower_to_decomposed(program)
    return program
