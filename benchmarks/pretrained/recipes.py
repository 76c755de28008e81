"""This library's methods. A new one is a function from a task to a prepared model, and a line in ``RECIPES``."""

from __future__ import annotations

import copy
import glob
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import torch
from torch import nn

from mlframework.quantization import (
    ActivationObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    QATConfig,
    Recipe,
    analyze_sensitivity,
    calibrate,
    distillation_loss,
    finetune,
    prepare,
    recommended_recipe,
)

from .methods import OURS, Method, Task
from .protocol import Inputs


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


def one_layer_float(task: Task) -> nn.Module:
    """Weights rounded, and the layer in float that the outputs gain most by: ``all_but`` of the sensitivity."""
    study, (weight_bits, activation_bits) = task.study, task.width
    batches = study.calibration_batches()
    sensitivity = analyze_sensitivity(
        post_training(task), batches[:SENSITIVITY_BATCHES], (weight_bits,), activations=False
    )
    worst = max(sensitivity.layers, key=lambda layer: layer.all_but.snr)
    config = QATConfig(weight_bits=weight_bits, activation_bits=activation_bits, skip=(glob.escape(worst.name),))
    prepared = prepare(study.model(), config, study.example_inputs)
    calibrate(prepared, batches, method=("round_weights",))
    return prepared.eval()


def recommended(task: Task) -> nn.Module:
    """What :func:`recommended_recipe` says, for as many steps as the budget has."""
    study, (few, more) = task.study, TRIALS
    teacher = study.model()
    recipe = recommended_recipe(task.width, more, study.model())  # to prepare and to calibrate, alike for all steps
    calibrated = _calibrated(task, recipe)

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


def _calibrated(task: Task, recipe: Recipe) -> nn.Module:
    """On the batches for calibration, or on some to train on beside them: what is nearer to the float network on
    others to train on."""
    study = task.study
    batches = [batch.inputs for batch in islice(study.train_batches(task.seed), ALSO_CALIBRATED_ON + COMPARED_ON)]
    also, others = batches[:ALSO_CALIBRATED_ON], batches[ALSO_CALIBRATED_ON:]
    models = []
    for chosen in (study.calibration_batches(), [*study.calibration_batches(), *also]):
        model = prepare(study.model(), recipe.config, study.example_inputs)
        calibrate(model, chosen, method=recipe.calibration)
        models.append(model)
    few, many = (_distance(study.model(), model.eval(), others) for model in models)
    task.notes.update(also_calibrated_on=len(also) if many < few else 0)
    return models[many < few]


def _distance(teacher: nn.Module, model: nn.Module, batches: Sequence[Inputs]) -> float:
    with torch.no_grad():
        return sum(distillation_loss(model(*inputs), teacher(*inputs)).item() for inputs in batches)


SENSITIVITY_BATCHES = 2
ALSO_CALIBRATED_ON = 12  # batches to train on
COMPARED_ON = 4  # of the same
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
    "one layer float": _ours(one_layer_float),
    "recommended recipe": _ours(recommended, trains=True),
}
