"""Every row of the table of microkernels that this processor can run, each in a process held to it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlframework.quantization import kernels

INSTRUCTION_SETS = kernels.instruction_sets()
PROGRAM = "from mlframework.quantization import kernels; print(kernels.instruction_set(), *kernels.instruction_sets())"
OWN_VARIABLE = "MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET"
# What the rows of the table differ in; and what else is compiled anew for the features that these two rows name.
LAYERS = ("test_integer_layer.py", "operators/test_layers.py")
SAMPLES = {
    "avx2": ("test_integer_layer.py", "operators/test_declaration.py"),
    "portable": ("operators/test_declaration.py",),  # which has integer layers, too
}
EVERYTHING = ("test_integer_layer.py", "operators")
# The microkernels of every row are tested by test_microkernels.py as well.
EACH = [
    *(pytest.param(name, SAMPLES[name], id=f"{name}, samples") for name in INSTRUCTION_SETS if name in SAMPLES),
    *(
        pytest.param(name, EVERYTHING if name in SAMPLES else LAYERS, marks=pytest.mark.long, id=name)
        for name in INSTRUCTION_SETS
    ),
]


def test_they_use_the_best_instructions_that_pytorch_uses() -> None:
    assert kernels.instruction_set() in INSTRUCTION_SETS
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert kernels.instruction_set() in ("avx2", "avx_vnni")


def used_under(**variables: str) -> list[str]:
    """The instruction set that a process with these variables uses, then all that it may."""
    result = run([sys.executable, "-c", PROGRAM], {**os.environ, **variables})
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


# Of every processor of this architecture.
BASELINE = ["sse2", "portable"] if platform.machine() in ("x86_64", "AMD64") else ["portable"]


def test_every_processor_runs_those_of_the_oldest() -> None:
    assert list(INSTRUCTION_SETS[-len(BASELINE) :]) == BASELINE


@pytest.mark.slow
@pytest.mark.parametrize(("name", "files"), EACH)
def test_every_instruction_set_computes_the_same(
    name: str, files: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    if name == kernels.instruction_set():  # the tests run on it as they are
        assert used_under(**{OWN_VARIABLE: name}) == [name, *INSTRUCTION_SETS]
        return
    environment = {**os.environ, OWN_VARIABLE: name}
    tests = [str(Path(__file__).parent / file) for file in files]
    # Schemas, references and versions of tensors are the same on all.
    options = ["-m", "not slow", "-k", "not (schema or can_be_forced or others_see)", "-p", "no:cacheprovider"]
    result = run([sys.executable, "-m", "pytest", *tests, *options], environment)
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"instruction set: {name};" in result.stdout  # as conftest.py says of every run
    record_property("instruction_set", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("avx3", marks=pytest.mark.long), "avx512_vnni"])
def test_an_instruction_set_that_is_not_here_is_refused_by_name(name: str) -> None:
    held = {**os.environ, "ATEN_CPU_CAPABILITY": "default", OWN_VARIABLE: name}
    result = run([sys.executable, "-c", PROGRAM], held)
    assert result.returncode != 0
    runnable = ", ".join(BASELINE)
    assert f"{OWN_VARIABLE} must be one that this processor can run ({runnable}), got {name}" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "runnable"),
    [("default", BASELINE), pytest.param("avx2", ["avx2", *BASELINE], marks=pytest.mark.long)],
)
def test_pytorchs_own_variable_holds_them_to_fewer(capability: str, runnable: list[str]) -> None:
    if set(runnable) <= set(INSTRUCTION_SETS):
        assert used_under(ATEN_CPU_CAPABILITY=capability) == [runnable[0], *runnable]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
