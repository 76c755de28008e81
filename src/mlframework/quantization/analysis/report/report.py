"""``report``: a page to look at, in one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..history import QuantizationHistory
from ..sensitivity_report import SensitivityReport
from .collect import collected
from .page import page


def report(
    model: nn.Module,
    batches: Iterable[Any],
    path: str | os.PathLike[str] = "report.html",
    *,
    float_model: nn.Module | None = None,
    sensitivity: SensitivityReport | None = None,
    history: QuantizationHistory | None = None,
    oscillation: Mapping[str, float] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    title: str | None = None,
) -> Path:
    """Writes a page about a prepared model: one HTML file that loads nothing from anywhere.

    It shows what :func:`explain` finds as a table that sorts, the signal-to-noise ratio along the network, a histogram
    of every tensor with the range of its grid and the share that is clipped, outputs in float and quantized, and the
    network with its integer and its float parts; and what else is given. The model is left as it was.

    Args:
        model: prepared, and calibrated or trained.
        batches: as for :func:`calibrate`.
        path: of the file to write.
        float_model: what to compare with, as for :func:`explain`; the model with its nodes off by default.
        sensitivity: of :func:`analyze_sensitivity`.
        history: recorded during training: ranges and scales over it, and integers that changed.
        oscillation: the share of each layer's weights that oscillate, by the layer's name (an
            :class:`OscillationFreezer` knows it); that of ``history`` by default.
        inputs: called with a batch, gives what the model takes of it; the batch itself by default.
        title: of the page; the model's class by default.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: as :func:`explain`, and where something given is not of its type.
        ImportError: Plotly is not installed.

    Example:
        >>> import os, tempfile
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> prepared = prepare(network, QATConfig(), (torch.randn(1, 8),))
        >>> calibrate(prepared, [torch.randn(32, 8)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = report(prepared, [torch.randn(32, 8)], os.path.join(folder, "report.html"))
        ...     page.name, page.stat().st_size > 1_000_000  # Plotly is part of it
        ('report.html', True)
    """
    data = collected(model, batches, float_model, sensitivity, history, oscillation, inputs, title)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(data), encoding="utf-8")
    return target
