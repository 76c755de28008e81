"""``plots``: the figures of a report as PNGs, for papers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..explanation import Explanation
from ..history import QuantizationHistory
from ..optional import required
from ..sensitivity_report import SensitivityReport
from .collect import ReportData, collected
from .figures import BAD, FLOAT, INTEGER, OWN, WIDTHS, drawn_decibels, drawn_error
from .histograms import TensorHistogram

_MOST_TENSORS = 24
_COLUMNS = 4


def plots(
    model: nn.Module,
    batches: Iterable[Any],
    folder: str | os.PathLike[str] = "plots",
    *,
    float_model: nn.Module | None = None,
    sensitivity: SensitivityReport | None = None,
    history: QuantizationHistory | None = None,
    oscillation: Mapping[str, float] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    dpi: int = 200,
) -> list[Path]:
    """Writes the figures of :func:`report` as PNGs, drawn by Matplotlib.

    ``signal_to_noise.png``, ``tensors.png`` (the 24 tensors of which most is clipped, then those of the first layers)
    and ``outputs.png``; with what they show given, ``sensitivity.png``, ``ranges.png``, ``oscillation.png``.

    Args:
        model, batches, float_model, sensitivity, history, oscillation, inputs: as for :func:`report`.
        folder: where to; it is made where it is missing.
        dpi: dots per inch.

    Returns:
        The files.

    Raises:
        TypeError, ValueError: as :func:`report`.
        ImportError: Matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> prepared = prepare(nn.Linear(8, 4), QATConfig(), (torch.randn(1, 8),))
        >>> calibrate(prepared, [torch.randn(32, 8)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in plots(prepared, [torch.randn(32, 8)], folder)]
        ['signal_to_noise.png', 'tensors.png', 'outputs.png']
    """
    required("matplotlib.figure", "plots")
    data = collected(model, batches, float_model, sensitivity, history, oscillation, inputs, None)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(data).items():
        path = target / f"{name}.png"
        figure.savefig(path, dpi=dpi, bbox_inches="tight")
        written.append(path)
    return written


def _figures(data: ReportData) -> dict[str, Any]:
    figures = {"signal_to_noise": _signal_to_noise(data.explanation), "tensors": _tensors(data.histograms)}
    if data.outputs:
        figures["outputs"] = _outputs(data.outputs)
    if data.sensitivity is not None:
        figures["sensitivity"] = _sensitivity(data.sensitivity)
    if data.history is not None and data.history.steps:
        figures["ranges"] = _ranges(data.history)
    if data.oscillation:
        figures["oscillation"] = _oscillation(data.oscillation)
    return figures


def _axes(width: float, height: float) -> tuple[Any, Any]:
    # Of no figure manager: nothing is shown, and nothing of the user's own settings for windows changes.
    figure = required("matplotlib.figure", "plots").Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _signal_to_noise(explanation: Explanation) -> Any:
    layers = explanation.layers
    figure, axes = _axes(7, 2.8)
    places = range(1, len(layers) + 1)
    for label, values, colour in (
        ("in the quantized network", [layer.snr for layer in layers], INTEGER),
        ("by itself, of a float input", [layer.own_snr for layer in layers], OWN),
    ):
        axes.plot(places, [drawn_decibels(value) for value in values], "o-", ms=3, lw=1.2, color=colour, label=label)
    axes.axhline(explanation.threshold, color=BAD, lw=0.8, ls=":")
    axes.set_xlabel("place in the network")
    axes.set_ylabel("signal to noise, dB")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _tensors(tensors: Iterable[TensorHistogram]) -> Any:
    drawn = sorted(tensors, key=lambda tensor: -tensor.clipped_share)[:_MOST_TENSORS]
    rows = -(-len(drawn) // _COLUMNS)
    figure = required("matplotlib.figure", "plots").Figure(figsize=(10, 1.9 * rows), layout="constrained")
    for axes, tensor in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, drawn, strict=False):
        width = (tensor.highest - tensor.lowest) / len(tensor.counts)
        axes.bar(tensor.centres, tensor.counts, width=width, color=INTEGER)
        for end in (tensor.range_low, tensor.range_high):
            axes.axvline(end, color=BAD, lw=0.8, ls="--")
        axes.set_yscale("log")
        axes.set_title(f"{tensor.label}\n{tensor.clipped_share:.3%} clipped", fontsize=7)
        axes.tick_params(labelsize=6)
    for axes in figure.axes[len(drawn) :]:
        axes.set_visible(False)
    return figure


def _outputs(pairs: tuple[tuple[float, float], ...]) -> Any:
    ones, others = zip(*pairs, strict=True)
    figure, axes = _axes(3.6, 3.6)
    ends = [min(*ones, *others), max(*ones, *others)]
    axes.plot(ends, ends, color="#9ca3af", lw=0.8)
    axes.scatter(ones, others, s=6, alpha=0.4, color=INTEGER, linewidths=0)
    axes.set_xlabel("float")
    axes.set_ylabel("int8")
    return figure


def _sensitivity(report: SensitivityReport) -> Any:
    names = [name or "(the model)" for name in report.names]
    figure, axes = _axes(7, 0.8 + 0.26 * len(names))
    height = 0.8 / len(report.bits)
    for index, bits in enumerate(report.bits):
        errors = [drawn_error(layer.alone.relative_error) for layer in report.at(bits)]
        places = [place + index * height for place in range(len(names))]
        axes.barh(places, errors, height, color=WIDTHS[index % len(WIDTHS)], label=f"{bits} bits")
    axes.set_xscale("log")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("relative squared error of the outputs")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _ranges(history: QuantizationHistory) -> Any:
    figure, axes = _axes(7, 3)
    for ranges in history.ranges.values():
        axes.plot(history.steps, [high - low for low, high in ranges], lw=0.9, color=INTEGER, alpha=0.5)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_xlabel("training step")
    axes.set_ylabel("width of an activation's range")
    return figure


def _oscillation(oscillation: Mapping[str, float]) -> Any:
    figure, axes = _axes(7, 0.8 + 0.2 * len(oscillation))
    names = [name or "(the model)" for name in oscillation]
    axes.barh(range(len(names)), [100 * share for share in oscillation.values()], color=FLOAT)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("weights that oscillate, %")
    return figure
