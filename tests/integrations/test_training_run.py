"""What the callbacks of all trainers do alike, of models that ``torch.compile`` made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlframework.quantization import QATConfig, prepare, quantization_metrics
from mlframework.quantization.integrations.training_run import TrainingRun

# The compiler warns of its own internals while it traces.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default:::torch"),
    pytest.mark.usefixtures("fresh_compiler"),
]

INPUTS = torch.randn(8, 6)


def test_figures_of_a_compiled_model_are_logged_or_a_warning_says_that_they_are_not() -> None:
    """And those of a batch that is given are those of the plain model: its graph would not call the hooks that look
    inside."""
    model = prepare(nn.Linear(6, 2), QATConfig(), (INPUTS,))
    model(INPUTS)
    expected, scales = quantization_metrics(model, INPUTS), quantization_metrics(model)
    run = TrainingRun(model, {}, 1)
    run.called = torch.compile(model, backend="eager", fullgraph=True)  # type: ignore[assignment]
    for _ in range(2):
        run.before_batch()
        run.called(INPUTS).sum().backward()
        figures = run.after_step()
        assert figures is not None
        assert figures.keys() == expected.keys() > scales.keys()

    model.compile(backend="eager", fullgraph=True)
    run = TrainingRun(model, {}, 1)
    run.before_batch()
    model(INPUTS).sum().backward()
    with pytest.warns(UserWarning, match=r"is compiled.*scales alone.* log_quantization\(model, writer, step, batch\)"):
        figures = run.after_step()
    assert figures is not None
    assert figures.keys() == scales.keys()
    run.before_batch()
    model(INPUTS).sum().backward()
    run.after_step()  # says it once
    with torch.no_grad():
        model.eval()(INPUTS)
    given = quantization_metrics(model, INPUTS)
    assert given.keys() == expected.keys()
    with torch.compiler.set_stance("force_eager"):
        assert given == quantization_metrics(model, INPUTS)
