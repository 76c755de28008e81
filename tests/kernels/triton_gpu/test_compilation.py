"""Every kernel compiles for the GPUs that it is for: an error of types shows here, and not on the first GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlframework.quantization.kernels.triton_gpu.availability import is_installed

pytestmark = [pytest.mark.interpreter, pytest.mark.slow]

TESTS = Path(__file__).parents[2]


@pytest.mark.skipif(not is_installed(), reason="needs triton")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_all_samples_compile(capability: str) -> None:
    program = TESTS / "processors" / "compile_for_gpus.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, str(program), capability], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert {"_fake_quantize", "_mask_gradient"} <= set(compiled)
