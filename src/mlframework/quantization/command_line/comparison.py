"""Two ONNX files on the same data: what a float file returns, and what a quantized one does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..verification.onnx_session import OnnxSession
from .files import loaded


@dataclass(frozen=True)
class OutputComparison:
    """One output of two files.

    Attributes:
        name: of the output, in the first file.
        shape: of it.
        signal_to_noise: energy of the first file's values over that of the differences, in dB; infinite where there
            are none.
        largest: the largest difference.
        agreement: the share of positions where the largest value is of the same class; None where there are no classes.
    """

    name: str
    shape: tuple[int, ...]
    signal_to_noise: float
    largest: float
    agreement: float | None


def compared(reference: Path, other: Path, arrays: Mapping[str, Any]) -> list[OutputComparison]:
    """Runs both files in ONNX Runtime as :func:`verify` does: with exact products where the processor's saturate.

    Args:
        reference, other: the files.
        arrays: for their inputs, by name; or, where the names are others, in the order of the inputs.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        FileNotFoundError: there is no such file.
        ValueError: a file is not ONNX or does not run, arrays do not fit its inputs, or outputs differ in shape.
    """
    (names, ones), (_, others) = (_results(path, arrays) for path in (reference, other))
    shapes = [[value.shape for value in values] for values in (ones, others)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"both files must return the same shapes, got {shapes[0]} and {shapes[1]}")
    return [_compared(*each) for each in zip(names, ones, others, strict=True)]


def _results(path: Path, arrays: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    loaded(path)  # for its errors
    try:
        session = OnnxSession(path, ())
        if session.saturates:
            session = session.with_exact_products()
    except ImportError:
        raise
    except Exception as error:  # of ONNX Runtime, whose errors have no common base
        raise ValueError(f"{str(path)!r} does not load in ONNX Runtime: {error}") from error
    feed = _feed(path, session.session.get_inputs(), arrays)
    try:
        return session.results, session.session.run(None, feed)
    except Exception as error:
        raise ValueError(f"{str(path)!r} does not run in ONNX Runtime on this data: {error}") from error


def _feed(path: Path, inputs: list[Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    names = [value.name for value in inputs]
    if arrays.keys() >= set(names):
        chosen = {name: arrays[name] for name in names}
    elif len(arrays) == len(names):
        chosen = dict(zip(names, arrays.values(), strict=True))
    else:
        raise ValueError(
            f"data must have an array for each input of {str(path)!r} ({', '.join(names)}), got {', '.join(arrays)}"
        )
    return {value.name: _fitting(value, chosen[value.name]) for value in inputs}


def _fitting(value: Any, array: Any) -> Any:
    """An array for an input, in its dtype."""
    import numpy as np

    expected = [size if isinstance(size, int) else None for size in value.shape]
    fits = len(expected) == array.ndim and all(
        size in (None, length) for size, length in zip(expected, array.shape, strict=True)
    )
    if not fits:
        shape = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"data must have the shape ({shape}) for the input {value.name!r}, got {array.shape}")
    dtype = _DTYPES.get(value.type)
    if dtype is None or array.dtype == dtype:
        return array
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"data must be {dtype} for the input {value.name!r}, got {array.dtype}")
    return array.astype(dtype)


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def _compared(name: str, one: Any, other: Any) -> OutputComparison:
    import numpy as np

    reference, difference = one.astype(np.float64), other.astype(np.float64) - one.astype(np.float64)
    signal, noise = float(np.square(reference).sum()), float(np.square(difference).sum())
    ratio = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    agreement = None
    if one.ndim > 1 and one.size and np.issubdtype(one.dtype, np.floating):
        axis = -1 if one.ndim == 3 else 1  # of classes: the last of text's, else the one after the batch
        agreement = float((one.argmax(axis) == other.argmax(axis)).mean())
    return OutputComparison(name, one.shape, ratio, float(np.abs(difference).max(initial=0.0)), agreement)
