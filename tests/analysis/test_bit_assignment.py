"""The least loss within a size, and the least size within a loss, against every assignment there is."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from mlframework.quantization import (
    BitAssignment,
    QATConfig,
    SensitivityReport,
    analyze_sensitivity,
    assign_bits,
    calibrate,
    convert,
    prepare,
    verify,
)
from mlframework.quantization.analysis.local_errors import ErrorSplit
from mlframework.quantization.analysis.measures import Measure
from mlframework.quantization.analysis.sensitivity_report import LayerSensitivity
from mlframework.quantization.analysis.solver_output import without_solver_output

OTHER_BYTES = 100


def report_of(
    weights: list[int],
    costs: list[dict[int, float]],
    reference_loss: float | None = None,
    config: QATConfig | None = None,
) -> SensitivityReport:
    """A report with these costs, by layer and width."""
    config = QATConfig() if config is None else config
    layers = []
    for index, (count, of_width) in enumerate(zip(weights, costs, strict=True)):
        for bits, cost in of_width.items():
            loss = None if reference_loss is None else reference_loss + cost
            measure = Measure(abs(cost), None, loss)
            layers.append(LayerSensitivity(f"layer{index}", "Linear", bits, count, 2, measure, measure, ErrorSplit()))
    quantized = dict.fromkeys(costs[0], Measure(0.0))
    configs = {f"layer{index}": config for index in range(len(weights))}
    return SensitivityReport(
        tuple(layers), (), Measure(0.0), quantized, reference_loss, config.target, OTHER_BYTES, configs
    )


class Assigned(NamedTuple):
    cost: float
    bits: int
    file_bytes: int


def all_assignments(weights: list[int], costs: list[dict[int, float]]) -> list[Assigned]:
    """By brute force, with what the engines of today store."""
    options = [
        [(cost, bits * count, count + 2 * 4) for bits, cost in of_width.items()] + [(0.0, 32 * count, 4 * count)]
        for count, of_width in zip(weights, costs, strict=True)
    ]
    return [Assigned(*map(sum, zip(*taken, strict=True))) for taken in itertools.product(*options)]  # type: ignore[arg-type]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[dict[int, float]]]:
    layers = draw(st.integers(1, 4))
    widths = draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=4, unique=True))
    weights = draw(st.lists(st.integers(1, 5000), min_size=layers, max_size=layers))
    exponents = st.floats(-8, 1, allow_nan=False)  # of relative errors as they occur: 80 dB to -10 dB
    costs = [{bits: 10 ** draw(exponents) for bits in widths} for _ in range(layers)]
    return weights, costs


@given(problems(), st.floats(2, 20))
def test_no_assignment_of_that_average_costs_less(problem: tuple[Any, Any], average: float) -> None:
    weights, costs = problem
    within = [each for each in all_assignments(weights, costs) if each.bits <= average * sum(weights)]
    report = report_of(weights, costs)
    if not within:
        with pytest.raises(ValueError, match=r"average_bits=.* cannot be kept: the least with these widths is"):
            assign_bits(report, average_bits=average)
        return
    found = assign_bits(report, average_bits=average)
    assert found.average_bits <= average * (1 + 1e-9)
    assert found.expected == pytest.approx(min(within).cost, rel=1e-6, abs=1e-11)


@given(problems(), st.floats(0, 1))
def test_no_assignment_of_that_size_costs_less(problem: tuple[Any, Any], share: float) -> None:
    weights, costs = problem
    every = all_assignments(weights, costs)
    limit = OTHER_BYTES + int(share * max(each.file_bytes for each in every))
    within = [each for each in every if each.file_bytes + OTHER_BYTES <= limit]
    report = report_of(weights, costs)
    if not within:
        with pytest.raises(ValueError, match=r"model_bytes=.* cannot be kept"):
            assign_bits(report, model_bytes=limit)
        return
    found = assign_bits(report, model_bytes=limit)
    assert found.file_bytes <= limit
    assert found.expected == pytest.approx(min(within).cost, rel=1e-6, abs=1e-11)


@given(problems(), st.floats(-8, 1), st.sampled_from([None, 2.5]))
def test_no_assignment_of_that_loss_is_smaller(problem: tuple[Any, Any], exponent: float, start: float | None) -> None:
    weights, costs = problem
    limit = 10**exponent
    every = all_assignments(weights, costs)
    assume(all(abs(each.cost - limit) > 1e-6 * limit for each in every))  # on the edge either is right
    within = [each for each in every if each.cost <= limit]
    found = assign_bits(report_of(weights, costs, start), max_loss=limit + (start or 0.0))
    assert found.expected <= (limit + (start or 0.0)) * (1 + 1e-6)
    assert found.average_bits * sum(weights) == pytest.approx(min(each.bits for each in within))


def test_a_layer_that_loses_nothing_gets_the_fewest_bits() -> None:
    costs = [{8: 1e-5, 4: 1e-2}, {8: 1e-5, 4: 2e-5}]
    assignment = assign_bits(report_of([100, 100], costs), average_bits=6)
    assert assignment.bits == {"layer0": 8, "layer1": 4}
    assert assignment.expected == pytest.approx(3e-5)
    assert assignment.average_bits == 6


def test_a_small_sensitive_layer_stays_float() -> None:
    assignment = assign_bits(report_of([10, 1000], [{8: 0.5}, {8: 1e-5}]), average_bits=8.5)
    assert assignment.bits == {"layer0": None, "layer1": 8}
    assert assignment.skip == ("layer0",)
    assert list(assignment.overrides) == ["layer1"]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "executorch"])
def test_a_target_without_narrow_kernels_says_so(target: str) -> None:
    report = report_of([100, 100], [{8: 1e-5, 4: 1e-3}] * 2, config=QATConfig.for_target(target))
    narrow = assign_bits(report, average_bits=4)
    assert f"{target} has no kernels for weights below 8 bits" in narrow.notes[0]
    assert narrow.notes[0] in str(narrow)
    assert narrow.file_bytes == OTHER_BYTES + 2 * (100 + 8)
    assert assign_bits(report, average_bits=8).notes == ()


def test_overrides_keep_what_a_layer_was_prepared_with() -> None:
    base = QATConfig(activation_bits=6, reduce_range=True, skip=("other",), overrides={"x": QATConfig()})
    assignment = assign_bits(report_of([100], [{4: 1e-3}], config=base), average_bits=4)
    (override,) = assignment.overrides.values()
    assert (override.weight_bits, override.activation_bits, override.reduce_range) == (4, 6, True)
    assert (override.overrides, override.skip) == ({}, ())
    configured = assignment.configured(base)
    assert list(configured.overrides) == ["layer0", "x"]
    assert configured.skip == ("other",)


def test_a_configuration_with_the_widths_is_in_all_else_as_it_is() -> None:
    assignment = assign_bits(report_of([100, 100], [{4: 1e-3}, {4: 1e-3}]), average_bits=4)
    narrow = QATConfig(activation_bits=5, weight_bits=8)
    given = QATConfig(learnable=True, activation_bits=4, overrides={"layer1": narrow, nn.Linear: QATConfig()})
    configured = assignment.configured(given)
    first, second = configured.overrides["layer0"], configured.overrides["layer1"]
    assert (first.learnable, first.activation_bits, first.weight_bits) == (True, 4, 4)
    assert (second.learnable, second.activation_bits, second.weight_bits) == (False, 5, 4)
    assert list(configured.overrides) == ["layer0", "layer1", nn.Linear]


class Bracketed(nn.Module):
    """Layers with names that a shell pattern would read otherwise."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a[0]", "a0", "b*", "bc"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.relu(layer(x))
        return x


def test_names_are_no_patterns() -> None:
    model, inputs = Bracketed(), torch.randn(32, 8)
    prepared = prepare(model, QATConfig(), (inputs,))
    calibrate(prepared, [inputs])
    sensitivity = analyze_sensitivity(prepared, [inputs], bits=(8, 4, 2))
    for average in (3, 5, 8.5):
        assignment = assign_bits(sensitivity, average_bits=average)
        again = prepare(model, assignment.configured(QATConfig()), (inputs,))
        for name, bits in assignment.bits.items():
            node = getattr(again.get_submodule(name), "weight_fake_quantize", None)
            assert (None if node is None else node.scheme.bits) == bits, name


def test_mixed_widths_convert_bit_for_bit_and_lose_what_was_expected() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    inputs = torch.randn(64, 3, 8, 8)
    prepared = prepare(model, QATConfig(), (inputs,))
    calibrate(prepared, [inputs])
    assignment = assign_bits(analyze_sensitivity(prepared, [inputs], bits=(8, 4, 3, 2)), average_bits=4)
    mixed = prepare(model, assignment.configured(QATConfig()), (inputs,))
    calibrate(mixed, [inputs])
    verify(mixed, [inputs])
    with torch.no_grad():
        error, signal = (mixed.eval()(inputs) - model(inputs)).square().sum(), model(inputs).square().sum()
    assert float(error / signal) == pytest.approx(assignment.expected, rel=0.5)


def test_exactly_one_limit_is_taken() -> None:
    report = report_of([100], [{8: 1e-5}])
    with pytest.raises(ValueError, match="exactly one of average_bits, model_bytes, max_loss must be given, got none"):
        assign_bits(report)
    with pytest.raises(ValueError, match="got average_bits, max_loss"):
        assign_bits(report, average_bits=8, max_loss=1)
    with pytest.raises(TypeError, match="average_bits must be a number, got 'five'"):
        assign_bits(report, average_bits="five")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sensitivity must be a SensitivityReport, got dict"):
        assign_bits({}, average_bits=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_bytes=150 cannot be kept: the least with these widths is 208"):
        assign_bits(report, model_bytes=150)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"assign_bits needs scipy.*mlframework-quantization\[analysis\]"):
        assign_bits(report_of([100], [{8: 1e-5}]), average_bits=8)


def test_it_prints_and_becomes_plain_data_and_html() -> None:
    assignment: BitAssignment = assign_bits(report_of([100, 50], [{8: 1e-5, 4: 1e-2}] * 2), average_bits=8)
    first, *rows, last = str(assignment).splitlines()
    assert first.split() == ["layer", "bits", "weights", "cost"]
    assert rows[0].split() == ["layer0", "8", "100", "1e-05"]
    assert last == "8.00 bits a weight, 266 bytes in a file; expected: 47.0 dB"
    assert json.loads(json.dumps(assignment.to_dict()))["bits"] == {"layer0": 8, "layer1": 8}
    assert "<td>layer1</td>" in assignment._repr_html_()


@pytest.mark.parametrize("seed", [4, 14])  # of those for which HiGHS 1.12 prints, about 3 in 100
def test_nothing_is_printed(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    drawn = random.Random(seed)
    weights = [drawn.randrange(1, 3_000_000) for _ in range(40)]
    costs = [{bits: 10 ** drawn.uniform(-8, 1) for bits in (2, 3, 4, 8)} for _ in weights]
    assign_bits(report_of(weights, costs), average_bits=5)
    assert capfd.readouterr() == ("", "")


def test_what_others_print_meanwhile_comes_out(capfd: pytest.CaptureFixture[str]) -> None:
    with without_solver_output():
        os.write(1, b"first\nHighsMipSolverData::solve()\nlast")
    assert capfd.readouterr().out == "first\nlast"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(torch.relu(self.embedding(indices)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("skip", [(), ("embedding",)])
def test_a_shared_weight_is_counted_as_often_as_files_store_it(skip: tuple[str, ...]) -> None:
    indices = torch.randint(0, 500, (4, 7))
    prepared = prepare(Tied(), QATConfig(skip=skip), (indices,))
    calibrate(prepared, [indices])
    sensitivity = analyze_sensitivity(prepared, [indices], bits=(8,))
    assignment = assign_bits(sensitivity, model_bytes=400_000)
    assert set(assignment.bits.values()) == {None}  # where there is room
    least = sum(500 * 64 + 500 * 4 for _ in sensitivity.names) + sensitivity.other_bytes
    stored = convert(prepared).state_dict().values()
    weights = sum(tensor.nbytes for tensor in stored if isinstance(tensor, Tensor) and tensor.numel() >= 500)
    assert least == pytest.approx(weights, rel=0.05)
    with pytest.raises(ValueError, match=f"the least with these widths is {least}"):
        assign_bits(sensitivity, model_bytes=least - 1)
    assert set(assign_bits(sensitivity, model_bytes=least).bits.values()) == {8}
