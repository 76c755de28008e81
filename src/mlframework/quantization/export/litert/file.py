"""The file itself: made, tried in LiteRT, and put in its place."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ...replaced_file import replaced_file
from ..program import NotExportableError
from ..qdq_program import lower_to_decomposed
from ..xnnpack_passes import divide_what_is_quantized, keep_grids_apart
from .package import import_interpreter
from .program_file import file_of

_DELEGATE = "DELEGATE"
# What LiteRT's own kernels compute on codes as XNNPACK does: they move, compare or convert.
_EXACT = {
    "BROADCAST_TO",
    "CAST",
    "CONCATENATION",
    "GATHER",
    "MAXIMUM",
    "MAX_POOL_2D",
    "MINIMUM",
    "MIRROR_PAD",
    "PAD",
    "PADV2",
    "QUANTIZE",
    "RELU",
    "RESHAPE",
    "RESIZE_NEAREST_NEIGHBOR",
    "SLICE",
    "STRIDED_SLICE",
    "TRANSPOSE",
}


def write_litert(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Writes a program as a ``.tflite`` file beside ``path``, then moves it there.

    Args:
        program: of this library's operators, for fixed sizes; it changes.
        path: the file.

    Warns:
        UserWarning: LiteRT's own kernels run operators that XNNPACK does not take, slower.

    Raises:
        ImportError: ai-edge-litert is not installed.
        NotExportableError: LiteRT has no form of an operator, or a layer would be computed in floats or by kernels of
            other integers.
        OSError: writing fails; what was at ``path`` is as before.
    """
    lower_to_decomposed(program)
    keep_grids_apart(program)
    divide_what_is_quantized(program)
    with torch.no_grad():
        buffer, origins = file_of(program)
    outside = list(_outside(_loaded(buffer, origins), origins))
    others = [origin for origin, name, on_codes in outside if on_codes and name not in _EXACT]
    if others:
        raise NotExportableError(f"XNNPACK does not take {'; '.join(others)}: LiteRT's own kernels round otherwise")
    slow = [origin for origin, name, _ in outside if name not in _EXACT]
    if slow:
        warnings.warn(
            "outside of XNNPACK, by LiteRT's own kernels, run " + "; ".join(dict.fromkeys(slow)), stacklevel=3
        )
    with replaced_file(path) as file:
        file.write(buffer)


def _loaded(buffer: bytes, origins: list[str]) -> Any:
    interpreter = import_interpreter()(model_content=buffer)
    try:
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        found = re.search(r"Node number (\d+) \(", str(error))
        place = f"{origins[int(found[1])]}: " if found is not None and int(found[1]) < len(origins) else ""
        raise NotExportableError(f"LiteRT does not load the model that was made for it: {place}{error}") from error
    return interpreter


def _outside(interpreter: Any, origins: list[str]) -> Iterator[tuple[str, str, bool]]:
    """The operators that the delegate does not run: what they are made from, their names, whether they make codes.

    The interpreter lists operators beside the delegates that run some of them; what a delegate gives, no operator
    computes.
    """
    operators = interpreter._get_ops_details()
    makers = {output: details for details in operators for output in details["outputs"]}  # delegates come last
    pending = [details["index"] for details in interpreter.get_output_details()]
    seen = set()
    while pending:
        maker = makers.get(pending.pop())
        if maker is None or maker["index"] in seen:
            continue
        seen.add(maker["index"])
        pending.extend(maker["inputs"])
        if maker["op_name"] != _DELEGATE:
            yield (
                origins[maker["index"]],
                maker["op_name"],
                any(kind.__name__ == "int8" for kind in maker["result_types"]),
            )
