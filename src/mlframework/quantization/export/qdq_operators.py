"""The operators of an exported file that PyTorch has none for, as operators that ``torch.export`` can trace.

They have shapes and dtypes and no kernels: a model that is to be exported calls them, and is never run. Each stands
for one ONNX operator; :func:`translations` tells ``torch.onnx`` which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The axis of scales and zero points that hold for a whole tensor.
PER_TENSOR = -1

_NAMESPACE = "mlframework_quantization"
_operators: Any = getattr(torch.ops, _NAMESPACE)


def _define(name: str, signature: str, shape_and_dtype: Callable[..., Tensor]) -> None:
    torch.library.define(f"{_NAMESPACE}::{name}", f"{signature} -> Tensor")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", shape_and_dtype)


def _gemm_shape(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Says so to torch.export where a size that is to be open makes up the features.
    torch._check(input.shape[1] == weight.shape[1])  # type: ignore[no-untyped-call]
    return input.new_empty(input.shape[0], weight.shape[0])


_define(
    "quantize",
    "(Tensor input, Tensor scale, Tensor zero_point, int axis)",
    lambda input, scale, zero_point, axis: torch.empty_like(input, dtype=zero_point.dtype),
)
_define(
    "dequantize",
    "(Tensor codes, Tensor scale, Tensor zero_point, int axis)",
    lambda codes, scale, zero_point, axis: torch.empty_like(codes, dtype=torch.float32),
)
_define(
    "dequantize_bias",
    "(Tensor codes, Tensor scale)",
    lambda codes, scale: torch.empty_like(codes, dtype=torch.float32),
)
_define(
    "gemm",
    "(Tensor input, Tensor weight, Tensor bias)",
    _gemm_shape,
)
_define(
    "global_average_pool",
    "(Tensor input)",
    lambda input: input.new_empty(*input.shape[:2], *[1] * (input.dim() - 2)),
)
_define(
    "clip_codes",
    "(Tensor codes, Tensor lowest, Tensor highest)",
    lambda codes, lowest, highest: torch.empty_like(codes),
)
_define(
    "pad_codes",
    "(Tensor codes, Tensor zero_point, int[] before, int[] after, str mode)",
    lambda codes, zero_point, before, after, mode: codes.new_empty(
        [size + low + high for size, low, high in zip(codes.shape, before, after, strict=True)]
    ),
)
_define(
    "look_up",
    "(Tensor codes, Tensor table)",
    lambda codes, table: torch.empty_like(codes, dtype=table.dtype),
)


def quantize(input: Tensor, scale: Tensor, zero_point: Tensor, axis: int = PER_TENSOR) -> Tensor:
    """float32 values to codes of the dtype of ``zero_point``; ``QuantizeLinear``."""
    return _operators.quantize(input, scale, zero_point, axis)  # type: ignore[no-any-return]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int = PER_TENSOR) -> Tensor:
    """Codes to float32 values; ``DequantizeLinear``."""
    return _operators.dequantize(codes, scale, zero_point, axis)  # type: ignore[no-any-return]


def dequantize_bias(codes: Tensor, scale: Tensor) -> Tensor:
    """int32 codes (O,), which have no zero point, to float32 values; ``DequantizeLinear``."""
    return _operators.dequantize_bias(codes, scale)  # type: ignore[no-any-return]


def gemm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, I) times the transposed (O, I), plus (O,); ``Gemm``, of which engines have an integer form with a bias."""
    return _operators.gemm(input, weight, bias)  # type: ignore[no-any-return]


def global_average_pool(input: Tensor) -> Tensor:
    """(N, C, *size) to (N, C, 1, ...); ``GlobalAveragePool``, where torch.onnx writes ``ReduceMean``."""
    return _operators.global_average_pool(input)  # type: ignore[no-any-return]


def clip_codes(codes: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Codes held between two codes of their dtype (rank 0); ``Clip`` of integers."""
    return _operators.clip_codes(codes, lowest, highest)  # type: ignore[no-any-return]


def pad_codes(codes: Tensor, zero_point: Tensor, before: list[int], after: list[int], mode: str) -> Tensor:
    """Codes padded along every axis in a mode of ONNX, with the code of zero in the mode "constant"; ``Pad``."""
    return _operators.pad_codes(codes, zero_point, before, after, mode)  # type: ignore[no-any-return]


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """Entries of a table of 256 at codes (N,); an int8 code below zero counts from the table's end.

    ``GatherElements``: ONNX Runtime's ``Gather`` of single bytes takes five times as long.
    """
    return _operators.look_up(codes, table)  # type: ignore[no-any-return]


def translations() -> dict[Any, Callable[..., Any]]:
    """The table for ``torch.onnx.export``: what to write for each operator."""
    import onnxscript

    op: Any = onnxscript.opset20

    def axis_of(axis: int) -> dict[str, int]:
        return {} if axis == PER_TENSOR else {"axis": axis}

    def pad(codes: Any, zero_point: Any, before: Any, after: Any, mode: str) -> Any:
        pads = op.Constant(value_ints=[*before, *after])
        return op.Pad(codes, pads, zero_point, mode=mode) if mode == "constant" else op.Pad(codes, pads, mode=mode)

    functions: dict[str, Callable[..., Any]] = {
        "quantize": lambda input, scale, zero_point, axis: op.QuantizeLinear(input, scale, zero_point, **axis_of(axis)),
        "dequantize": lambda codes, scale, zero_point, axis: op.DequantizeLinear(
            codes, scale, zero_point, **axis_of(axis)
        ),
        "dequantize_bias": lambda codes, scale: op.DequantizeLinear(codes, scale, axis=0),
        "gemm": lambda input, weight, bias: op.Gemm(input, weight, bias, transB=1),
        "global_average_pool": lambda input: op.GlobalAveragePool(input),
        "clip_codes": lambda codes, lowest, highest: op.Clip(codes, lowest, highest),
        "pad_codes": pad,
        "look_up": lambda codes, table: op.GatherElements(table, op.Cast(codes, to=onnxscript.INT32.dtype)),
    }
    return {getattr(_operators, name).default: function for name, function in functions.items()}
