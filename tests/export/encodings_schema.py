"""What AIMET's "Encoding Format Specification" says of a file of encodings, field by field."""

from __future__ import annotations

from typing import Any

# Of integer encodings without blocks. Each field with its type, and whether it has to be there.
_FIELDS_1_0_0 = {"name": str, "enc_type": str, "dtype": str, "bw": int, "is_sym": bool, "scale": list, "offset": list}
_DTYPES = {f"{sign}{bits}" for sign in ("int", "uint") for bits in (2, 4, 8, 16, 32)}


def check_document(document: dict[str, Any]) -> None:
    """Fails where a document is not of the version that it names."""
    if document["version"] == "1.0.0":
        assert document.keys() == {"version", "activation_encodings", "param_encodings"}
        for key in ("activation_encodings", "param_encodings"):
            _check_names(document[key])
            for entry in document[key]:
                _check_1_0_0(entry)
    else:
        assert document["version"] == "2.0.0"
        assert document.keys() == {"version", "encodings"}
        _check_names(document["encodings"])
        for entry in document["encodings"]:
            _check_2_0_0(entry)


def _check_names(entries: Any) -> None:
    assert isinstance(entries, list)
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)


def _check_1_0_0(entry: dict[str, Any]) -> None:
    assert {key: type(value) for key, value in entry.items()} == _FIELDS_1_0_0
    assert entry["dtype"] == "INT"
    assert 2 <= entry["bw"] <= 32
    assert entry["enc_type"] in ("PER_TENSOR", "PER_CHANNEL")
    assert len(entry["scale"]) == len(entry["offset"]) >= 1
    assert entry["enc_type"] == "PER_CHANNEL" or len(entry["scale"]) == 1
    assert all(type(scale) is float and scale > 0 for scale in entry["scale"])
    assert all(type(offset) is int and -(2**31) <= offset <= 0 for offset in entry["offset"])
    if entry["is_sym"]:  # converters refuse others, or take them for these
        assert set(entry["offset"]) == {-(2 ** (entry["bw"] - 1))}


def _check_2_0_0(entry: dict[str, Any]) -> None:
    assert {"name", "output_dtype", "y_scale"} <= entry.keys()
    assert entry.keys() <= {"name", "output_dtype", "y_scale", "y_zero_point", "axis"}
    assert type(entry["name"]) is str
    assert entry["output_dtype"] in _DTYPES
    scales = entry["y_scale"] if "axis" in entry else [entry["y_scale"]]
    zero_points = entry.get("y_zero_point", [0] * len(scales) if "axis" in entry else 0)
    zero_points = zero_points if "axis" in entry else [zero_points]
    assert type(entry.get("axis", 0)) is int
    assert len(scales) == len(zero_points) >= 1
    assert all(type(scale) is float and scale > 0 for scale in scales)
    assert all(type(zero_point) is int for zero_point in zero_points)
