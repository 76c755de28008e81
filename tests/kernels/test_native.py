"""The compiled kernels as a library: there or not, asked or not, on every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mlframework.quantization import kernels
from mlframework.quantization.kernels import Epilogue, PackedLinear, native


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    native.native_is_available()  # what other modules have imported of the library is filled before it is replaced
    monkeypatch.setattr(native, "operators", {})
    native.native_is_available.cache_clear()
    native.has_integer_layers.cache_clear()
    yield
    monkeypatch.undo()
    native.native_is_available.cache_clear()
    native.has_integer_layers.cache_clear()
    native.native_is_available()


def linear_layer() -> Any:
    product = PackedLinear(torch.arange(-12, 12, dtype=torch.int8).reshape(4, 6), 3, torch.uint8)
    return product.followed_by(
        Epilogue(torch.arange(4, dtype=torch.int32), torch.tensor([0.3]), 9, 0, 255, torch.uint8)
    )


CODES = torch.arange(18, dtype=torch.uint8).reshape(3, 6)


def test_the_kernels_are_built() -> None:
    """Whoever works on the project has them: `make` builds them."""
    assert native.native_is_available()
    assert kernels.active_path() == "native"


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("broken", [False, True])
def test_without_them_there_is_one_warning_and_the_same_result(
    broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = linear_layer()(CODES)
    native.native_is_available.cache_clear()
    native.has_integer_layers.cache_clear()
    library = tmp_path / "_native.abi3.so"
    if broken:
        library.write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY", library)
    with pytest.warns(RuntimeWarning, match=r"several times slower[\s\S]*pip install --no-build-isolation"):
        layer = linear_layer()
    # From here on, warnings are errors again.
    assert torch.equal(layer(CODES), expected)
    assert torch.equal(kernels.lookup(CODES, torch.arange(256).to(torch.uint8)), CODES)
    assert kernels.active_path() == "reference"


@pytest.mark.usefixtures("_forgotten")
def test_a_library_of_other_operators_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_OPERATORS", (*native._OPERATORS, "of_a_later_version"))
    with pytest.warns(RuntimeWarning, match="of_a_later_version"):
        assert not native.native_is_available()


def test_the_reference_can_be_forced() -> None:
    layer = linear_layer()
    expected = layer(CODES)
    with kernels.reference_kernels():
        assert kernels.active_path() == "reference"
        with kernels.reference_kernels():
            assert not native.use_native(CODES)
        assert kernels.active_path() == "reference"
        assert torch.equal(layer(CODES), expected)
    assert kernels.active_path() == "native"
    with pytest.raises(KeyError), kernels.reference_kernels():
        raise KeyError
    assert kernels.active_path() == "native"


def test_tensors_that_only_stand_for_others_go_the_reference_way() -> None:
    layer = linear_layer()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(CODES)
        assert not native.use_native(fake)
    assert not native.use_native(CODES.to("meta"))
    assert native.use_native(CODES)
    assert layer(CODES).shape == (3, 4)


def test_they_use_the_best_instructions_that_pytorch_uses() -> None:
    best = kernels.instruction_set()
    assert best in INSTRUCTION_SETS
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert best == "avx2"
    assert native.has_integer_layers() == (best != "baseline")


INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_vnni")
PROGRAM = "from mlframework.quantization import kernels; print(kernels.instruction_set(), kernels.has_integer_layers())"
OWN_VARIABLE = "MLFRAMEWORK_QUANTIZATION_INSTRUCTION_SET"
TESTS = [
    str(Path(__file__).with_name(name))
    for name in ("test_operations.py", "test_integer_layer.py", "test_training_product.py", "test_fake_quantization.py")
]


def used_under(**variables: str) -> list[str]:
    """The instruction set that a process with these variables uses, and whether it has integer layers."""
    result = run([sys.executable, "-c", PROGRAM], {**os.environ, **variables})
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_computes_the_same(name: str) -> None:
    best = kernels.instruction_set()
    if INSTRUCTION_SETS.index(name) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this processor does not have {name}")
    assert used_under(**{OWN_VARIABLE: name}) == [name, str(name != "baseline")]
    if name == best:  # the tests run on it as they are
        return
    environment = {**os.environ, OWN_VARIABLE: name}
    result = run([sys.executable, "-m", "pytest", *TESTS, "-m", "not slow", "-p", "no:cacheprovider"], environment)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    result = run([sys.executable, "-c", PROGRAM], {**os.environ, OWN_VARIABLE: "avx3"})
    assert result.returncode != 0
    assert f"{OWN_VARIABLE} must be baseline, avx2, avx512 or avx512_vnni, got avx3" in result.stderr


@pytest.mark.slow
def test_pytorchs_own_variable_holds_them_to_fewer() -> None:
    assert used_under(ATEN_CPU_CAPABILITY="default") == ["baseline", "False"]
    if kernels.instruction_set() != "baseline":
        assert used_under(ATEN_CPU_CAPABILITY="avx2") == ["avx2", "True"]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
