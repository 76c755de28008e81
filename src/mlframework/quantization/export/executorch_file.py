"""From a QDQ program to a file for ExecuTorch, through its XNNPACK delegate."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..replaced_file import replaced_file
from .executorch_package import import_lowering, import_runtime, input_shapes, quiet_executorch
from .node_places import place_of
from .optimization import with_operators_found_once
from .program import NotExportableError
from .qdq_program import lower_to_decomposed
from .xnnpack_passes import divide_what_is_quantized, fold_biases, keep_grids_apart

# A product of floats outside of the delegate is a layer that was to be one of integers.
_LAYERS = re.compile(r"aten\.(convolution|addmm|linear|mm|bmm)\b")
_EDGES = re.compile(r"quantized_decomposed\.|getitem|executorch_call_delegate|sym_size|sym_constrain|_assert")


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
    keep_grids_apart(program)
    divide_what_is_quantized(program)
    bounds, sizes = dict(program.range_constraints), list(_largest_inputs(program))
    with torch.no_grad(), quiet_executorch(), with_operators_found_once():
        try:
            edge = lowering(program, partitioner=[partitioner()])
            outside = list(_outside(edge.exported_program()))
            in_floats = [node for node in outside if _is_integer_layer(node)]
            _restore_bounds(edge.exported_program(), bounds)
            buffer = None if in_floats else edge.to_executorch().buffer
        except Exception as error:  # whatever it is, it came from an operation
            raise NotExportableError(_reason(program, error)) from error
    if buffer is None:
        layers = "; ".join(map(place_of, in_floats))
        raise NotExportableError(f"XNNPACK has no integer form of {layers}, which would be computed in floats")
    _check_that_it_loads(buffer, sizes)
    if outside:
        warnings.warn(
            "outside of XNNPACK, on floats and slowly, run " + "; ".join(dict.fromkeys(map(place_of, outside))),
            stacklevel=3,
        )
    with replaced_file(path) as file:
        file.write(buffer)


def _check_that_it_loads(buffer: bytes, sizes: Sequence[tuple[float, ...] | None]) -> None:
    """XNNPACK refuses what it has no kernel for only when a program is loaded; axes have to be as long as was asked."""
    runtime = import_runtime()
    try:
        loaded = runtime.get().load_program(buffer)
        taken = input_shapes(loaded.load_method("forward"))
    except RuntimeError as error:
        raise NotExportableError(f"ExecuTorch does not load the program that it made: {error}") from error
    for index, (shape, asked) in enumerate(zip(taken, sizes, strict=True)):
        if shape and asked and any(one < other for one, other in zip(shape, asked, strict=True)):
            raise NotExportableError(
                f"ExecuTorch cut the sizes of input {index} to {shape}, of {asked} that dynamic_shapes ask for: give "
                "the axis a smaller max, or export for a fixed size"
            )


def _largest_inputs(program: torch.export.ExportedProgram) -> Iterator[tuple[float, ...] | None]:
    """The largest size of each input that a caller gives; None where it is no tensor."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name in names:
        value = nodes[name].meta["val"] if isinstance(name, str) and name in nodes else None
        yield tuple(map(_largest, value.shape)) if isinstance(value, torch.Tensor) else None


def _largest(size: int | torch.SymInt) -> float:
    if isinstance(size, int):
        return size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return float(bounds.upper) if bounds.upper.is_finite else 0.0


def _restore_bounds(program: torch.export.ExportedProgram, bounds: dict[Any, Any]) -> None:
    """What the user said of the sizes: XNNPACK's passes, which try sizes out, make them smaller."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    size.node.shape_env.var_to_range.update(bounds)
                    return


def _outside(program: torch.export.ExportedProgram) -> Iterator[fx.Node]:
    """The nodes that XNNPACK does not run, but for what quantizes the inputs and dequantizes the results."""
    for node in program.graph.nodes:
        if node.op == "call_function" and not _EDGES.search(str(node.target)):
            yield node


def _is_integer_layer(node: fx.Node) -> bool:
    """Whether a product of floats is that of a layer on integers: its weights are codes."""
    if not _LAYERS.search(str(node.target)):
        return False
    operands = node.all_input_nodes[1:]
    sources = [source for operand in operands for source in (operand, *operand.all_input_nodes)]
    return any("dequantize_per_channel" in str(source.target) for source in sources)


def _reason(program: torch.export.ExportedProgram, error: Exception) -> str:
    """Which operation has no form, and whose it is."""
    message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip("[]\"'")
    named = [node for node in program.graph.nodes if node.op == "call_function" and str(node.target) in message]
    places = "; ".join(dict.fromkeys(map(place_of, named)))
    return f"ExecuTorch has no form of {places or 'an operation'}: {message}"
