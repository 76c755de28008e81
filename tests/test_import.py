"""Importing the library takes little more than importing PyTorch does."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMPILERS = ("torch._dynamo", "torch._inductor", "triton", "sympy", "onnxscript", "onnxruntime")
PARALLEL = ("torch.distributed.fsdp", "torch.distributed.tensor")
TRAINERS = ("pytorch_lightning", "lightning", "transformers", "accelerate", "tensorboard")


@pytest.mark.slow
def test_what_only_some_need_is_not_imported() -> None:
    names = (*COMPILERS, *PARALLEL, *TRAINERS)
    code = f"import sys, mlframework.quantization; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
