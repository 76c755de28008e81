"""The kernels for GPUs in Triton's interpreter, which every test here runs in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlframework.quantization.kernels.triton_gpu.availability import is_interpreter


@pytest.fixture(autouse=True)
def _rounds_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU rounds float32 to bfloat16 half to even; the interpreter of Triton 3.6 cuts the digits off."""
    if not is_interpreter():
        pytest.skip("needs Triton's interpreter: triton is not installed, or there is a GPU")
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        halfway = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        nan = np.isnan(source.data)
        rounded = np.where(nan, np.uint32(0x7FC0), (bits + halfway) >> np.uint32(16)).astype(np.uint16)
        return TensorHandle(rounded, dtype.scalar)

    # The builder's methods are lambdas that look this one up.
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding)


@pytest.fixture(autouse=True)
def _floats_overflow_in_silence() -> Iterator[None]:
    """As they do on a GPU; NumPy, which the interpreter computes with, warns."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield
