"""An exported file in ExecuTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..export.executorch_package import import_runtime, input_shapes
from .exported_outputs import ExportedOutputs, leaves_of

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
        found = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        parts = _in_parts(values, self._shapes)
        if parts is None:  # of the file's shape, or of a smaller one that it may take as well
            try:
                return ExportedOutputs({}, self._execute(values))
            except RuntimeError as error:
                raise ValueError(
                    f"batches must have the shapes that the file at path takes, {self._shapes}, or more of them along "
                    f"the first axis, got {found}: {error}"
                ) from error
        results = list(map(self._execute, parts))
        length = next(value.shape[0] for value in parts[0] if isinstance(value, Tensor))
        if any(value.dim() == 0 or value.shape[0] != length for result in results for value in result):
            raise ValueError(
                f"batches must have the shapes that the file at path takes, {self._shapes}, since its results have no "
                f"batch to be put together from parts along, got {found}"
            )
        return ExportedOutputs({}, list(map(torch.cat, zip(*results, strict=True))))

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


def _in_parts(values: list[Any], shapes: list[tuple[int, ...] | None]) -> list[list[Any]] | None:
    """The values in parts of the shapes that are taken; None where they have others."""
    if len(values) != len(shapes):
        return None
    counts = set()
    for value, shape in zip(values, shapes, strict=True):
        if shape is None:
            continue
        found = tuple(value.shape) if isinstance(value, Tensor) else ()
        if not shape or not found or found[1:] != shape[1:]:
            return None
        counts.add(divmod(found[0], shape[0]))
    if len(counts) != 1:
        return None
    ((count, rest),) = counts
    if rest or count < 2:
        return None
    split = [
        [value] * count if shape is None else list(value.split(shape[0]))
        for value, shape in zip(values, shapes, strict=True)
    ]
    return [list(part) for part in zip(*split, strict=True)]
