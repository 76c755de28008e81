"""The figures in docs/ that the benchmarks draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timing import Timing

DOCS = Path(__file__).resolve().parent.parent / "docs"
_BLUE, _GREY = "#4477aa", "#666666"
_OTHERS = ("#cc3311", "#ee7733", "#aa3377", "#228833", "#ccbb44", "#66ccee")


def draw_operator(results: Mapping[Any, Mapping[str, Timing]]) -> Path:
    """docs/fake_quantize.png: nanoseconds per element over elements, per tensor; a panel for each kind and mode.

    The keys are (kind, whether per channel, mode, elements).
    """
    kinds = list(dict.fromkeys(case[0] for case in results))
    modes = list(dict.fromkeys(case[2] for case in results))
    sizes = list(dict.fromkeys(case[3] for case in results))
    figure = Figure(figsize=(4.4 * len(kinds), 4.0 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(kinds), sharex=True, sharey="row", squeeze=False)
    colours = _operator_colours(name for timings in results.values() for name in timings)
    for row, mode in enumerate(modes):
        for column, kind in enumerate(kinds):
            axes: Axes = panels[row, column]
            races = [results[kind, False, mode, size] for size in sizes]
            for name in (name for name in races[0] if name in colours):
                times = [race[name].median * 1e6 / size for race, size in zip(races, sizes, strict=True)]
                dashes = "--" if name.startswith("`x") else "-"
                width = 2.6 if name.startswith("ours") else 1.4
                plain = name.replace("`", "")
                axes.plot(sizes, times, dashes, color=colours[name], linewidth=width, marker="o", ms=3, label=plain)
            axes.set(xscale="log", yscale="log", title=f"{kind} scale, {mode}")
            axes.legend(fontsize=8, frameon=False)
            _tidy(axes)
        panels[row, 0].set_ylabel("ns per element")
    for axes in panels[-1]:
        axes.set_xlabel("elements")
    return _save(figure, "fake_quantize.png")


def draw_steps(groups: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Path:
    """docs/training_step.png: for every title a panel of grouped bars, contender by contender, None where none ran.

    All values are relative to float32, the line at 1.
    """
    figure = Figure(figsize=(13, 4.2 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, bars) in zip(rows, panels.items(), strict=True):
        width = 0.84 / len(bars)
        positions = np.arange(len(groups))
        others = iter(_OTHERS)
        for place, (name, values) in enumerate(bars.items()):
            heights = [np.nan if value is None else value for value in values]
            offset = (place - (len(bars) - 1) / 2) * width
            if name.startswith("ours"):
                style = {"color": _BLUE, "alpha": 0.55 if "recompute" in name else 1.0}
            else:
                style = {"color": next(others)}
            drawn = axes.bar(positions + offset, heights, width, label=name, **style)
            axes.bar_label(drawn, ["" if value is None else f"{value:.2g}" for value in values], fontsize=7)
        axes.axhline(1, color=_GREY, linewidth=1, linestyle="--", label="float32")
        axes.set(title=title, xticks=positions, ylabel="times float32")
        axes.set_xticklabels(groups)
        _tidy(axes)
        axes.grid(visible=False, axis="x")
    rows[0].legend(fontsize=8, frameon=False, ncols=4)
    return _save(figure, "training_step.png")


def _operator_colours(names: Iterable[str]) -> dict[str, str]:
    """One colour a name, ours blue and the memory's speed grey; the plain operator would hide behind the layer."""
    colours: dict[str, str] = {}
    others = iter(_OTHERS)
    for name in dict.fromkeys(names):
        if name == "`x * 1.5`":
            continue
        if name.startswith("`x"):
            colours[name] = _GREY
        elif name.startswith("ours"):
            colours[name] = _BLUE if "Layer" in name else "#88bbdd"
        else:
            colours[name] = next(others)
    return colours


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _save(figure: Figure, name: str) -> Path:
    path = DOCS / name
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)
    return path
