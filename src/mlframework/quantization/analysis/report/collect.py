"""What a report shows, gathered in a few passes over the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...preparation.batches import iterated
from ...preparation.report import PreparationReport, preparation_report
from ..calls import Calls, calls_of, run
from ..explain import explanation_of
from ..explanation import Explanation
from ..float_reference import with_state_of
from ..history import QuantizationHistory
from ..measures import float_tensors, logits_of
from ..sensitivity_report import SensitivityReport
from ..switching import in_analysis, switch
from .histograms import TensorHistogram, histograms_of

_POINTS = 2000  # of the scatter


@dataclass(frozen=True)
class ReportData:
    """Everything on a page.

    Attributes:
        title: of the page.
        preparation: what is quantized.
        explanation: layer by layer, the error.
        histograms: of weights and activations.
        outputs: pairs of a finite output in float and quantized, sampled evenly.
        sensitivity, history: where given.
        oscillation: the share of each layer's weights that oscillate, where known.
    """

    title: str
    preparation: PreparationReport
    explanation: Explanation
    histograms: tuple[TensorHistogram, ...]
    outputs: tuple[tuple[float, float], ...]
    sensitivity: SensitivityReport | None = None
    history: QuantizationHistory | None = None
    oscillation: Mapping[str, float] | None = None


def collected(
    model: nn.Module,
    batches: Iterable[Any],
    float_model: nn.Module | None,
    sensitivity: SensitivityReport | None,
    history: QuantizationHistory | None,
    oscillation: Mapping[str, float] | None,
    inputs: Callable[[Any], Any] | None,
    title: str | None,
) -> ReportData:
    """Runs the batches and gathers what they show; arguments are those of :func:`.report`.

    Raises:
        TypeError, ValueError: as :func:`.report` says.
    """
    preparation = preparation_report(model)
    for name, value, kind in (
        ("sensitivity", sensitivity, SensitivityReport),
        ("history", history, QuantizationHistory),
        ("oscillation", oscillation, Mapping),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if oscillation is None and history is not None:
        oscillation = history.oscillation
    calls = calls_of(model, iterated(batches), inputs)
    explanation = explanation_of(model, calls, float_model)
    with in_analysis(model):
        histograms = histograms_of(model, calls)
        outputs = _outputs(model, calls, float_model if explanation.trained else None)
    return ReportData(
        type(model).__name__ if title is None else title,
        preparation,
        explanation,
        histograms,
        outputs,
        sensitivity,
        history,
        oscillation,
    )


def _outputs(model: nn.Module, calls: Calls, float_model: nn.Module | None) -> tuple[tuple[float, float], ...]:
    pairs: list[tuple[Tensor, Tensor]] = []
    for call in calls:
        switch(model, on=False)
        if float_model is None:
            expected = _main_output(run(model, call))
        else:
            with with_state_of(model, float_model):
                expected = _main_output(run(model, call))
        switch(model, on=True)
        actual = _main_output(run(model, call))
        if expected is not None and actual is not None:
            pairs.append((expected.flatten().float().cpu(), actual.flatten().float().cpu()))
    if not pairs:
        return ()
    ones, others = (torch.cat(part) for part in zip(*pairs, strict=True))
    finite = ones.isfinite() & others.isfinite()
    ones, others = ones[finite], others[finite]
    picked = torch.linspace(0, max(len(ones) - 1, 0), min(_POINTS, len(ones))).long()
    return tuple(zip(ones[picked].tolist(), others[picked].tolist(), strict=True))


def _main_output(outputs: Any) -> Tensor | None:
    logits = logits_of(outputs)
    return logits if logits is not None else next(iter(float_tensors(outputs)), None)
