"""Who runs which layer: chosen from a description alone, on this machine and as on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from example_codes import SIGNED, UNSIGNED, random_codes
from mlframework.quantization import kernels
from mlframework.quantization.kernels import (
    ConvolutionGeometry,
    ConvolutionProduct,
    Epilogue,
    IntegerLayer,
    LinearProduct,
    TrainingDescription,
    TransposedProduct,
    devices,
    fuses,
    native,
    trains_on_integers,
)
from mlframework.quantization.kernels.backends import int_mm, onednn
from mlframework.quantization.kernels.backends.compiled import COMPILED
from mlframework.quantization.kernels.backends.exact_floats import EXACT_FLOATS
from mlframework.quantization.kernels.backends.int_mm import INT_MM
from mlframework.quantization.kernels.backends.onednn import ONEDNN
from mlframework.quantization.kernels.backends.phases import PHASES
from mlframework.quantization.kernels.backends.triton_gpu import TRITON_GPU
from mlframework.quantization.kernels.plan import plan, plan_sums
from mlframework.quantization.kernels.products import Description
from mlframework.quantization.kernels.triton_gpu import availability

needs_kernels = pytest.mark.skipif(kernels.active_path() != "native", reason="needs compiled kernels")


def description(
    kind: type, *weight: int, groups: int = 1, stride: tuple[int, ...] = (1, 1), dilation: int = 1, device: str = "cpu"
) -> Description:
    geometry = None
    if kind is not LinearProduct:
        dimensions = len(weight) - 2
        geometry = ConvolutionGeometry(stride[:dimensions], (0,) * dimensions, (dilation,) * dimensions, groups)
    return Description(kind.__name__, weight, geometry, UNSIGNED, 2**20, device)


LINEAR = description(LinearProduct, 8, 4)
ROW = description(ConvolutionProduct, 8, 4, 3)
DENSE = description(ConvolutionProduct, 8, 4, 3, 3)
DEPTHWISE = description(ConvolutionProduct, 8, 1, 3, 3, groups=8)
GROUPED = description(ConvolutionProduct, 8, 2, 3, 3, groups=2)
VOLUME = description(ConvolutionProduct, 8, 4, 3, 3, 3, stride=(1, 1, 1))
UPSCALING = description(TransposedProduct, 4, 8, 2, 2, stride=(2, 2))
UNEVEN_UPSCALING = description(TransposedProduct, 4, 8, 2, 2, stride=(2, 1))
DILATED_UPSCALING = description(TransposedProduct, 4, 8, 2, 2, dilation=2)
GROUPED_UPSCALING = description(TransposedProduct, 4, 8, 2, 2, groups=2)
EVERY = [
    LINEAR,
    ROW,
    DENSE,
    DEPTHWISE,
    GROUPED,
    VOLUME,
    UPSCALING,
    UNEVEN_UPSCALING,
    DILATED_UPSCALING,
    GROUPED_UPSCALING,
]


def with_probes(monkeypatch: pytest.MonkeyPatch, onednn_exact: bool, int_mm_best: bool) -> None:
    monkeypatch.setattr(onednn, "onednn_is_exact", lambda: onednn_exact)
    monkeypatch.setattr(int_mm, "int_mm_is_best", lambda device: int_mm_best)


@needs_kernels
@pytest.mark.parametrize("layer", [LINEAR, ROW, DENSE, DEPTHWISE], ids=str)
def test_dense_and_depthwise_layers_run_compiled(layer: Description) -> None:
    assert plan(layer) is COMPILED


@needs_kernels
def test_upscaling_runs_as_the_convolution_of_its_phases() -> None:
    assert plan(UPSCALING) is PHASES
    for layer in (UNEVEN_UPSCALING, DILATED_UPSCALING, GROUPED_UPSCALING):
        assert plan(layer) not in (PHASES, COMPILED)


@pytest.mark.parametrize("layer", EVERY, ids=str)
def test_with_references_forced_pytorch_runs_all(layer: Description) -> None:
    before = plan(layer)
    with kernels.reference_kernels():
        assert plan(layer) is plan_sums(layer)
    assert plan(layer) is before


@pytest.mark.parametrize("layer", EVERY, ids=str)
def test_without_exact_kernels_of_pytorch_floats_run_the_sums(
    layer: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_probes(monkeypatch, onednn_exact=False, int_mm_best=False)
    assert plan_sums(layer) is EXACT_FLOATS


def test_which_sums_kernels_of_pytorch_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with_probes(monkeypatch, onednn_exact=True, int_mm_best=True)
    assert plan_sums(LINEAR) is INT_MM
    for layer in (DENSE, DEPTHWISE, GROUPED, UPSCALING, UNEVEN_UPSCALING):
        assert plan_sums(layer) is ONEDNN
    for layer in (ROW, VOLUME):
        assert plan_sums(layer) is EXACT_FLOATS
    with_probes(monkeypatch, onednn_exact=True, int_mm_best=False)
    assert plan_sums(LINEAR) is EXACT_FLOATS


def test_on_another_device_nothing_of_the_cpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with_probes(monkeypatch, onednn_exact=True, int_mm_best=True)
    for layer in EVERY:
        assert plan(layer._replace(device="cuda")) in (INT_MM, EXACT_FLOATS)
    with_probes(monkeypatch, onednn_exact=True, int_mm_best=False)
    assert all(plan(layer._replace(device="cuda")) is EXACT_FLOATS for layer in EVERY)


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "runs_on", lambda index: True)


@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu_kernels_run_convolutions_and_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_probes(monkeypatch, onednn_exact=True, int_mm_best=True)
    on_gpu = {layer: plan(layer._replace(device="cuda")) for layer in EVERY}
    for layer in (LINEAR, ROW, DENSE, DEPTHWISE, GROUPED):
        assert on_gpu[layer] is TRITON_GPU
    assert on_gpu[UPSCALING] is PHASES
    for layer in (VOLUME, UNEVEN_UPSCALING, DILATED_UPSCALING, GROUPED_UPSCALING):
        assert on_gpu[layer] is EXACT_FLOATS
    with kernels.reference_kernels():
        assert all(plan(layer._replace(device="cuda")) in (INT_MM, EXACT_FLOATS) for layer in EVERY)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("input", "weight", "trains"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float64, torch.float32, False),
        (torch.float32, torch.float64, False),
    ],
    ids=str,
)
def test_what_trains_on_integers_on_a_gpu(input: torch.dtype, weight: torch.dtype, trains: bool) -> None:
    layer = TRAINED._replace(input_dtype=input, weight_dtype=weight, device=("cuda", 0))
    assert trains_on_integers(layer) is trains
    with kernels.reference_kernels():
        assert not trains_on_integers(layer)


def test_without_the_library_pytorch_runs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert all(plan(layer) is plan_sums(layer) for layer in EVERY)
    assert not trains_on_integers(TRAINED._replace(weight=(5, 9)))


@needs_kernels
def test_a_layer_asks_once_on_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(description: Description) -> Any:
        asked.append(devices.kernels_on("cpu"))
        return plan(description)

    monkeypatch.setattr("mlframework.quantization.kernels.integer_layer.plan", counting)
    product = LinearProduct(random_codes((4, 6), SIGNED), 3, UNSIGNED)
    layer = IntegerLayer(product, Epilogue(torch.zeros(4, dtype=torch.int32), torch.ones(1)))
    codes = random_codes((3, 6), UNSIGNED)
    results: list[Tensor] = []
    for _ in range(3):
        results.append(layer(codes))
        with kernels.reference_kernels():
            results.append(layer(codes))
    assert asked == ["compiled", None]
    assert all(torch.equal(result, results[0]) for result in results)


# Training

TRAINED = TrainingDescription((4, 8), None, torch.float32, torch.float32, ("cpu", -1))


def geometry_of(dimensions: int, groups: int) -> ConvolutionGeometry:
    return ConvolutionGeometry((1,) * dimensions, (0,) * dimensions, (1,) * dimensions, groups)


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "groups", "takes"),
    [
        ((4, 8), None, True),
        ((4, 8, 3), 1, True),
        ((4, 8, 3, 3), 1, True),
        ((8, 1, 3, 3), 8, True),
        ((6, 1, 3), 6, True),
        ((4, 8, 3, 3, 3), 1, False),
        ((8, 4, 3, 3), 2, False),
        ((16, 1, 3, 3), 8, False),
        ((0, 8), None, False),
        ((4, 0), None, False),
        ((2, 2**30 // (255 * 128)), None, True),
        ((2, 2**30 // (255 * 128) + 1), None, False),
    ],
    ids=str,
)
def test_which_layers_train_on_integers(shape: tuple[int, ...], groups: int | None, takes: bool) -> None:
    geometry = None if groups is None else geometry_of(len(shape) - 2, groups)
    layer = TRAINED._replace(weight=shape, geometry=geometry)
    for _ in range(2):  # the second time from memory
        assert trains_on_integers(layer) is takes
        with kernels.reference_kernels():
            assert not trains_on_integers(layer)


@pytest.mark.parametrize(
    "change",
    [
        {"device": ("cuda", 0)},
        {"input_dtype": torch.bfloat16},
        {"weight_dtype": torch.float64},
        {"device": ("meta", -1)},
    ],
    ids=str,
)
def test_what_does_not_train_on_integers(change: dict[str, Any]) -> None:
    assert not trains_on_integers(TRAINED._replace(**change))


@needs_kernels
def test_which_values_are_followed_in_one_step() -> None:
    values = torch.zeros(2, 3)
    assert fuses(values)
    for other in (values.double(), values.bfloat16(), values.to("meta"), values[:0]):
        assert not fuses(other)
    with kernels.reference_kernels():
        assert not fuses(values)
