"""LiteRT, imported where it is needed."""

from __future__ import annotations

from typing import Any

from ..engine_extra import needs_extra


def import_schema() -> Any:
    """The classes of the flat buffers that a ``.tflite`` file consists of.

    Raises:
        ImportError: ai-edge-litert is not installed; the message says which extra has it.
    """
    with needs_extra("LiteRT", "ai-edge-litert", "litert"):
        from ai_edge_litert import schema_py_generated
    return schema_py_generated


def import_builder() -> Any:
    """The class that builds flat buffers.

    Raises:
        ImportError: flatbuffers, which ai-edge-litert brings, is not installed.
    """
    with needs_extra("LiteRT", "ai-edge-litert", "litert"):
        from flatbuffers import Builder  # type: ignore[import-untyped]
    return Builder


def import_interpreter() -> Any:
    """The class of LiteRT's interpreter.

    Raises:
        ImportError: ai-edge-litert is not installed; the message says which extra has it.
    """
    with needs_extra("LiteRT", "ai-edge-litert", "litert"):
        from ai_edge_litert.interpreter import Interpreter
    return Interpreter
