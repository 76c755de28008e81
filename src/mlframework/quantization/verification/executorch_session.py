"""An exported file in ExecuTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..export.executorch_package import import_runtime, input_shapes
from .exported_outputs import ExportedOutputs, leaves_of, run_in_parts

_IDENTIFIER = slice(4, 6)  # of a flat buffer; two digits of a version follow


class ExecuTorchSession:
    """Runs a ``.pte`` file that :func:`export` wrote. ExecuTorch does not show what lies between layers.

    Args:
        path: the file.

    Raises:
        ImportError: executorch is not installed.
        ValueError: ExecuTorch does not load the file.
    """

    engine: ClassVar = "ExecuTorch"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        runtime = import_runtime().get()
        try:
            self._program = runtime.load_program(os.fspath(path))  # which has to live as long as its methods
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise ValueError(
                f"path must be a program that ExecuTorch loads, got {os.fspath(path)!r}: {error}"
            ) from error
        self._shapes = input_shapes(self._method)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedOutputs:
        """Runs the file on the arguments of a call of ``model``, a part of the batch at a time where it takes fewer.

        Raises:
            ValueError: it takes other shapes.
        """
        values = [_as_read(leaf) for leaf in leaves_of(model, args, kwargs)]
        return ExportedOutputs({}, run_in_parts(self._execute, values, self._shapes))

    def _execute(self, values: Sequence[Any]) -> list[Tensor]:
        # What it returns lies in memory that the next call writes to.
        return [value.clone() for value in self._method.execute(values) if isinstance(value, Tensor)]


def is_executorch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is ExecuTorch's.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        return file.read(8)[_IDENTIFIER] == b"ET"


def _as_read(value: Any) -> Any:
    return value.detach().cpu().contiguous() if isinstance(value, Tensor) else value
