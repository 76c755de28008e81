"""Encodings of tensors as AIMET writes them, which Qualcomm's converters read beside a float model.

The format is AIMET's "Encoding Format Specification". In version 1.0.0 a value is ``(u + offset) * scale``, with ``u``
counted from 0 whatever the sign of the integers: a zero point is minus the offset, less 128 where codes are int8. In
version 2.0.0 the fields are those of ``QuantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VERSIONS = ("1.0.0", "2.0.0")


@dataclass(frozen=True)
class Encoding:
    """The grid of one tensor of a float model.

    Attributes:
        name: of the tensor.
        scale: float32 values; one of them for the whole tensor, or one for each channel.
        zero_point: as many.
        bits: of the integers.
        signed: whether they are signed.
        axis: of the channels; None where the grid is of the whole tensor.
        is_parameter: whether the tensor is a constant of the model.
    """

    name: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    bits: int
    signed: bool
    axis: int | None
    is_parameter: bool


def check_version(version: Any) -> None:
    """Refuses a version of the format that is not written here.

    Raises:
        ValueError: it is another than 1.0.0 or 2.0.0.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")


def document(encodings: Iterable[Encoding], version: str) -> dict[str, Any]:
    """What the file of encodings holds, for ``json.dump``.

    Raises:
        ValueError: an activation has a grid per channel, which version 1.0.0 cannot say.
    """
    encodings = list(encodings)
    if version == "2.0.0":
        return {"version": version, "encodings": [_as_2_0_0(encoding) for encoding in encodings]}
    for encoding in encodings:
        if encoding.axis is not None and not encoding.is_parameter:
            raise ValueError(
                f"version must be '2.0.0' for activations with a grid per channel, got {version!r} and {encoding.name}"
            )
    return {
        "version": version,
        "activation_encodings": [_as_1_0_0(encoding) for encoding in encodings if not encoding.is_parameter],
        "param_encodings": [_as_1_0_0(encoding) for encoding in encodings if encoding.is_parameter],
    }


def _as_1_0_0(encoding: Encoding) -> dict[str, Any]:
    lowest = -(2 ** (encoding.bits - 1)) if encoding.signed else 0
    return {
        "name": encoding.name,
        "enc_type": "PER_TENSOR" if encoding.axis is None else "PER_CHANNEL",
        "dtype": "INT",
        "bw": encoding.bits,
        # Converters take the offset of what is symmetric for half of the range, whatever it says: unsigned codes from a
        # zero point of 0, which are symmetric in their way, may not be called so.
        "is_sym": encoding.signed and not any(encoding.zero_point),
        "scale": list(encoding.scale),
        "offset": [lowest - zero_point for zero_point in encoding.zero_point],
    }


def _as_2_0_0(encoding: Encoding) -> dict[str, Any]:
    # As AIMET does, activations are unsigned: the same values, which every kind of accelerator has.
    raised = encoding.signed and not encoding.is_parameter
    zero_point = [number + 2 ** (encoding.bits - 1) if raised else number for number in encoding.zero_point]
    sign = "int" if encoding.signed and not raised else "uint"
    per_tensor = encoding.axis is None
    entry: dict[str, Any] = {
        "name": encoding.name,
        "output_dtype": f"{sign}{encoding.bits}",
        "y_scale": encoding.scale[0] if per_tensor else list(encoding.scale),
    }
    if any(zero_point):
        entry["y_zero_point"] = zero_point[0] if per_tensor else zero_point
    if not per_tensor:
        entry["axis"] = encoding.axis
    return entry
