"""The mark that compilers look for."""

from __future__ import annotations

import torch

from mlframework.quantization import kernels


def test_functions_are_marked_as_pytorch_marks_them() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(kernels.constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs))
    assert vars(ours)
