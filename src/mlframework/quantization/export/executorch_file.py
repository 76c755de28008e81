"""From a QDQ program to a file for ExecuTorch, through its XNNPACK delegate."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..replaced_file import replaced_file
from .program import NotExportableError, quiet
from .qdq_program import lower_to_decomposed
from .xnnpack_passes import divide_what_is_quantized, fold_biases

# A product of floats outside of the delegate is a layer that was to be one of integers.
_LAYERS = re.compile(r"aten\.(convolution|addmm|linear|mm|bmm)\b")
_EDGES = re.compile(r"quantized_decomposed\.|getitem|executorch_call_delegate")


def write_executorch(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Lowers a program to XNNPACK and writes it beside ``path``, then moves it there.

    Args:
        program: of this library's operators; it changes.
        path: the file.

    Warns:
        UserWarning: operators stay outside of XNNPACK, where ExecuTorch's portable kernels, which are slow, run them on
            floats.

    Raises:
        ImportError: executorch is not installed.
        NotExportableError: ExecuTorch has no form of an operator, or a layer would be computed in floats.
        OSError: writing fails; what was at ``path`` is as before.
    """
    lowering, partitioner = _import_executorch()
    lower_to_decomposed(program)
    fold_biases(program)
    divide_what_is_quantized(program)
    with torch.no_grad(), _quiet():
        try:
            edge = lowering(program, partitioner=[partitioner()])
            outside = list(_outside(edge.exported_program()))
            buffer = None if any(_LAYERS.search(str(node.target)) for node in outside) else edge.to_executorch().buffer
        except Exception as error:  # whatever it is, it came from an operation
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise NotExportableError(f"ExecuTorch has no form of an operation: {reason}") from error
    if buffer is None:
        layers = "; ".join(_place_of(node) for node in outside if _LAYERS.search(str(node.target)))
        raise NotExportableError(f"XNNPACK has no integer form of {layers}")
    if outside:
        warnings.warn(
            "outside of XNNPACK, on floats and slowly, run " + "; ".join(dict.fromkeys(map(_place_of, outside))),
            stacklevel=3,
        )
    with replaced_file(path) as file:
        file.write(buffer)


def _outside(program: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    """The nodes that XNNPACK does not run, but for what quantizes the inputs and dequantizes the results."""
    for node in program.graph.nodes:
        if node.op == "call_function" and not _EDGES.search(str(node.target)):
            yield node


def _place_of(node: fx.Node) -> str:
    """An operator, with the module that calls it and, where it is known, the line of code."""
    owners = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    line = f" ({lines[-1][0]}:{lines[-1][1]})" if lines else ""
    return f"{node.target} in {owners[-1] if owners else 'the model'}{line}"


def _import_executorch() -> tuple[Any, Any]:
    try:
        with _quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ImportError(
            f"a file for ExecuTorch needs executorch ({error}): pip install 'mlframework-quantization[executorch]'"
        ) from error
    return to_edge_transform_and_lower, XnnpackPartitioner


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what ExecuTorch and the torchao that it imports say about themselves."""
    names = ("torchao", "torch.utils._pytree", "root")
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
