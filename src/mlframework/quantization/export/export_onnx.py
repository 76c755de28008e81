"""``export_onnx``: a prepared or converted model as a file for a deployment engine."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..int8.integer_module import IntegerModule
from ..int8.layers import Int8Embedding, Int8Layer
from ..int8.operations import Int8WithFloatEdges, OnGrid
from ..targets import TARGETS, Conventions
from . import engine_passes, onnx_graph
from .dynamic_shapes import symbol_names
from .file import write_atomically
from .model_program import check_arguments, converted_for, program_of
from .onnx_model import OPSET, check_opset, onnx_model
from .program import NotExportableError
from .targets import activation_schemes

_METADATA = "mlframework.quantization"


def export_onnx(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset_version: int | None = None,
) -> None:
    """Writes a model as standard ONNX: quantize and dequantize around every operation, int8 weights, int32 biases.

    For ``"onnxruntime"``, the file computes in ONNX Runtime the integers that the converted model computes here, code
    for code; for the other engines it states the same grids and weights in the form that they fuse. Batch
    normalization is folded in. The value that a quantized layer returns is called by the layer's qualified name.

    Args:
        model: from :func:`prepare`, with data seen, or from :func:`convert`; it is not changed.
        example_inputs: positional arguments of a typical call, for the shapes.
        path: the file. It is written beside and then moved into place: a failure leaves a file that was there whole.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``; by default the one that the model was
            prepared for.
        example_kwargs: keyword arguments of that call.
        dynamic_batch: the file takes batches of any size: the first axis of every tensor that is as long in the
            example as the first tensor's. Otherwise all sizes are those of the example. By default it does, unless
            there are ``dynamic_shapes``.
        dynamic_shapes: the axes of any size instead, as :func:`torch.export.export` takes them: for each tensor a dict
            from axes to ``torch.export.Dim``, in a dict by argument or a tuple. A ``Dim``'s name is the axis's in the
            file. Sizes below 2 are not tried out, as nowhere with ``torch.export``. (``Dim.AUTO`` lets the model's code
            decide: an axis that it fixes is fixed in the file, too.)
        opset_version: of ONNX's operators, 19 to 23; 20 by default. ONNX Runtime 1.20 reads files of up to 21.

    Warns:
        UserWarning: the file takes the example's batch size only, because code of the model assumes it.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: the model is neither prepared nor converted, or an argument is not of its type or does not fit the
            model's forward.
        ValueError: an unknown target, one whose grids are not the model's, an example that does not run through the
            model, axes in ``dynamic_shapes`` that there are not or that the model's code fixes (the message says which
            module's), an opset that is not written, or a model of 2 GiB and more.
        RuntimeError: the model has seen no data.
        NotExportableError: an operation has no ONNX counterpart (a RuntimeError).
        OSError: the path cannot be written.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), QATConfig(),
        ...                    (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(prepared, (torch.randn(1, 4),), os.path.join(folder, "model.onnx"))
        ...     os.listdir(folder)
        ['model.onnx']
    """
    onnx = import_onnx("export_onnx")
    check_arguments(model, example_inputs, example_kwargs, target, "onnx", path)
    if dynamic_batch is not None and not isinstance(dynamic_batch, bool):
        raise TypeError(f"dynamic_batch must be a bool, got {dynamic_batch!r}")
    if dynamic_batch and dynamic_shapes is not None:
        raise ValueError("dynamic_batch must be None or False where dynamic_shapes say which axes are of any size")
    opset = OPSET if opset_version is None else opset_version
    check_opset(opset)
    converted, target = converted_for(model, target, "onnx")
    metadata = _metadata(converted, target)
    batch = dynamic_shapes is None and dynamic_batch is not False
    conventions = TARGETS[target].conventions
    proto = qdq_model(converted, example_inputs, example_kwargs, conventions, batch, dynamic_shapes, opset)
    onnx.helper.set_model_props(proto, metadata)
    write_atomically(proto, path)


def qdq_model(
    converted: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    conventions: Conventions,
    dynamic_batch: bool,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    opset: int = OPSET,
) -> Any:
    """The ``onnx.ModelProto`` of a converted model, with quantize and dequantize nodes.

    Args:
        converted: in evaluation mode, on the CPU; it is changed.
        args, kwargs: of a typical call.
        conventions: of the engine.
        dynamic_batch, dynamic_shapes: see :func:`export_onnx`.
        opset: the version of the operators.

    Warns:
        UserWarning: the batch size is fixed, because code of the model assumes it.

    Raises:
        TypeError: the arguments do not fit the model's forward.
        ValueError: they do not run through it, or the model's code fixes an axis that is to be of any size.
        NotExportableError: an operation has no ONNX counterpart.
    """
    import onnx
    import onnx_ir

    names = [
        name
        for name, module in converted.named_modules()
        if isinstance(module, (IntegerModule, Int8WithFloatEdges, OnGrid))
    ]
    program, example = program_of(converted, args, kwargs, conventions, dynamic_batch, dynamic_shapes)
    axes = None if dynamic_shapes is None else symbol_names(program, example, dynamic_shapes)
    model = onnx_model(program, example.input_names, example.output_names, axes, opset)
    engine_passes.remove_idle_pairs(model)
    onnx_graph.name_values_after_modules(model, names)
    engine_passes.give_consumers_their_own_dequantize(model)
    engine_passes.fold_padding_into_convolutions(model)
    if conventions.exact:
        engine_passes.keep_floats_float(model, names)
    if conventions.own_nodes_for_sums:
        engine_passes.give_sums_their_own_quantize(model)
    if conventions.unsigned_concatenations:
        engine_passes.make_concatenations_unsigned(model)
    engine_passes.give_weights_their_own_initializers(model)
    onnx_graph.remove_notes(model)
    model.producer_name = "mlframework-quantization"
    model.producer_version = importlib.metadata.version("mlframework-quantization")
    proto = onnx_ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise NotExportableError(f"an operation has no valid ONNX form for its dtypes: {error}") from error
    return proto


def import_onnx(caller: str) -> Any:
    """onnx, where all is there that writing a file takes.

    Raises:
        ImportError: it is not installed; the message says who needs it.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx stands on it)
    except ImportError as error:
        raise ImportError(
            f"{caller} needs onnx and onnxscript ({error}): pip install 'mlframework-quantization[onnx]'"
        ) from error
    return onnx


def _metadata(converted: nn.Module, target: str) -> dict[str, str]:
    """What the file says of itself: the library's version, the target, and the grids in use."""
    activations = {str(scheme) for schemes in activation_schemes(converted).values() for scheme in schemes}
    weights = {
        "per channel" if module.weight_scale.numel() > 1 else "per tensor"
        for module in converted.modules()
        if isinstance(module, (Int8Layer, Int8Embedding))
    }
    schemes = {
        "activations": sorted(activations),
        "weights": [f"int8 symmetric, {extent}" for extent in sorted(weights)],
    }
    return {
        f"{_METADATA}.version": importlib.metadata.version("mlframework-quantization"),
        f"{_METADATA}.target": target,
        f"{_METADATA}.schemes": json.dumps(schemes),
    }
