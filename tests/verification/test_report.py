"""Differences counted, added and told."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mlframework.quantization.verification.report import ComparisonReport, Difference, LayerComparison

SAME = Difference(10)
OTHER = Difference(10, 2, 3.0)
FLOATS = LayerComparison("output", "result", "floats", SAME, SAME, Difference(10, 9, 0.5))


@pytest.mark.parametrize(
    ("exact", "saturating", "agrees"),
    [(SAME, SAME, True), (SAME, OTHER, True), (OTHER, SAME, True), (OTHER, OTHER, False), (OTHER, None, False)],
)
def test_a_layer_agrees_where_either_session_does(
    exact: Difference, saturating: Difference | None, agrees: bool
) -> None:
    """Files with int8 activations run on floats in the session that is to be exact, as those for OpenVINO do."""
    assert LayerComparison("layer", "Int8Conv2d", "codes", SAME, exact, saturating).agrees is agrees
    assert not LayerComparison("layer", "Int8Conv2d", "codes", OTHER, exact, saturating).agrees


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], Difference(3, 0, 0.0)),
        ([1, 250, 3], [1, 2, 5], Difference(3, 2, 248.0)),
        ([], [], Difference(0, 0, 0.0)),
    ],
)
def test_codes(one: list[int], other: list[int], expected: Difference) -> None:
    assert Difference.between(torch.tensor(one, dtype=torch.uint8), torch.tensor(other, dtype=torch.uint8)) == expected


def test_floats_differ_where_they_are_not_the_same_number() -> None:
    one, other = torch.tensor([1.0, math.nan, math.nan, 2.0]), torch.tensor([1.0, math.nan, 1.0, 2.5])
    difference = Difference.between(one, other)
    assert (difference.elements, difference.differing) == (4, 2)
    assert math.isnan(difference.largest)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes must agree, got \(2,\) and \(1,\)"):
        Difference.between(torch.zeros(2), torch.zeros(1))


def test_differences_add_up() -> None:
    assert Difference(20, 2, 3.0) == SAME + OTHER
    assert OTHER + Difference(1, 1, 5.0) == Difference(11, 3, 5.0)
    for total in (Difference(1, 1, math.nan) + OTHER, OTHER + Difference(1, 1, math.nan)):
        assert math.isnan(total.largest)


def test_the_first_difference_is_where_the_models_part() -> None:
    layers = (
        LayerComparison("stem", "Int8Convolution", "codes", SAME, SAME),
        LayerComparison("body", "Int8Convolution", "codes", SAME, OTHER),
        LayerComparison("head", "Int8Linear", "floats", OTHER),
    )
    report = ComparisonReport(layers)
    assert not report.agrees
    assert report.first_difference is layers[1]
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["first_difference"] == "body"
    assert plain["layers"][1]["exported"] == {"elements": 10, "differing": 2, "largest": 3.0, "ties": 0}
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "kind",
        "compared",
        "prepared",
        "/",
        "converted",
        "converted",
        "/",
        "ONNX",
        "Runtime",
    ]
    assert lines[2].endswith("0 of 10               2 of 10 (by 3)")
    assert lines[3].endswith("-")
    assert lines[-1] == "the models part at body"


def test_agreement_is_told_without_a_column_for_a_file_that_is_not_there() -> None:
    report = ComparisonReport((LayerComparison("stem", "Int8Convolution", "codes", SAME),))
    assert report.agrees
    assert report.first_difference is None
    assert "ONNX" not in str(report)
    assert str(report).endswith("nothing differs")


def saturating(*layers: LayerComparison) -> ComparisonReport:
    return ComparisonReport((LayerComparison("stem", "Int8Convolution", "codes", SAME, SAME, SAME), *layers))


def test_what_saturates_is_told_beside_what_agrees() -> None:
    layers = LayerComparison("body", "Int8Convolution", "codes", SAME, SAME, OTHER), FLOATS
    report = saturating(*layers)
    assert report.agrees
    assert [layer.saturates for layer in report.layers] == [False, True, True]
    assert report.saturation is not None
    assert report.saturation.startswith(
        "ONNX Runtime's plain session differs in 2 of 20 codes, by saturation of 16-bit"
    )
    assert report.saturation.endswith("the session option session.x64quantprecision=1")
    lines = str(report).splitlines()
    assert lines[0].endswith("converted / ONNX Runtime  the same, saturating")
    assert lines[2].endswith("0 of 10                   2 of 10 (by 3)")
    assert lines[-2:] == ["nothing differs", report.saturation]
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["saturation"] == report.saturation
    assert [layer["exported_saturating"]["differing"] for layer in plain["layers"]] == [0, 2, 9]


def test_floats_tell_of_saturation_where_no_code_does() -> None:
    report = saturating(FLOATS)
    assert report.saturation is not None
    assert report.saturation.startswith("ONNX Runtime's plain session differs in 9 of 10 floats")


def test_what_differs_as_much_with_exact_products_is_no_saturation() -> None:
    report = saturating(LayerComparison("output", "result", "floats", SAME, OTHER, OTHER))
    assert not report.saturates
    assert str(report).splitlines()[-2:] == ["the models part at output", report.saturation]
    assert str(report).endswith("are subject to saturation on this processor; these batches met none")


def test_nothing_is_said_where_nothing_can_saturate() -> None:
    report = ComparisonReport((LayerComparison("stem", "Int8Convolution", "codes", SAME, SAME),))
    assert report.saturation is None
    assert report.to_dict()["saturation"] is None
    assert "satur" not in str(report)
