"""This library's methods. A new one is a function from a task to a prepared model, and a line in ``RECIPES``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from mlframework.quantization import (
    ActivationObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    QATConfig,
    calibrate,
    parameter_groups,
    prepare,
)

from .methods import OURS, Method, Task
from .training import distill, scale_learning_rate


def post_training(
    task: Task, observer: Callable[[], ActivationObserver] | None = None, learnable: bool = False
) -> nn.Module:
    """Prepared and calibrated; with the default observer where none is named."""
    choice = {} if observer is None else {"activation_observer": observer}
    weight_bits, activation_bits = task.width
    config = QATConfig(weight_bits=weight_bits, activation_bits=activation_bits, learnable=learnable, **choice)
    prepared = prepare(task.study.model(), config, task.study.example_inputs)
    calibrate(prepared, task.study.calibration_batches())
    return prepared.eval()


def trained(task: Task, learnable: bool) -> nn.Module:
    """Post-training quantization, then distillation; scales observed, or learned from where rounding errs least."""
    prepared = post_training(task, HistogramObserver if learnable else None, learnable)
    groups = parameter_groups(prepared, quantization_learning_rate=scale_learning_rate(task))
    task.notes["steps"] = distill(prepared.train(), task.study, task.seed, task.seconds, groups)
    return prepared.eval()


_ours = partial(Method, OURS, distribution="mlframework-quantization")

RECIPES: dict[str, Method] = {
    "post-training": _ours(post_training),
    "minmax": _ours(partial(post_training, observer=MinMaxObserver)),
    "moving average": _ours(partial(post_training, observer=MovingAverageObserver)),
    "percentile": _ours(partial(post_training, observer=PercentileObserver)),
    "least squares": _ours(partial(post_training, observer=HistogramObserver)),
    "QAT observed": _ours(partial(trained, learnable=False), trains=True),
    "QAT learned": _ours(partial(trained, learnable=True), trains=True),
}
