"""Every kernel compiles for the GPUs that it is for: an error of types shows here, and not on the first GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlframework.quantization.kernels.triton_gpu.availability import is_installed
from mlframework.quantization.kernels.triton_gpu.registration import IMPLEMENTED

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="needs triton"),
]

TESTS = Path(__file__).parents[2]


def printed_by(program: str, *arguments: str) -> Any:
    """What a program prints in a process where Triton compiles."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, str(TESTS / "processors" / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("which", ["--some", pytest.param("all", marks=pytest.mark.long)])
def test_every_kernel_compiles(which: str) -> None:
    launched = printed_by("compile_for_gpus.py", "90,80", *([which] if which == "--some" else []))
    assert set(launched) == {name for operators in IMPLEMENTED.values() for name in operators}
    assert all(launched.values())


@pytest.mark.long
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_tile_compiles_and_fits(capability: str) -> None:
    """Those of large layers, which no sample is."""
    from mlframework.quantization.kernels.triton_gpu import products

    used = printed_by("compile_for_gpus.py", capability, "--tiles")
    assert len(used) == 3 * len(products._CONFIGURATIONS)
    assert max(used) <= {"80": 163, "90": 227}[capability] * 1024, "shared memory of a block on that GPU"


def test_what_no_kernel_may_do_is_found() -> None:
    found = printed_by("wrong_kernels.py")
    assert found.pop("right") is None
    assert "contracts" in found.pop("contracted")
    assert set(found) == {"short", "extended_too_late", "short_in_a_loop"}
    assert all("32 bits" in message for message in found.values())
