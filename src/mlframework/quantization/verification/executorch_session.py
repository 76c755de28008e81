"""An exported file in ExecuTorch."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..export.executorch_package import import_runtime
from .exported_outputs import ExportedOutputs, tensors_of

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
        meta = self._method.metadata
        self._shapes = [tuple(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())]

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedOutputs:
        """Runs the file on the arguments of a call of ``model``, a part of the batch at a time.

        Raises:
            ValueError: it takes other shapes.
        """
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors_of(model, args, kwargs)]
        parts = _in_parts(tensors, self._shapes)
        if parts is None:
            raise ValueError(
                f"batches must have the shapes that the file at path takes, {self._shapes}, or more of them along the "
                f"first axis, got {[tuple(tensor.shape) for tensor in tensors]}"
            )
        # What it returns lies in memory that the next call writes to.
        results = [[value.clone() for value in self._method.execute(part)] for part in parts]
        return ExportedOutputs({}, list(map(torch.cat, zip(*results, strict=True))) if len(parts) > 1 else results[0])


def is_executorch_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is ExecuTorch's.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        return file.read(8)[_IDENTIFIER] == b"ET"


def _in_parts(tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[list[Tensor]] | None:
    """The tensors in parts of the shapes that are taken; None where they have others."""
    found = [tuple(tensor.shape) for tensor in tensors]
    if found == shapes:
        return [tensors]
    pairs = list(zip(found, shapes, strict=False))
    if len(found) != len(shapes) or not all(one and other and one[1:] == other[1:] for one, other in pairs):
        return None
    counts = {divmod(one[0], other[0]) for one, other in pairs}
    if len(counts) != 1 or next(iter(counts))[1] or not next(iter(counts))[0]:
        return None
    split = [torch.split(tensor, shape[0]) for tensor, shape in zip(tensors, shapes, strict=True)]
    return [list(part) for part in zip(*split, strict=True)]
