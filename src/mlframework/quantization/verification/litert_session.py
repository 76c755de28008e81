"""An exported file in LiteRT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..export.litert.package import import_interpreter
from .exported_outputs import ExportedOutputs, run_in_parts, tensors_of

_IDENTIFIER = slice(4, 8)  # of a flat buffer


class LiteRTSession:
    """Runs a ``.tflite`` file that :func:`export` wrote. XNNPACK does not show what lies between layers.

    Args:
        path: the file.

    Raises:
        ImportError: ai-edge-litert is not installed.
        ValueError: LiteRT does not load the file.
    """

    engine: ClassVar = "LiteRT"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        interpreter = import_interpreter()
        try:
            self._interpreter = interpreter(os.fspath(path))
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"path must be a model that LiteRT loads, got {os.fspath(path)!r}: {error}") from error
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedOutputs:
        """Runs the file on the arguments of a call of ``model``, a part of the batch at a time where it takes fewer.

        Raises:
            ValueError: it takes other shapes.
        """
        values: list[Any] = [value.detach().cpu() for value in tensors_of(model, args, kwargs)]
        shapes = [tuple(map(int, details["shape"])) for details in self._inputs]
        return ExportedOutputs({}, run_in_parts(self._execute, values, shapes))

    def _execute(self, values: Sequence[Tensor]) -> list[Tensor]:
        if len(values) != len(self._inputs):
            raise RuntimeError(f"it takes {len(self._inputs)} tensors")
        try:
            for details, value in zip(self._inputs, values, strict=True):
                self._interpreter.set_tensor(details["index"], value.numpy())
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        self._interpreter.invoke()
        # Of no axes they are NumPy's scalars.
        return [torch.as_tensor(self._interpreter.get_tensor(details["index"])) for details in self._outputs]


def is_litert_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is LiteRT's.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        return file.read(8)[_IDENTIFIER] == b"TFL3"
