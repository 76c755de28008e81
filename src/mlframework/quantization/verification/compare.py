"""``compare_outputs`` and ``verify``: is what was validated what will be deployed?"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..conversion.convert import convert
from ..graph.modes import in_evaluation
from ..int8.operations import Int8Operation
from ..preparation.batches import arguments_of, iterated
from ..qat.fake_quantize_layer import FakeQuantizeLayer
from ..qat.weight_range import ranges_kept
from .exported_outputs import ExportedOutputs
from .index_ties import IndexTies
from .onnx_session import OnnxSession, Providers, check_session_arguments
from .recording import quantized_layers, recorded_outputs
from .report import ComparisonReport, Difference, LayerComparison
from .sessions import session_of

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]


def compare_outputs(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    converted: nn.Module | None = None,
    path: str | os.PathLike[str] | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    providers: Providers | None = None,
) -> ComparisonReport:
    """Runs the prepared model in evaluation, the converted model and an exported file on the same batches, and counts
    where they differ: the integer codes of every quantized layer, and what the models return.

    On a processor where ONNX Runtime's products of uint8 and int8 saturate (x86 without VNNI; it is tried out, once per
    process), the file is run twice: with exact products (the session option ``session.x64quantprecision=1``), and as it
    was asked for. The report has both side by side; a layer agrees if it does in either.

    Args:
        model: from :func:`prepare`, with data seen; it is not changed.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        converted: what :func:`convert` made of it; made here where it is not given.
        path: what :func:`export` wrote, to be run in ONNX Runtime or, of a ``.pte`` file, in ExecuTorch, which shows
            the results alone; a batch that is a multiple of the one that such a file takes is run in parts. None
            compares without a file.
        session_options: of the session of ONNX Runtime that runs it, used as they are and not changed. Where they ask
            for exact products themselves, there is this one session.
        providers: what executes it, as ``onnxruntime.InferenceSession`` takes them: names, or tuples of a name and
            options; the CPU by default. With any other than the CPU's there is one session.

    Raises:
        TypeError: the model is not prepared, a batch does not fit its forward, ``batches`` is itself a batch, or
            ``session_options`` or ``providers`` is not of its type.
        ValueError: there are no batches, the models are not of one and the same network, a provider is not available,
            or there are options or providers for no file.
        ImportError: ``path`` is given and its engine is not installed.

    Example:
        >>> prepared = prepare(nn.Linear(4, 2), QATConfig(quantize_last_linear=True), (torch.randn(1, 4),))
        >>> calibrate(prepared, [torch.randn(16, 4)])
        >>> compare_outputs(prepared, [torch.randn(8, 4)]).agrees
        True
    """
    check_session_arguments(path, session_options, providers)
    converted = convert(model) if converted is None else converted
    nodes = _shared_layers(model, converted)
    session = None if path is None else session_of(path, nodes, session_options, providers)
    saturating: OnnxSession | None = None
    if isinstance(session, OnnxSession) and session.saturates:
        session, saturating = session.with_exact_products(), session
    layers: dict[str, LayerComparison] = {}
    results: dict[str, LayerComparison] = {}
    seen = 0
    with in_evaluation(model, converted), torch.no_grad(), ranges_kept(model):
        for batch in iterated(batches):
            args, kwargs = arguments_of(model, batch)
            with recorded_outputs(model, nodes) as prepared_outputs:
                expected = model(*args, **kwargs)
            with recorded_outputs(converted, nodes) as outputs:
                actual = converted(*args, **kwargs)
            exported = [
                ExportedOutputs({}, None) if one is None else one.run(model, args, kwargs)
                for one in (session, saturating)
            ]
            for name in outputs:
                kind = _kind(converted.get_submodule(name))
                shown = [one.layers.get(name) for one in exported]
                comparison = _layer(name, kind, nodes[name], prepared_outputs[name], outputs[name], shown)
                _accumulate(layers, comparison)
            ties = functools.partial(IndexTies, converted, args, kwargs)
            for comparison in _results(expected, actual, [one.results for one in exported], ties):
                _accumulate(results, comparison)
            seen += 1
    if seen == 0:
        raise ValueError("batches must hold at least one batch, got none")
    report = ComparisonReport((*layers.values(), *results.values()))
    return report if session is None else replace(report, engine=session.engine)


class VerificationError(AssertionError):
    """The models differ.

    Attributes:
        report: where, and by how much.
    """

    def __init__(self, report: ComparisonReport) -> None:
        super().__init__(str(report))
        self.report = report


def verify(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    converted: nn.Module | None = None,
    path: str | os.PathLike[str] | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    providers: Providers | None = None,
    float_tolerance: float = 0.0,
) -> ComparisonReport:
    """:func:`compare_outputs` that raises where anything differs: a test to put before a deployment.

    What saturates alone raises nothing: the file is right, and the processor's plain products are not. There is one
    ``UserWarning`` then, which says how much differs and what to do about it.

    Args:
        model, batches, converted, path, session_options, providers: as there.
        float_tolerance: by how much floats that the engine computes (a softmax after the last layer; in ExecuTorch also
            a sigmoid between layers, whose codes it does not show) may differ, in their own unit: no two libraries
            round float functions alike. Codes may never differ.

    Raises:
        VerificationError: something differs (in both sessions, where there are two); its message is the report's table.

    Example:
        >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), QATConfig(reduce_range=True),
        ...                    (torch.randn(1, 4),))  # the largest weights that saturate on no processor
        >>> calibrate(prepared, [torch.randn(32, 4)])
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.onnx")
        ...     export_onnx(prepared, (torch.randn(1, 4),), path)
        ...     report = verify(prepared, [torch.randn(8, 4)], path=path)
        >>> report.agrees, report.saturates
        (True, False)
    """
    report = compare_outputs(
        model,
        batches,
        converted=converted,
        path=path,
        session_options=session_options,
        providers=providers,
    )
    if not all(layer.agrees or _within(layer, float_tolerance) for layer in report.layers):
        raise VerificationError(report)
    if report.saturates:
        warnings.warn(str(report.saturation), stacklevel=2)
    return report


def _within(layer: LayerComparison, tolerance: float) -> bool:
    exact = layer.converted.differing == 0 and layer.compared == "floats"
    sessions = (layer.exported, layer.exported_saturating)
    return exact and any(each is not None and each.largest <= tolerance for each in sessions)


def _shared_layers(model: nn.Module, converted: nn.Module) -> dict[str, FakeQuantizeLayer | None]:
    """The quantized layers of the prepared model that stand in the converted one under the same names."""
    names = {name for name, _ in converted.named_modules()}
    nodes = {name: node for name, node in quantized_layers(model).items() if name in names}
    if not nodes:
        raise ValueError(
            "converted must be the converted form of model, got one that shares no quantized layer with it"
        )
    return nodes


def _kind(module: nn.Module) -> str:
    return str(module.operation) if isinstance(module, Int8Operation) else type(module).__name__


def _layer(
    name: str,
    kind: str,
    node: FakeQuantizeLayer | None,
    prepared: list[Tensor],
    converted: list[Tensor],
    exported: list[Tensor | None],
) -> LayerComparison:
    """One layer on one batch. What the prepared model gives are floats; on a grid, each stands for a code."""

    def codes(value: Tensor) -> Tensor:
        return value if node is None or not value.is_floating_point() else node.to_codes(value)

    def same_codes(value: Tensor) -> Tensor:
        # A file may hold codes of a signed grid as unsigned ones, 128 above.
        raised = node is not None and value.dtype is torch.uint8 and node.scheme.signed
        return value.to(torch.int16) - 128 if raised else codes(value)

    def in_shape(value: Tensor) -> Tensor:
        # A file computes a linear layer on rows, whatever the axes before the last.
        is_in_rows = value.dim() == 2 and value.shape[-1:] == actual[-1].shape[-1:]
        return value.reshape(actual[-1].shape) if is_in_rows and value.numel() == actual[-1].numel() else value

    expected, actual = list(map(codes, prepared)), list(map(codes, converted))
    known = [None if value is None else in_shape(same_codes(value)) for value in exported]
    return LayerComparison(
        name,
        kind,
        "floats" if node is None else "codes",
        _difference(name, expected, actual),
        *(None if value is None else _difference(name, actual[-1:], [value]) for value in known),
    )


def _results(
    expected: Any, actual: Any, exported: list[list[Tensor] | None], ties: Callable[[], IndexTies]
) -> list[LayerComparison]:
    """What the models return, tensor by tensor; of integers that differ, ``ties`` tells which are indices of equal
    values."""
    tensors = [[leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (expected, actual)]
    comparisons = []
    for index, (one, other) in enumerate(zip(*tensors, strict=True)):
        name = "output" if len(tensors[0]) == 1 else f"output {index}"
        files = [None if values is None else _difference(name, [other], [values[index]]) for values in exported]
        if not other.is_floating_point():
            for session, values in enumerate(exported):
                if values is not None and files[session] != Difference(other.numel()):
                    between = ties().between(index, other, values[index])
                    files[session] = Difference.between(other, values[index], between)
        comparisons.append(LayerComparison(name, "result", "floats", _difference(name, [one], [other]), *files))
    return comparisons


def _difference(name: str, ones: list[Tensor], others: list[Tensor]) -> Difference:
    if [tuple(one.shape) for one in ones] != [tuple(other.shape) for other in others]:
        raise ValueError(
            f"converted and path must be of the same network as model, got other shapes at {name}: "
            f"{[tuple(one.shape) for one in ones]} and {[tuple(other.shape) for other in others]}"
        )
    return sum(map(Difference.between, ones, others), Difference())


def _accumulate(comparisons: dict[str, LayerComparison], new: LayerComparison) -> None:
    """Adds one batch's comparison to those of the batches before."""
    before = comparisons.setdefault(new.name, new)
    if before is not new:
        comparisons[new.name] = replace(
            before,
            converted=before.converted + new.converted,
            exported=_sum(before.exported, new.exported),
            exported_saturating=_sum(before.exported_saturating, new.exported_saturating),
        )


def _sum(one: Difference | None, other: Difference | None) -> Difference | None:
    return None if one is None or other is None else one + other
