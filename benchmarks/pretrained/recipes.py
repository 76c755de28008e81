"""This library's methods. A new one is a function from a task to a prepared model, and a line in ``RECIPES``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

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
    """What :func:`recommended_recipe` says, for as many steps as the budget has; calibrated on what trains it, too."""
    study, (few, more) = task.study, TRIALS
    teacher = study.model()
    recipe = recommended_recipe(task.width, more, study.model())  # to prepare and to calibrate, alike for all steps
    calibrated = prepare(study.model(), recipe.config, study.example_inputs)
    train_batches = islice(study.train_batches(task.seed), CALIBRATED_ON)
    batches = [*study.calibration_batches(), *(batch.inputs for batch in train_batches)]
    calibrate(calibrated, batches, method=recipe.calibration)

    def run(steps: int) -> tuple[nn.Module, float]:
        prepared, recipe = copy.deepcopy(calibrated), recommended_recipe(task.width, steps, study.model())
        batches = (batch.inputs for batch in study.train_batches(task.seed))
        started = time.process_time()
        finetune(prepared, teacher, batches, steps=steps, recipe=recipe)
        return prepared, time.process_time() - started

    run(few)  # what the first step of a process plans
    short, long = run(few)[1], run(more)[1]
    step = (long - short) / (more - few)
    steps = max(more, int((task.seconds - (short - few * step)) / step))
    prepared, spent = run(steps)
    while spent > MISJUDGED * task.seconds and steps > more:
        steps = max(more, int(steps * task.seconds / spent))
        prepared, spent = run(steps)
    task.notes.update(steps=steps, seconds=spent)
    return prepared.eval()


CALIBRATED_ON = 12  # batches to train on, beside those for calibration
TRIALS = (8, 16)  # steps, which tell what a step costs and what comes before the first
MISJUDGED = 1.25  # of the budget: a training that took more is run again with fewer steps

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
