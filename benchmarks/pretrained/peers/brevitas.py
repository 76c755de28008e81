"""Brevitas' flow for ImageNet classifiers, after training and with training.

``brevitas_examples/imagenet_classification/ptq`` with its defaults (cross-layer equalization, percentile 99.999, bias
correction) and weights per channel. Its tracer does not take transformers; these are quantized layer by layer, as its
README says of the ``layerwise`` backend. It makes a ``QuantReLU``, which has no bound, of a ReLU6: a network with these
(EfficientNet-Lite0) computes something else afterwards, at any number of bits (1.5 dB with activations of 16).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..methods import Method, Task
from ..training import distill, scale_learning_rate

LIBRARY = "Brevitas"
TRANSFORMERS = ("minilm", "gpt")


def _calibrated(task: Task, mode: Any, model: nn.Module) -> None:
    with torch.no_grad(), mode(model.eval()):
        for batch in task.study.calibration_batches():
            model(*batch)


def post_training(task: Task, merge_batch_norm: bool = True) -> nn.Module:
    """Batch norm merged into the weights, quantizers put in and calibrated, biases corrected."""
    os.environ["BREVITAS_JIT"] = "0"
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model

    layerwise = task.study.name in TRANSFORMERS
    model = task.study.model()
    if not layerwise:
        model = preprocess_for_quantize(
            model, equalize_iters=20, equalize_merge_bias=True, merge_bn=merge_batch_norm, relu6_to_relu=False
        )
    weight_bits, activation_bits = task.width
    model = quantize_model(
        model,
        backend="layerwise" if layerwise else "fx",
        weight_bit_width=weight_bits,
        act_bit_width=activation_bits,
        layerwise_first_last_bit_width=8,
        bias_bit_width=32,
        weight_quant_granularity="per_channel",
        act_quant_percentile=99.999,
        act_quant_type="sym",
        scale_factor_type="float_scale",
        quant_format="int",
    )
    with torch.no_grad():
        model.eval()(*task.study.example_inputs)
    _calibrated(task, calibration_mode, model)
    _calibrated(task, bias_correction_mode, model)
    return model.eval()


def trained(task: Task) -> nn.Module:
    """The same, trained on: its scales are Parameters. Batch norm stays, for it is to be trained."""
    model = post_training(task, merge_batch_norm=False)
    is_scale = {parameter: "scaling_impl" in name for name, parameter in model.named_parameters()}
    groups = [
        {"params": [parameter for parameter in is_scale if not is_scale[parameter]]},
        {"params": [parameter for parameter in is_scale if is_scale[parameter]], "lr": scale_learning_rate(task)},
    ]
    task.notes["steps"] = distill(model.train(), task, groups)
    return model.eval()


METHODS = {
    "Brevitas": Method(LIBRARY, post_training, distribution="brevitas"),
    "Brevitas QAT": Method(LIBRARY, trained, trains=True, distribution="brevitas"),
}
