"""ONNX files and arrays as they are given to the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loaded(path: Path) -> Any:
    """The ``onnx.ModelProto`` in a file.

    Raises:
        ImportError: onnx is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file.
    """
    onnx = onnx_package()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        model = onnx.load(path)
    except Exception as error:  # of protocol buffers, whose errors differ from version to version
        raise ValueError(f"{str(path)!r} is not an ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{str(path)!r} is not an ONNX file: it has no graph")
    return model


def onnx_package() -> Any:
    """onnx, where ONNX Runtime is there as well.

    Raises:
        ImportError: one of them is not installed; the message says how to install it.
    """
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"this command needs onnx and onnxruntime ({error}): pip install 'mlframework-quantization[cli]'"
        ) from error
    return onnx


def arrays_in(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an .npz file, or has no arrays.
    """
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file.items())
    except Exception as error:  # of archives, of arrays, or of what is no such thing
        raise ValueError(f"{str(path)!r} must be an .npz file of arrays: {error}") from error
    if not arrays:
        raise ValueError(f"{str(path)!r} must be an .npz file of arrays, got one without any")
    return arrays
