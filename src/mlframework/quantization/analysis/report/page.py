"""The page: one HTML file that loads nothing."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from importlib import resources
from typing import Any

from ..optional import required
from ..sensitivity_report import SensitivityReport
from . import figures
from .collect import ReportData
from .histograms import TensorHistogram
from .rows import Row, rows_of
from .tree import strip, tree

_COLUMNS = (
    ("#", True),
    ("layer", False),
    ("kind", False),
    ("form", False),
    ("W", True),
    ("A", True),
    ("dB", True),
    ("own dB", True),
    ("of error", True),
    ("weight", True),
    ("clipped", True),
    ("rounded", True),
    ("constant", True),
    ("share clipped", True),
    ("peak", True),
    ("channels", True),
    ("work", True),
)


def page(data: ReportData) -> str:
    """The whole file.

    Raises:
        ImportError: Plotly is not installed.
    """
    offline = required("plotly.offline", "report")
    rows = rows_of(data)
    sections = [
        _section("layers", "Layers", _LAYERS, _table(rows, data)),
        _section(
            "network", "Signal to noise along the network", _ALONG, _plot(figures.signal_to_noise(data.explanation))
        ),
        *_sensitivity(data.sensitivity),
        _section("tensors", "Tensors", _TENSORS, _choice(_histograms(data.histograms))),
        *_training(data),
        *([_section("outputs", "Outputs", _OUTPUTS, _plot(figures.outputs(data.outputs)))] if data.outputs else []),
        _section("graph", "What computes on integers", _GRAPH, _graph(rows, data)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(text for _, _, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(data.title)}: quantization</title><style>{_resource('page.css')}</style>"
        f"<script>{offline.get_plotlyjs()}</script></head><body><main>"
        f"<h1>{html.escape(data.title)}</h1>"
        f'<p class="subtitle">quantized for {html.escape(data.preparation.target)}</p>'
        f"{_cards(data)}{_verdict(data)}<nav>{links}</nav>{body}"
        "<footer>Made by mlframework.quantization. Decibels are 10 log<sub>10</sub> of the signal's energy over the "
        "error's: at 20 dB the error is a tenth of the signal, at 40 dB a hundredth.</footer>"
        f"</main><script>{_resource('page.js')}</script></body></html>\n"
    )


_LAYERS = (
    "Every layer and operation in the order of the graph. <b>dB</b> is the signal-to-noise ratio of its output in the "
    "quantized network, <b>own dB</b> what it would be with a float input; its own error is taken apart into the "
    "weight's, what the range clips and what rounding adds (each relative to the output's energy); <b>constant</b> is "
    "the share of it that is the same at every position of a channel. <b>W</b> and <b>A</b> are bits; <b>peak</b> is "
    "the largest value in root mean squares, <b>channels</b> the widest channel beside the median one, <b>work</b> the "
    "share of the multiply-adds. Click a header to sort, a layer to see its values."
)
_ALONG = "Where the two lines are close, the error comes in; where they are apart, it arrives from before."
_SENSITIVITY = (
    "The error of the outputs where one layer alone is quantized, weight and input: the longer, the more it costs to "
    "quantize this layer."
)
_ACTIVATIONS = "The error of the outputs where one activation alone is on its grid, for whatever reads it."
_TENSORS = (
    "Values in float and the range of the grid that they are put on (shaded). What lies outside, in red, is clipped. A "
    "weight is drawn in steps of its channel's scale."
)
_RANGES = "How ranges of activations and scales of weights moved while the model trained."
_OSCILLATION = (
    "The share of each layer's weights whose integer still goes to and fro at the end. Such weights stand at a "
    "boundary between two integers; training leaves them on either side by chance."
)
_FLIPS = "The share of each layer's weights whose integer changed from one record to the next."
_OUTPUTS = "A sample of the network's outputs, in float and quantized. Without error all would lie on the line."
_GRAPH = "The network from its input to its output, one cell for each operation, and the tree of its modules."


def _section(name: str, title: str, caption: str, content: str) -> tuple[str, str, str]:
    text = f'<section id="{name}"><h2>{title}</h2><p>{caption}</p>{content}</section>'
    return name, title, text


def _cards(data: ReportData) -> str:
    outputs, preparation = data.explanation.outputs, data.preparation
    cards = [(_decibels(outputs.snr), "signal to noise of the outputs")]
    if outputs.agreement is not None:
        cards.append((f"{outputs.agreement:.1%}", "same class as float"))
    cards += [
        (str(preparation.multiply_adds), "of the multiply-adds on integers"),
        (str(preparation.weights), "of the weights quantized"),
        (f"{len(preparation.quantized)} / {len(preparation.entries)}", "layers and operations on integers"),
    ]
    clipped = max((tensor.clipped_share for tensor in data.histograms), default=0.0)
    cards.append((f"{clipped:.2%}", "clipped in the tensor where it is most"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{html.escape(value)}</b><span>{label}</span></div>' for value, label in cards)
        + "</div>"
    )


def _verdict(data: ReportData) -> str:
    explanation = data.explanation
    items = "".join(
        f"<li><code>{html.escape(', '.join(names))}</code>: {html.escape(advice)}</li>"
        for advice, names in explanation.advices.items()
    )
    kind = "verdict bad" if explanation.bad else "verdict"
    trained = (
        " Weights were trained since: what training changed counts as an error, too." if explanation.trained else ""
    )
    verdict = explanation.verdict[0].upper() + explanation.verdict[1:]
    return (
        f'<section class="{kind}"><p>{html.escape(verdict)}.{trained}</p>'
        f"{f'<ul>{items}</ul>' if items else ''}</section>"
    )


def _table(rows: list[Row], data: ReportData) -> str:
    total = data.preparation.multiply_adds.total
    header = "".join(f'<th class="{"number" if number else ""}">{title}</th>' for title, number in _COLUMNS)
    lines = [_line(index, row, total, data.explanation.threshold) for index, row in enumerate(rows, 1)]
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(index: int, row: Row, total: int, threshold: float) -> str:
    form = "int8" if row.is_integer else "float"
    chip = f'<span class="chip {"integer" if row.is_integer else "float"}">{form}</span>'
    cells = [
        _number(float(index), str(index)),
        f'<td class="layer" data-value="{html.escape(row.name)}" title="{html.escape(row.entry.detail)}">'
        f"{html.escape(row.entry.name or '(the model)')}</td>",
        f'<td data-value="{html.escape(row.kind)}">{html.escape(row.kind)}</td>',
        f'<td data-value="{form}">{chip}</td>',
    ]
    layer = row.measured
    if layer is None:
        cells += [_number(math.inf, "")] * (len(_COLUMNS) - 5)
    else:
        own = layer.own
        cells += [
            *(_number(bits or 99, str(bits or "")) for bits in (layer.weight_bits, layer.activation_bits)),
            _number(layer.snr, _plain_decibels(layer.snr)),
            _number(layer.own_snr, _plain_decibels(layer.own_snr)),
            _number(layer.own_share, f"{layer.own_share:.0%}"),
            *(_number(part, f"{part:.1e}" if part else "0") for part in (own.weight, own.clipped, own.rounded)),
            _number(layer.mean_share, f"{layer.mean_share:.0%}"),
            _number(own.clipped_share, f"{own.clipped_share:.2%}" if own.clipped_share else "0"),
            _number(layer.peak, f"{layer.peak:.1f}"),
            _number(layer.channel_ratio, f"{layer.channel_ratio:.1f}"),
        ]
    work = row.entry.multiply_adds
    cells.append(_number(float(work), f"{work / total:.1%}" if work and total else ""))
    bad = layer is not None and layer.breaks(threshold)
    return f"<tr{' class=bad' if bad else ''}>{''.join(cells)}</tr>"


def _number(value: float, text: str) -> str:
    key = "1e308" if value == math.inf else "-1e308" if value == -math.inf else f"{value:.9g}"
    return f'<td class="number" data-value="{key}">{text}</td>'


def _sensitivity(report: SensitivityReport | None) -> list[tuple[str, str, str]]:
    if report is None:
        return []
    sections = [_section("sensitivity", "Sensitivity of layers", _SENSITIVITY, _plot(figures.sensitivity_bars(report)))]
    if report.activations:
        bars = _plot(figures.activation_bars(report))
        sections.append(_section("activations", "Sensitivity of activations", _ACTIVATIONS, bars))
    return sections


def _histograms(tensors: Iterable[TensorHistogram]) -> list[tuple[str, str, Any]]:
    return [(tensor.label, tensor.name, figures.histogram(tensor)) for tensor in tensors]


def _training(data: ReportData) -> list[tuple[str, str, str]]:
    sections = []
    history = data.history
    if history is not None and history.steps:
        choices = [
            (name, name, figures.ranges_over_training(history, name)) for name in (*history.ranges, *_weights(history))
        ]
        sections.append(_section("ranges", "Ranges over training", _RANGES, _choice(choices)))
    if data.oscillation:
        sections.append(
            _section(
                "oscillation",
                "Oscillating weights",
                _OSCILLATION,
                _plot(figures.oscillation_bars(dict(data.oscillation))),
            )
        )
    if history is not None and history.steps:
        sections.append(_section("flips", "Integers that changed", _FLIPS, _plot(figures.flips_over_training(history))))
    return sections


def _weights(history: Any) -> list[str]:
    return [name for name in history.scales if name not in history.ranges]


def _graph(rows: list[Row], data: ReportData) -> str:
    legend = (
        '<div class="legend"><i style="background:var(--integer)"></i>on integers'
        '<i style="background:var(--float)"></i>in float'
        '<i style="outline:2px solid var(--bad)"></i>breaks</div>'
    )
    return legend + strip(rows, data.explanation.threshold) + tree(rows, data.title)


def _plot(figure: Any) -> str:
    io = required("plotly.io", "report")
    options = {"responsive": True, "displaylogo": False}
    text: str = io.to_html(figure, full_html=False, include_plotlyjs=False, config=options)
    return text


def _choice(choices: list[tuple[str, str, Any]]) -> str:
    """One figure of many at a time: each a label, the layer that it is of, and the figure."""
    found = {label: json.loads(figure.to_json()) for label, _, figure in choices}
    text = json.dumps(found).replace("<", "\\u003c")  # or a name could end the script
    options = "".join(
        f'<option data-layer="{html.escape(layer)}">{html.escape(label)}</option>' for label, layer, _ in choices
    )
    return (
        f'<div class="choice"><select aria-label="tensor">{options}</select><div class="place"></div>'
        f'<script type="application/json">{text}</script></div>'
    )


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _plain_decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
