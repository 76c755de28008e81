"""The file on disk: written whole or not at all."""

from __future__ import annotations

import os
from typing import Any

from ..replaced_file import replaced_file

_LARGEST = 2**31 - 1  # what a protocol buffer holds


def check_writable(path: Any) -> None:
    """Refuses a path that no file can be written to, before there is anything to write.

    Raises:
        TypeError: it is no path.
        OSError: its folder does not exist or may not be written to, or it is a folder itself.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(f"path must be that of a file, got the folder {os.fspath(path)!r}")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path must be in a folder that exists, got {os.fspath(path)!r}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"path must be in a folder that may be written to, got {os.fspath(path)!r}")


def check_size(model: Any) -> None:
    """Refuses an ``onnx.ModelProto`` that no file holds.

    Raises:
        ValueError: it is larger than one file can be.
    """
    if model.ByteSize() > _LARGEST:
        raise ValueError(f"model must fit one ONNX file of 2 GiB, got {model.ByteSize()} bytes")


def write_atomically(model: Any, path: str | os.PathLike[str]) -> None:
    """Writes an ``onnx.ModelProto`` beside ``path`` and moves it there; a link's target is written.

    Raises:
        ValueError: the model is larger than one file can be.
        OSError: writing fails; what was at ``path`` is as before.
    """
    check_size(model)
    with replaced_file(path) as file:
        file.write(model.SerializeToString())
