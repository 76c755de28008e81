"""The figures of a page, made with Plotly."""

from __future__ import annotations

import math
from typing import Any

from ..explanation import Explanation
from ..history import QuantizationHistory
from ..measures import Measure
from ..optional import required
from ..sensitivity_report import SensitivityReport
from .histograms import TensorHistogram

INTEGER, FLOAT, BAD, OWN = "#2563eb", "#d97706", "#dc2626", "#0d9488"
WIDTHS = ("#1e3a8a", "#2563eb", "#0891b2", "#0d9488", "#d97706", "#dc2626", "#9333ea")
_GRID = "#e5e7eb"
_LEAST_ERROR, _MOST_ERROR = 1e-12, 1e2  # none at all, and an infinite one, are drawn here
_MOST_DECIBELS = 80.0


def signal_to_noise(explanation: Explanation) -> Any:
    """Along the network: the ratio of each output in the quantized network, and with a float input."""
    layers = explanation.layers
    places = list(range(1, len(layers) + 1))
    names = [layer.name for layer in layers]
    figure = _figure(height=360)
    graph = required("plotly.graph_objects", "report")
    for label, values, colour in (
        ("in the quantized network", [layer.snr for layer in layers], INTEGER),
        ("by itself, of a float input", [layer.own_snr for layer in layers], OWN),
    ):
        figure.add_trace(
            graph.Scatter(
                x=places,
                y=[drawn_decibels(value) for value in values],
                mode="lines+markers",
                name=label,
                text=names,
                hovertemplate="%{text}<br>%{y:.1f} dB<extra>" + label + "</extra>",
                line={"color": colour, "width": 2},
                marker={"size": 5},
            )
        )
    bad = [(place, layer) for place, layer in zip(places, layers, strict=True) if layer.breaks(explanation.threshold)]
    if bad:
        figure.add_trace(
            graph.Scatter(
                x=[place for place, _ in bad],
                y=[drawn_decibels(layer.snr) for _, layer in bad],
                mode="markers",
                name="breaks",
                text=[layer.name for _, layer in bad],
                hovertemplate="%{text}<br>%{y:.1f} dB<extra>breaks</extra>",
                marker={"color": BAD, "size": 10, "symbol": "x"},
            )
        )
    figure.add_hline(y=explanation.threshold, line={"color": BAD, "dash": "dot", "width": 1})
    figure.update_xaxes(title="place in the network")
    figure.update_yaxes(title="signal to noise, dB")
    return figure


def sensitivity_bars(report: SensitivityReport) -> Any:
    """The error of the outputs where one layer alone is quantized, at each width."""
    names = [name or "(the model)" for name in report.names]
    bars = [(f"{bits} bits", [(layer.alone, layer.all_but) for layer in report.at(bits)]) for bits in report.bits]
    return _error_bars(names, bars)


def activation_bars(report: SensitivityReport) -> Any:
    """The error of the outputs where one activation alone is on its grid."""
    names = [f"{each.name or '(the model)'}: {each.role}" for each in report.activations]
    return _error_bars(names, [("as prepared", [(each.alone, each.all_but) for each in report.activations])])


def _error_bars(names: list[str], bars: list[tuple[str, list[tuple[Measure, Measure]]]]) -> Any:
    """Horizontal bars on a logarithmic axis: of each series its label, and for every name two measures, of which the
    first is drawn."""
    graph = required("plotly.graph_objects", "report")
    figure = _figure(height=110 + (8 + 10 * len(bars)) * len(names))
    errors = []
    for index, (label, measures) in enumerate(bars):
        drawn = [drawn_error(alone.relative_error) for alone, _ in measures]
        errors += drawn
        figure.add_trace(
            graph.Bar(
                x=drawn,
                y=names,
                orientation="h",
                name=label,
                customdata=[[drawn_decibels(alone.snr), drawn_decibels(all_but.snr)] for alone, all_but in measures],
                hovertemplate="%{y}<br>alone %{customdata[0]:.1f} dB<br>all but it %{customdata[1]:.1f} dB"
                f"<extra>{label}</extra>",
                marker={"color": WIDTHS[index % len(WIDTHS)]},
            )
        )
    ends = [math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))]
    figure.update_xaxes(
        type="log", range=ends, title="relative squared error of the outputs", dtick=1, exponentformat="power"
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(barmode="group", bargap=0.3)
    return figure


def histogram(tensor: TensorHistogram) -> Any:
    """A tensor's values, and the range of its grid."""
    graph = required("plotly.graph_objects", "report")
    figure = _figure(height=340)
    figure.add_trace(
        graph.Bar(
            x=tensor.centres,
            y=[count or None for count in tensor.counts],
            marker={"color": [_bar_colour(tensor, centre) for centre in tensor.centres], "line": {"width": 0}},
            hovertemplate="%{x:.4g}: %{y}<extra></extra>",
            showlegend=False,
        )
    )
    figure.add_vrect(x0=tensor.range_low, x1=tensor.range_high, fillcolor=INTEGER, opacity=0.07, line={"width": 0})
    for end in (tensor.range_low, tensor.range_high):
        figure.add_vline(x=end, line={"color": INTEGER, "width": 1.5, "dash": "dash"})
    clipped = f"{tensor.clipped_share:.3%} clipped" if tensor.clipped_share else "nothing clipped"
    figure.update_layout(title={"text": f"{tensor.grid}; {clipped}", "font": {"size": 13}}, bargap=0.05)
    figure.update_xaxes(title="steps of the channel's scale" if tensor.role == "weight" else "value")
    figure.update_yaxes(type="log", title="values", exponentformat="power")
    return figure


def _bar_colour(tensor: TensorHistogram, centre: float) -> str:
    return INTEGER if tensor.range_low <= centre <= tensor.range_high else BAD


def ranges_over_training(history: QuantizationHistory, name: str) -> Any:
    """The range of an activation's grid, or the scale of a weight's, at each record."""
    graph = required("plotly.graph_objects", "report")
    figure = _figure(height=320)
    if name in history.ranges:
        lows, highs = zip(*history.ranges[name], strict=True)
        line = {"color": INTEGER, "width": 2}
        figure.add_trace(graph.Scatter(x=history.steps, y=lows, name="lowest value", line=line, showlegend=False))
        figure.add_trace(
            graph.Scatter(
                x=history.steps,
                y=highs,
                name="highest value",
                line=line,
                fill="tonexty",
                fillcolor="rgba(37,99,235,0.12)",
                showlegend=False,
            )
        )
        figure.update_yaxes(title="range of the grid")
    else:
        line = {"color": OWN, "width": 2}
        figure.add_trace(graph.Scatter(x=history.steps, y=history.scales[name], name="scale", line=line))
        figure.update_yaxes(title="scale (median over channels)", exponentformat="power")
    figure.update_xaxes(title="training step")
    return figure


def oscillation_bars(oscillation: dict[str, float]) -> Any:
    """The share of each layer's weights that oscillate."""
    graph = required("plotly.graph_objects", "report")
    names = [name or "(the model)" for name in oscillation]
    figure = _figure(height=110 + 18 * len(names))
    figure.add_trace(
        graph.Bar(
            x=list(oscillation.values()),
            y=names,
            orientation="h",
            marker={"color": FLOAT},
            hovertemplate="%{y}: %{x:.3%}<extra></extra>",
            showlegend=False,
        )
    )
    figure.update_xaxes(title="share of the weights", tickformat=".2%")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def flips_over_training(history: QuantizationHistory) -> Any:
    """The share of each layer's weights whose integer changed, at each record."""
    graph = required("plotly.graph_objects", "report")
    names = [name or "(the model)" for name in history.flips]
    figure = _figure(height=110 + 18 * len(names))
    figure.add_trace(
        graph.Heatmap(
            x=history.steps,
            y=names,
            z=list(history.flips.values()),
            colorscale=[[0, "#f8fafc"], [0.25, "#bfdbfe"], [1, "#1e3a8a"]],
            colorbar={"tickformat": ".1%", "title": {"text": "share"}},
            hovertemplate="%{y}, step %{x}: %{z:.3%}<extra></extra>",
        )
    )
    figure.update_xaxes(title="training step")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def outputs(pairs: tuple[tuple[float, float], ...]) -> Any:
    """Outputs of the quantized network against those of the float one."""
    graph = required("plotly.graph_objects", "report")
    ones, others = zip(*pairs, strict=True)
    low, high = min(*ones, *others), max(*ones, *others)
    figure = _figure(height=520)
    figure.add_trace(
        graph.Scatter(
            x=[low, high], y=[low, high], mode="lines", line={"color": "#9ca3af", "width": 1}, showlegend=False
        )
    )
    figure.add_trace(
        graph.Scatter(
            x=ones,
            y=others,
            mode="markers",
            marker={"color": INTEGER, "size": 5, "opacity": 0.45},
            hovertemplate="float %{x:.4g}<br>int8 %{y:.4g}<extra></extra>",
            showlegend=False,
        )
    )
    edge = 0.04 * (high - low)
    ends = [low - edge, high + edge]
    figure.update_xaxes(title="float", range=ends)
    figure.update_yaxes(title="int8", range=ends)
    return figure


def _figure(height: int) -> Any:
    graph = required("plotly.graph_objects", "report")
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": "#9ca3af", "ticks": "outside", "automargin": True}
    return graph.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1f2937"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"bgcolor": "white"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#cbd5e1", "activecolor": INTEGER},
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def drawn_error(relative_error: float) -> float:
    """Within the ends of an axis; what is no number is drawn as infinite."""
    return _MOST_ERROR if math.isnan(relative_error) else min(max(relative_error, _LEAST_ERROR), _MOST_ERROR)


def drawn_decibels(decibels: float) -> float:
    """Within the ends of an axis; what is no number is drawn as an infinite error."""
    return -_MOST_DECIBELS if math.isnan(decibels) else min(max(decibels, -_MOST_DECIBELS), _MOST_DECIBELS)
