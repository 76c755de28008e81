"""This library's methods. A new one is a function from a task to a prepared model, and a line in ``RECIPES``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from mlframework.quantization import (
    ActivationObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    QATConfig,
    calibrate,
    finetune,
    prepare,
    recommended_recipe,
)

from .methods import OURS, Method, Task


def post_training(
    task: Task,
    observer: Callable[[], ActivationObserver] | None = None,
    method: Sequence[str] = (),
) -> nn.Module:
    """Prepared and calibrated, by methods of :func:`calibrate`; with the default observer where none is named."""
    weight_bits, activation_bits = task.width
    config = QATConfig(weight_bits=weight_bits, activation_bits=activation_bits, activation_observer=observer)
    prepared = prepare(task.study.model(), config, task.study.example_inputs)
    calibrate(prepared, task.study.calibration_batches(), method=method)
    return prepared.eval()


def recommended(task: Task) -> nn.Module:
    """What :func:`recommended_recipe` says, for as many steps as the budget has."""
    study = task.study
    teacher = study.model()

    def run(steps: int) -> tuple[nn.Module, float]:
        recipe = recommended_recipe(task.width, steps, study.model())
        prepared = prepare(study.model(), recipe.config, study.example_inputs)
        calibrate(prepared, study.calibration_batches(), method=recipe.calibration)
        batches = (batch.inputs for batch in study.train_batches(task.seed))
        started = time.process_time()
        finetune(prepared, teacher, batches, steps=steps, recipe=recipe)
        return prepared, time.process_time() - started

    run(1)  # what the first step of a process plans
    _, trial = run(TRIAL_STEPS)
    steps = max(1, int(task.seconds / trial * TRIAL_STEPS))
    prepared, spent = run(steps)
    task.notes.update(steps=steps, seconds=spent)
    return prepared.eval()


TRIAL_STEPS = 4  # which tell how many steps the budget has

_ours = partial(Method, OURS, distribution="mlframework-quantization")

RECIPES: dict[str, Method] = {
    "post-training": _ours(post_training),
    "minmax": _ours(partial(post_training, observer=MinMaxObserver)),
    "moving average": _ours(partial(post_training, observer=MovingAverageObserver)),
    "percentile": _ours(partial(post_training, observer=PercentileObserver)),
    "equalization": _ours(partial(post_training, method=("equalize",))),
    "smoothing": _ours(partial(post_training, method=("smooth_activations",))),
    "bias correction": _ours(partial(post_training, method=("correct_bias",))),
    "rounding": _ours(partial(post_training, method=("round_weights",))),
    "recommended recipe": _ours(recommended, trains=True),
}
