"""``export_encodings``: a float file and the grids of its tensors, for converters that quantize by themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..replaced_file import replaced_file
from ..targets import Conventions
from .encodings import check_version, document
from .export_onnx import import_onnx, qdq_model
from .file import check_size, check_writable
from .float_form import float_form
from .model_program import check_arguments, converted_for

_SUFFIX = ".encodings"


def export_encodings(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    version: str = "1.0.0",
    example_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as float ONNX, and beside it the grid of every quantized tensor in AIMET's format of encodings.

    Qualcomm's converters take both, and quantize by them instead of by data of their own::

        qairt-converter --input_network model.onnx --quantization_overrides model.encodings

    The float file has no quantize and dequantize nodes. Its weights are those of the converted model as float32 values,
    with batch normalization folded into them. There are encodings for inputs, for what layers and operations return
    (after their activation), for weights (int8, per channel) and for biases (int32). Codes of fewer than 8 bits have
    the encoding of the 8 bits that they are stored in: the same values.

    Args:
        model: from :func:`prepare`, with data seen and for any target, or from :func:`convert`; it is not changed. The
            grids that Qualcomm's accelerators have are those of the default target.
        example_inputs: positional arguments of a call. The file takes their sizes, and no others.
        path: of the ONNX file. The encodings are beside it, with the suffix ``.encodings`` in place of its own. Both
            are written before either is moved into place.
        version: of the format: ``"1.0.0"``, with offsets, which ``qnn-onnx-converter`` reads; or ``"2.0.0"``, with zero
            points, which is for ``qairt-converter``.
        example_kwargs: keyword arguments of that call.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: the model is neither prepared nor converted, or an argument is not of its type or does not fit the
            model's forward.
        ValueError: a version that is not written, a model with the grids of no target, a path with the encodings' own
            suffix, an example that does not run through the model, a model of 2 GiB and more, or activations with a
            grid per channel in version 1.0.0.
        RuntimeError: the model has seen no data.
        NotExportableError: an operation has no ONNX counterpart (a RuntimeError).
        OSError: the path cannot be written.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), QATConfig(),
        ...                    (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> import json, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_encodings(prepared, (torch.randn(1, 4),), os.path.join(folder, "model.onnx"))
        ...     with open(os.path.join(folder, "model.encodings")) as file:
        ...         encodings = json.load(file)
        >>> [entry["name"] for entry in encodings["activation_encodings"]]
        ['input', '0']
        >>> [(entry["name"], entry["bw"]) for entry in encodings["param_encodings"]]
        [('0.weight', 8), ('0.bias', 32), ('2.weight', 8), ('2.bias', 32)]
    """
    import_onnx("export_encodings")
    check_version(version)
    check_arguments(model, example_inputs, example_kwargs, None, None, path)
    check_writable(encodings_path(path))
    converted, _ = converted_for(model, None, None)
    # Operations on floats throughout: what ONNX Runtime would have as operations on codes has no float form.
    quantized = qdq_model(converted, example_inputs, example_kwargs, Conventions(), dynamic_batch=False)
    write_encodings(quantized, path, version)


def encodings_path(path: str | os.PathLike[str]) -> str:
    """Where the encodings of an ONNX file are.

    Raises:
        TypeError: it is no path.
        ValueError: the file itself would be there.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    stem, suffix = os.path.splitext(os.fspath(path))
    if suffix == _SUFFIX:
        raise ValueError(f"path must be that of the ONNX file, got {os.fspath(path)!r} with the encodings' suffix")
    return stem + _SUFFIX


def write_encodings(model: Any, path: str | os.PathLike[str], version: str) -> None:
    """Writes the float form of an ``onnx.ModelProto`` with quantize and dequantize nodes, and its encodings beside it.

    Raises:
        ValueError: the model has no float form, or one that is larger than a file can be; activations have a grid per
            channel, and the version has not.
        OSError: writing fails; what was at the two paths is as before.
    """
    float_model, encodings = float_form(model)
    text = json.dumps(document(encodings, version), indent=2)
    check_size(float_model)
    with replaced_file(path) as file:
        file.write(float_model.SerializeToString())
        file.flush()
        os.fsync(file.fileno())
        with replaced_file(encodings_path(path)) as other:
            other.write(text.encode())
