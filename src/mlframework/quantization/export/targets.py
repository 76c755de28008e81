"""What each deployment engine expects of a file, and whether a model has the grids for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..int8.integer_module import IntegerModule
from ..preparation.report import PreparationReport
from ..qat.targets import TARGETS
from ..scheme import QuantizationScheme


@dataclass(frozen=True)
class Conventions:
    """How a file is written.

    Attributes:
        exact: for ONNX Runtime, integer for integer: whatever its fused operators compute in floats or leave in floats
            is written as operations on codes. Otherwise float operations between quantize and dequantize nodes
            throughout, which is what engines' pattern matchers look for.
        own_nodes_for_sums: a sum whose operand other operations read as well gets a quantize node of its own.
        unsigned_concatenations: int8 codes of a concatenation are written 128 higher, as uint8. OpenVINO (2026.4)
            computes a convolution of the signed ones wrongly.
    """

    exact: bool = False
    own_nodes_for_sums: bool = False
    unsigned_concatenations: bool = False


# In the order in which a target is looked for: the grids of TensorRT are among those of OpenVINO.
CONVENTIONS = {
    "onnxruntime": Conventions(exact=True),
    "tensorrt": Conventions(own_nodes_for_sums=True),
    "openvino": Conventions(unsigned_concatenations=True),
}


def activation_schemes(converted: nn.Module) -> dict[str, list[QuantizationScheme]]:
    """The grids of activations by the integer module that reads or makes them, in the order of the model."""
    found: dict[str, list[QuantizationScheme]] = {}
    for name, module in converted.named_modules():
        if not isinstance(module, IntegerModule):
            continue
        schemes = [vars(module).get(attribute) for attribute in ("scheme", "input_scheme", "output_scheme")]
        schemes += vars(module).get("input_schemes", ())
        found[name] = [scheme for scheme in schemes if isinstance(scheme, QuantizationScheme)]
    return found


def disagreement(converted: nn.Module, target: str) -> str | None:
    """The first layer whose grids are not the target's, in words; None where all are. Any number of bits will do."""
    grids = TARGETS[target]
    expected = {replace(grid, bits=8) for grid in (grids.activation, grids.non_negative_activation)}
    for name, schemes in activation_schemes(converted).items():
        for scheme in schemes:
            if replace(scheme, bits=8) not in expected:
                return f"{name or 'the model'} has activations in {scheme}"
    return None


def resolved_target(converted: nn.Module, target: str | None) -> str:
    """``target``, checked; where it is None, the one that the model was prepared for, or else the first whose grids it
    has.

    Raises:
        TypeError: ``target`` is not a string.
        ValueError: there is no such target, no file for it, or the model has other grids.
    """
    reports = (getattr(module, "preparation_report", None) for module in converted.modules())
    target = target or next((report.target for report in reports if isinstance(report, PreparationReport)), None)
    if target is None:
        for candidate in CONVENTIONS:
            if disagreement(converted, candidate) is None:
                return candidate
        reason = disagreement(converted, "onnxruntime")
        raise ValueError(f"model must have the grids of one target ({', '.join(CONVENTIONS)}), but {reason}")
    check_target(target)
    reason = disagreement(converted, target)
    if reason is not None:
        expected = " and ".join(
            sorted({str(grid) for grid in (TARGETS[target].activation, TARGETS[target].non_negative_activation)})
        )
        raise ValueError(
            f"target must be the one that the model was prepared for: {target!r} has activations in {expected}, "
            f"but {reason}"
        )
    return target


def check_target(target: str | None) -> None:
    """Refuses what is no target, before anything is done.

    Raises:
        TypeError: ``target`` is not a string.
        ValueError: there is no such target, or no file for it.
    """
    if target is None:
        return
    if not isinstance(target, str):
        raise TypeError(f"target must be a str or None, got {target!r}")
    if target == "executorch":
        raise ValueError(
            "target must be one that reads ONNX, got 'executorch', which reads .pte files; "
            f"for a file of the same integers prepare for one of {', '.join(CONVENTIONS)}"
        )
    if target not in CONVENTIONS:
        raise ValueError(f"target must be one of {', '.join(CONVENTIONS)}, got {target!r}")
