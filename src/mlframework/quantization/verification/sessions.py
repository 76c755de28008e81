"""The engine that runs an exported file."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from .executorch_session import ExecuTorchSession, is_executorch_file
from .litert_session import LiteRTSession, is_litert_file
from .onnx_session import OnnxSession, Providers

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]


def session_of(
    path: str | os.PathLike[str],
    layers: Collection[str],
    options: onnxruntime.SessionOptions | None = None,
    providers: Providers | None = None,
) -> OnnxSession | ExecuTorchSession | LiteRTSession:
    """ExecuTorch and LiteRT for their own files, which their first bytes tell, and ONNX Runtime for all others.

    Args:
        path: the file.
        layers: names of the layers to see, where the engine shows them.
        options, providers: of ONNX Runtime.

    Raises:
        ImportError: the engine is not installed.
        FileNotFoundError: there is no such file.
        ValueError: options or providers for a file that ONNX Runtime does not run.
    """
    own: type[ExecuTorchSession | LiteRTSession] | None = None
    if is_executorch_file(path):
        own = ExecuTorchSession
    elif is_litert_file(path):
        own = LiteRTSession
    if own is None:
        return OnnxSession(path, layers, options, providers)
    if options is not None or providers is not None:
        raise ValueError(f"session_options and providers are ONNX Runtime's, got path={os.fspath(path)!r}")
    return own(path)
