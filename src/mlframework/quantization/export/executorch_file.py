"""From a QDQ program to a file for ExecuTorch, through its XNNPACK delegate."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator

import torch
from torch import fx

from ..replaced_file import replaced_file
from .executorch_package import import_lowering, import_runtime, quiet_executorch
from .program import NotExportableError
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
    lowering, partitioner = import_lowering()
    lower_to_decomposed(program)
    fold_biases(program)
    divide_what_is_quantized(program)
    with torch.no_grad(), quiet_executorch():
        try:
            edge = lowering(program, partitioner=[partitioner()])
            outside = list(_outside(edge.exported_program()))
            in_floats = [node for node in outside if _LAYERS.search(str(node.target))]
            buffer = None if in_floats else edge.to_executorch().buffer
        except Exception as error:  # whatever it is, it came from an operation
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise NotExportableError(f"ExecuTorch has no form of an operation: {reason}") from error
    if buffer is None:
        layers = "; ".join(map(_place_of, in_floats))
        raise NotExportableError(f"XNNPACK has no integer form of {layers}, which would be computed in floats")
    _check_that_it_loads(buffer)
    if outside:
        warnings.warn(
            "outside of XNNPACK, on floats and slowly, run " + "; ".join(dict.fromkeys(map(_place_of, outside))),
            stacklevel=3,
        )
    with replaced_file(path) as file:
        file.write(buffer)


def _check_that_it_loads(buffer: bytes) -> None:
    """XNNPACK refuses what it has no kernel for only when a program is loaded."""
    runtime = import_runtime()
    try:
        program = runtime.get().load_program(buffer)
        program.load_method("forward")
    except RuntimeError as error:
        raise NotExportableError(f"XNNPACK refuses the program (the log says what of it): {error}") from error


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
    return f"{_name_of(node)} in {owners[-1] if owners else 'the model'}{line}"


def _name_of(node: fx.Node) -> str:
    """An operator's name without the schema that ExecuTorch's have in theirs."""
    return re.sub(r"^<EdgeOpOverload: (\S+)>.*", r"\1", str(node.target))
