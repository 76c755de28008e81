"""Which engine a model is exported for, and whether it has the grids and the arithmetic of it."""

from __future__ import annotations

from dataclasses import astuple, replace

from torch import nn

from ..int8.integer_module import IntegerModule
from ..int8.integer_operation import IntegerOperation
from ..int8.operations import Int8Operation
from ..preparation.report import PreparationReport
from ..scheme import QuantizationScheme
from ..targets import TARGETS, Operations


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
    """The first layer whose grids or arithmetic are not the target's, in words; None where all are. Any number of bits
    will do."""
    engine = TARGETS[target]
    expected = {replace(grid, bits=8) for grid in (engine.activation, engine.non_negative_activation)}
    for name, schemes in activation_schemes(converted).items():
        for scheme in schemes:
            if replace(scheme, bits=8) not in expected:
                return f"{name or 'the model'} has activations in {scheme}"
    for name, module in converted.named_modules():
        if isinstance(module, Int8Operation) and not _is_form_of(module.operation, engine.operations):
            return f"{name or 'the model'} computes a {module.operation} as another engine does"
    return None


def _is_form_of(operation: IntegerOperation, forms: Operations) -> bool:
    """Whether an operation is in the form that an engine has, where there are several."""
    return type(operation) in astuple(forms) or not isinstance(operation, astuple(Operations()))


def resolved_target(
    converted: nn.Module, target: str | None, file_format: str | None = None, suffix: str | None = None
) -> str:
    """``target``, checked; where it is None, the one that the model was prepared for, or else the first that it suits.

    Args:
        converted: the model.
        target: the engine that was asked for.
        file_format: of the file, where it is given.
        suffix: of the file's name. Of engines that take the same models it tells which one is meant.

    Raises:
        TypeError: ``target`` is not a string.
        ValueError: there is no such target, its files are of another format, or the model has other grids or another
            arithmetic.
    """
    asked = target is not None
    reports = (getattr(module, "preparation_report", None) for module in converted.modules())
    target = target or next((report.target for report in reports if isinstance(report, PreparationReport)), None)
    candidates = _targets_of(file_format)
    if not asked:
        named = [name for name in candidates if f".{TARGETS[name].file_format}" == suffix]
        named = [name for name in named if suffix != ".onnx" and disagreement(converted, name) is None]
        target = named[0] if named else target
    if target is None:
        for candidate in candidates:
            if disagreement(converted, candidate) is None:
                return candidate
        reason = disagreement(converted, candidates[0])
        raise ValueError(f"model must have the grids of one target ({', '.join(candidates)}), but {reason}")
    check_target(target, file_format)
    reason = disagreement(converted, target)
    if reason is not None:
        engine = TARGETS[target]
        expected = " and ".join(sorted({str(grid) for grid in (engine.activation, engine.non_negative_activation)}))
        raise ValueError(
            f"target must be the one that the model was prepared for: {target!r} has activations in {expected}, "
            f"but {reason}"
        )
    return target


def check_target(target: str | None, file_format: str | None = None) -> None:
    """Refuses what is no target, before anything is done.

    Raises:
        TypeError: ``target`` is not a string.
        ValueError: there is no such target, or its files are of another format.
    """
    if target is None:
        return
    if not isinstance(target, str):
        raise TypeError(f"target must be a str or None, got {target!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(_targets_of(file_format))}, got {target!r}")
    own = TARGETS[target].file_format
    if file_format not in (None, own):
        raise ValueError(
            f"target must be one that reads .{file_format} files ({', '.join(_targets_of(file_format))}), got "
            f"{target!r}, which reads .{own} files: export(model, example_inputs, 'model.{own}') writes one"
        )


def _targets_of(file_format: str | None) -> list[str]:
    return [name for name, target in TARGETS.items() if file_format in (None, target.file_format)]
