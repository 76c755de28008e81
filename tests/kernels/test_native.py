"""The compiled kernels as a library: there or not, asked or not, on every instruction set of this machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mlframework.quantization import kernels
from mlframework.quantization.kernels import Epilogue, IntegerLayer, LinearProduct, devices, native


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not asked for the kernels yet."""
    monkeypatch.setattr(native._State, "is_loaded", None)


def linear_layer() -> IntegerLayer:
    product = LinearProduct(torch.arange(-12, 12, dtype=torch.int8).reshape(4, 6), 3, torch.uint8)
    return IntegerLayer(
        product, Epilogue(torch.arange(4, dtype=torch.int32), torch.tensor([0.3]), 9, 0, 255, torch.uint8)
    )


CODES = torch.arange(18, dtype=torch.uint8).reshape(3, 6)


def test_the_kernels_are_built() -> None:
    """Whoever works on the project has them: `make` builds them."""
    assert native.is_available()
    assert kernels.active_path() == "native"


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("broken", [False, True])
def test_without_them_there_is_one_warning_and_the_same_result(
    broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = linear_layer()(CODES)
    native._State.is_loaded = None
    library = tmp_path / "_compiled.abi3.so"
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
    def earlier() -> Any:
        return SimpleNamespace(instruction_set=lambda: "portable")

    monkeypatch.setattr(native, "library", earlier)
    with pytest.warns(RuntimeWarning, match="instruction_sets"):
        assert not native.is_available()


def test_the_reference_can_be_forced() -> None:
    layer = linear_layer()
    expected = layer(CODES)
    with kernels.reference_kernels():
        assert kernels.active_path() == "reference"
        with kernels.reference_kernels():
            assert devices.kernels_for(CODES) is None
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
        assert devices.kernels_for(fake) is None
    assert devices.kernels_for(CODES.to("meta")) is None
    assert devices.kernels_for(CODES) == "compiled"
    assert layer(CODES).shape == (3, 4)
