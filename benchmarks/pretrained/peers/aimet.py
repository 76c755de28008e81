"""AIMET's quantization simulation, after training and with training.

"Quantization simulation workflow" of https://quic.github.io/aimet-pages: ``prepare_model`` for functions that are not
modules, batch norm folded (or cross-layer equalization, which folds it), then ``QuantizationSimModel`` with its
configuration for weights per channel, ``compute_encodings``, and training as it is, for the encodings are Parameters.
"""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..methods import Method, Task
from ..package_files import import_alone
from ..training import distill

LIBRARY = "AIMET"


def _simulation_class() -> Any:
    """``QuantizationSimModel``, without torchvision: AIMET names some of its types, and needs none of them here."""
    import transformers
    from transformers.utils import is_torchvision_available

    assert transformers.__version__
    is_torchvision_available()  # remembered; asked while the stand-in is there, it would fail
    types = {name: type(name, (nn.Module,), {}) for name in ("RoIPool", "Resize")}
    stand_in = {
        "ops": SimpleNamespace(RoIPool=types["RoIPool"]),
        "transforms": SimpleNamespace(Resize=types["Resize"]),
        "datasets": None,
    }
    return import_alone("aimet_torch.v2.quantsim", {"torchvision": stand_in}).QuantizationSimModel


def post_training(task: Task, equalize: bool = False) -> nn.Module:
    """The simulation with encodings from the calibration batches."""
    simulation_class = _simulation_class()
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_torch.cross_layer_equalization import equalize_model
    from aimet_torch.model_preparer import prepare_model

    logging.disable(logging.WARNING)
    inputs = task.study.example_inputs
    model = prepare_model(task.study.model())
    if equalize:
        equalize_model(model, dummy_input=inputs)
    else:
        fold_all_batch_norms(model, None, dummy_input=inputs)
    weight_bits, activation_bits = task.width
    simulation = simulation_class(
        model,
        dummy_input=inputs,
        default_output_bw=activation_bits,
        default_param_bw=weight_bits,
        config_file=get_path_for_per_channel_config(),
    )

    def calibrate(quantized: nn.Module, _: Any = None) -> None:
        with torch.no_grad():
            for batch in task.study.calibration_batches():
                quantized(*batch)

    simulation.compute_encodings(calibrate)
    quantized: nn.Module = simulation.model
    return quantized.eval()


def trained(task: Task) -> nn.Module:
    """The simulation, trained on."""
    model = post_training(task)
    task.notes["steps"] = distill(model.train(), task)
    return model.eval()


METHODS = {
    "AIMET": Method(LIBRARY, post_training, distribution="aimet-torch"),
    "AIMET equalized": Method(LIBRARY, partial(post_training, equalize=True), distribution="aimet-torch"),
    "AIMET QAT": Method(LIBRARY, trained, trains=True, distribution="aimet-torch"),
}
