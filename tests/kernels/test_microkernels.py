"""Microkernels of every instruction set, without PyTorch: on this processor, and on emulated ones.

``tests/processors/test_microkernels.cpp`` compares each with sums in int64; here it is built and run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from mlframework.quantization import kernels
from mlframework.quantization.kernels import native

pytestmark = pytest.mark.slow

KERNELS = native.LIBRARY.with_name("csrc")
DRIVER = Path(__file__).parents[1] / "processors" / "test_microkernels.cpp"
# The arithmetic is that of the library (setup.py).
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{KERNELS}"]

COMPILER, CROSS_COMPILER, EMULATOR = "c++", "aarch64-linux-gnu-g++", "qemu-aarch64"

# Where setup.py leaves what it compiles, if the library was installed from here.
BUILT = Path(__file__).parents[2] / "build" / f"kernels-torch-{version('torch')}"
BUILT /= "src/mlframework/quantization/kernels/csrc"


def needs_torch(source: Path) -> bool:
    """Whether a file includes a header of PyTorch's, or one of ours that does."""
    included = re.findall(r'#include ["<](.+)[">]', source.read_text())
    return any(
        name.startswith("torch/") or ((KERNELS / name).exists() and needs_torch(KERNELS / name)) for name in included
    )


def build(compiler: str, directory: Path, *options: str) -> Path:
    """The driver with all kernels that need no PyTorch; for this processor, as the library has them where it was built
    here."""
    sources = [DRIVER, *(source for source in sorted(KERNELS.rglob("*.cpp")) if not needs_torch(source))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(partial(compile_source, compiler, directory), sources))
    program = directory / "test_microkernels"
    run(compiler, *options, *map(str, objects), "-o", str(program))
    return program


def compile_source(compiler: str, directory: Path, source: Path) -> Path:
    if compiler == COMPILER and source != DRIVER and is_current(built := built_from(source)):
        return built
    result = directory / f"{source.stem}.o"
    run(compiler, *FLAGS, "-c", str(source), "-o", str(result))
    return result


def built_from(source: Path) -> Path:
    return (BUILT / source.relative_to(KERNELS)).with_suffix(".o")


def is_current(built: Path) -> bool:
    """Whether it is newer than all that it may have been compiled from."""
    return built.exists() and all(
        file.stat().st_mtime <= built.stat().st_mtime for file in KERNELS.rglob("*") if file.is_file()
    )


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def microkernels_in(output: str) -> list[str]:
    """The names of those that the driver ran, the best first."""
    return re.findall(r"^(\w+): \d+ of \d+ layers$", output, re.MULTILINE)


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")
def test_all_that_this_processor_can_run(tmp_path: Path) -> None:
    assert microkernels_in(run(str(build(COMPILER, tmp_path)))) == list(kernels.instruction_sets())


@pytest.mark.skipif(
    shutil.which(CROSS_COMPILER) is None or shutil.which(EMULATOR) is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user, which `make test-arm` installs",
)
def test_those_of_emulated_arm_processors(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    program = str(build(CROSS_COMPILER, tmp_path, "-static"))
    names = microkernels_in(run(EMULATOR, "-cpu", "max", program))
    assert names == ["neon_i8mm", "neon_dot", "portable"]
    # One of Arm v8.0, which has neither.
    assert microkernels_in(run(EMULATOR, "-cpu", "cortex-a57", program)) == ["portable"]
    for name in names[:2]:
        record_property("instruction_set", f"{name} (emulated)")
