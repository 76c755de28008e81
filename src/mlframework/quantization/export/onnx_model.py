"""From an exported program to an ONNX graph, through ``torch.onnx``."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .decompositions import decompose_if_needed
from .optimization import with_kept_translations, without_slow_rules
from .program import NotExportableError, quiet
from .qdq_operators import translations

# The operators' version that is written: torch.onnx's own, and the first with Gelu.
OPSET = 20


def onnx_model(program: torch.export.ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> Any:
    """The ``onnx.ModelProto`` of a program.

    Args:
        program: what to write; it may change.
        input_names, output_names: what to call the tensors that go in and come out.

    Raises:
        NotExportableError: an operation has no ONNX counterpart.
    """
    with torch.no_grad(), quiet():
        decompose_if_needed(program)
        try:
            with without_slow_rules(), with_kept_translations():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    custom_translation_table=translations(),
                    input_names=input_names,
                    output_names=output_names,
                    verbose=False,
                )
        except Exception as error:  # whatever it is, it came from an operation
            raise NotExportableError(_untranslated(error)) from error
    assert exported is not None
    proto = exported.model_proto
    _name_batch_axis(proto.graph)
    return proto


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


def _name_batch_axis(graph: Any) -> None:
    """Calls the one axis of no fixed size "batch", where torch.onnx has a number."""
    values = [*graph.input, *graph.output]
    axes = [axis for value in values for axis in value.type.tensor_type.shape.dim if axis.dim_param]
    symbols = {axis.dim_param for axis in axes if axis.dim_param.isidentifier()}
    for axis in axes:
        for symbol in symbols:
            axis.dim_param = re.sub(rf"\b{symbol}\b", "batch", axis.dim_param)
