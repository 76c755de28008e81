"""The fastest configuration is measured once, on a GPU alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from example_codes import DTYPES, SIGNED, random_codes
from mlframework.quantization.kernels.triton_gpu.availability import is_installed

if not is_installed():
    pytest.skip("needs triton", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from mlframework.quantization.kernels.triton_gpu import tuning
from mlframework.quantization.kernels.triton_gpu.library_products import through_library
from mlframework.quantization.kernels.triton_gpu.products import configurations, linear
from mlframework.quantization.kernels.triton_gpu.results import Result

pytestmark = pytest.mark.interpreter

# One of them is None, as the library's is.
TIMES = {"slow": 3.0, None: 1.0, "medium": 2.0}


class Driver:
    """A GPU on which each choice takes its time, or does not fit."""

    def __init__(self, too_large: str | None = "nothing") -> None:
        self.runs: Counter[str | None] = Counter()
        self.too_large = too_large
        self.latest: str | None = ""

    @property
    def active(self) -> Driver:
        return self

    def run(self, choice: str | None) -> None:
        if choice == self.too_large:
            raise OutOfResources(2, 1, "shared memory")
        self.runs[choice] += 1
        self.latest = choice

    def get_benchmarker(self) -> Callable[..., float]:
        def measure(run: Callable[[], Any], **_: Any) -> float:
            run()
            return TIMES[self.latest]

        return measure


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "INTERPRETS", False)
    monkeypatch.setattr(tuning, "_fastest", {})


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    monkeypatch.setattr(tuning.triton.runtime, "driver", driver)
    return driver


@pytest.mark.usefixtures("_gpu")
def test_each_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver())
    for _ in range(3):
        assert tuning.fastest("a shape", list(TIMES), driver.run) is None
    assert driver.runs == dict.fromkeys(TIMES, 1)
    tuning.fastest("another shape", list(TIMES), driver.run)
    assert driver.runs == dict.fromkeys(TIMES, 2)


@pytest.mark.usefixtures("_gpu")
def test_what_does_not_fit_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver(too_large=None))
    assert tuning.fastest("a shape", list(TIMES), driver.run) == "medium"


@pytest.mark.usefixtures("_gpu")
def test_a_library_without_the_shape_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver())

    def run(choice: str | None) -> None:
        if choice is None:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        driver.run(choice)

    assert tuning.fastest("a shape", list(TIMES), run) == "medium"


@pytest.mark.usefixtures("_gpu")
def test_where_all_fail_the_reason_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, Driver())

    def run(choice: str | None) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tuning.fastest("a shape", list(TIMES), run)
    assert "a shape" not in tuning._fastest


@pytest.mark.usefixtures("_gpu")
def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver())
    monkeypatch.setattr(tuning, "_is_capturing", lambda: True)
    assert tuning.fastest("a shape", list(TIMES), driver.run) == "slow", "the first"
    assert not driver.runs
    monkeypatch.setattr(tuning, "_is_capturing", lambda: False)
    assert tuning.fastest("a shape", list(TIMES), driver.run) is None
    monkeypatch.setattr(tuning, "_is_capturing", lambda: True)
    assert tuning.fastest("a shape", list(TIMES), driver.run) is None, "which was measured before"


def test_the_interpreter_measures_nothing() -> None:
    driver = Driver()
    assert tuning.fastest("a shape", list(TIMES), driver.run) == "slow"
    assert not driver.runs


@pytest.mark.parametrize(
    ("rows", "outputs", "products", "largest", "length"),
    [
        (4096, 4096, 4096, (128, 256), 128),
        (4096, 64, 576, (128, 64), 64),
        (1, 4096, 160, (16, 64), 32),
        (1, 1, 1, (16, 16), 32),
    ],
)
def test_tiles_are_no_larger_than_a_layer(
    rows: int, outputs: int, products: int, largest: tuple[int, int], length: int
) -> None:
    each = configurations(rows, outputs, products)
    assert max((choice.rows, choice.outputs) for choice in each) == largest
    assert {choice.products for choice in each} == {length}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_dtype", [torch.uint8, torch.float32], ids=str)
def test_the_library_gives_the_same(dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    """``torch._int_mm``, which is one of the choices on a GPU."""
    rows, weight = random_codes((24, 64), dtype), random_codes((16, 64), SIGNED)
    bias = torch.randint(-3000, 3000, (16,), dtype=torch.int32)
    for multiplier in (torch.rand(16) * 1e-3, torch.rand(1) * 1e-3):
        ends = (
            (torch.tensor([3]), torch.tensor([5]), torch.tensor([250])) if multiplier.numel() > 1 else (3.0, 5.0, 250.0)
        )
        result = Result(bias, multiplier, *ends)
        one, other = torch.empty(24, 16, dtype=output_dtype), torch.empty(24, 16, dtype=output_dtype)
        through_library(rows, weight, result, one)
        linear(rows, 0, weight, result, other)
        assert torch.equal(one, other)
        assert one.unique().numel() > 5
