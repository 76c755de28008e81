"""From an exported program to an ONNX graph, through ``torch.onnx``."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .decompositions import decompose_if_needed
from .optimization import (
    with_kept_decompositions,
    with_kept_translations,
    with_operators_found_once,
    without_slow_rules,
)
from .program import NotExportableError, quiet
from .qdq_operators import translations

if TYPE_CHECKING:
    import onnx_ir as ir

# The operators' version that is written by default: torch.onnx's own, and the first with Gelu.
OPSET = 20

# Those that can be written: torch.onnx writes quantize nodes as of 19.
OPSETS = range(19, 24)

# What the oldest ONNX Runtime that is supported (1.20) reads, and every newer one; no operator here needs a newer one.
_IR_VERSION = 10


def check_opset(version: Any) -> None:
    """Refuses a version of the operators that is not written.

    Raises:
        TypeError: it is not an int.
        ValueError: there are no files of it, or the installed onnx does not know it.
    """
    if isinstance(version, bool) or not isinstance(version, int):
        raise TypeError(f"opset_version must be an int or None, got {version!r}")
    if version not in OPSETS:
        raise ValueError(f"opset_version must be from {OPSETS.start} to {OPSETS.stop - 1}, got {version}")
    from onnx import defs

    if version > defs.onnx_opset_version():
        raise ValueError(
            f"opset_version must be one that the installed onnx has, up to {defs.onnx_opset_version()}, got {version}"
        )


def onnx_model(
    program: torch.export.ExportedProgram,
    input_names: Sequence[str],
    output_names: Sequence[str],
    axis_names: Mapping[str, str] | None = None,
    opset: int = OPSET,
) -> ir.Model:
    """A program's model, as torch.onnx holds it.

    Args:
        program: what to write; it may change.
        input_names, output_names: what to call the tensors that go in and come out.
        axis_names: what to call the sizes that the program has symbols for; all of them "batch" by default.
        opset: the version of the operators.

    Raises:
        NotExportableError: an operation has no ONNX counterpart.
    """
    shapes = _shapes(program) if axis_names is not None else []
    with torch.no_grad(), quiet():
        decompose_if_needed(program)
        try:
            with (
                without_slow_rules(),
                with_kept_translations(),
                with_kept_decompositions(),
                with_operators_found_once(),
            ):
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=opset,
                    custom_translation_table=translations(),
                    input_names=input_names,
                    output_names=output_names,
                    verbose=False,
                )
        except Exception as error:  # whatever it is, it came from an operation
            raise NotExportableError(_untranslated(error)) from error
    assert exported is not None
    model = exported.model
    model.ir_version = min(model.ir_version, _IR_VERSION)
    _check_axes(model.graph, shapes)
    _name_axes(model.graph, axis_names)
    return model


def _shapes(program: torch.export.ExportedProgram) -> list[list[int | None]]:
    """Of every tensor that goes in or comes out; None for sizes that are open."""
    signature = program.graph_signature
    names = [*signature.user_inputs, *signature.user_outputs]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    tensors = [values[name] for name in names if isinstance(name, str) and isinstance(values.get(name), torch.Tensor)]
    return [[size if isinstance(size, int) else None for size in tensor.shape] for tensor in tensors]


def _check_axes(graph: ir.Graph, shapes: list[list[int | None]]) -> None:
    """Refuses a graph in which torch.onnx has fixed what was open, or opened what was fixed."""
    for value, shape in zip([*graph.inputs, *graph.outputs], shapes, strict=False):
        written = [axis if isinstance(axis, int) else None for axis in value.shape or ()]
        if written != shape:
            raise NotExportableError(
                f"torch.onnx does not write the model for open sizes: {value.name!r} should be {shape}, is {written}"
            )


def _untranslated(error: BaseException) -> str:
    """Which operation has no counterpart, and whose it is."""
    for cause in _causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node):  # the one that torch.onnx was at
                owners = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
                return f"{owners[-1] if owners else 'the model'} calls {node.target}, which has no ONNX counterpart"
    return f"an operation has no ONNX counterpart: {error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _name_axes(graph: ir.Graph, names: Mapping[str, str] | None) -> None:
    """Gives sizes names, where torch.onnx has symbols with numbers."""
    from onnx_ir import Shape

    shapes = {value: value.shape for value in (*graph.inputs, *graph.outputs) if value.shape is not None}
    if names is None:
        symbols = [axis.value for shape in shapes.values() for axis in shape if not isinstance(axis, int)]
        names = {symbol: "batch" for symbol in symbols if symbol is not None and symbol.isidentifier()}
    for value, shape in shapes.items():
        value.shape = Shape(axis if isinstance(axis, int) else _named(axis.value, names) for axis in shape)


def _named(size: str | None, names: Mapping[str, str]) -> str | None:
    """A size that is a symbol, or an expression of symbols."""
    return size and re.sub(r"\w+", lambda match: names.get(match[0], match[0]), size)
