"""Session options and providers that no file can be run with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mlframework.quantization import compare_outputs, verify


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"session_options": {}}, TypeError, r"session_options must be onnxruntime\.SessionOptions, got dict"),
        ({"providers": "CPUExecutionProvider"}, TypeError, "providers must be a list of execution providers, got 'CPU"),
        ({"providers": 3}, TypeError, "providers must be a list of execution providers, got 3"),
        ({"providers": [3]}, TypeError, "providers must hold names, or tuples of a name and its options, got 3"),
        ({"providers": ["cpu"]}, ValueError, r"providers must be available .*CPUExecutionProvider.*, got 'cpu'"),
        ({"path": None, "providers": ["cpu"]}, ValueError, "need a file to run, got path=None"),
        ({"path": None, "session_options": {}}, ValueError, "need a file to run, got path=None"),
    ],
)
@pytest.mark.parametrize("run", [compare_outputs, verify])
def test_bad_arguments_are_refused_first(
    run: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def batches() -> Iterator[torch.Tensor]:
        raise AssertionError("ran")
        yield

    with pytest.raises(error, match=message):
        run(nn.Linear(4, 2), batches(), **{"path": "missing.onnx", **arguments})
