"""NNCF's quantization of PyTorch models, after training and with training.

``nncf.quantize`` as in "Basic Quantization Flow" and "Quantization-aware Training" of OpenVINO's documentation
(https://docs.openvino.ai/2026/openvino-workflow/model-optimization.html). Its advice where accuracy suffers is the
mixed preset, and a slower bias correction that its backend for PyTorch does not have; the faster one is always on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from functools import partial
from typing import Any

from torch import nn

from ..methods import Method, Task, Unsupported
from ..training import distill

LIBRARY = "NNCF"
TRANSFORMERS = ("minilm", "gpt")


def post_training(task: Task, mixed: bool = False) -> nn.Module:
    """Post-training quantization, by the preset that NNCF chooses, or with activations of a zero point (``mixed``)."""
    if task.width != (8, 8):
        # Asked by its parameters, it ends in "incompatible with HW capabilities as specified in HW config type 'ANY'".
        raise Unsupported("its quantizers have 8 bits")
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # compiling its kernels, once a machine, takes minutes
    import nncf

    nncf.set_log_level(logging.ERROR)
    options: dict[str, Any] = {"preset": nncf.QuantizationPreset.MIXED} if mixed else {}
    if task.study.name in TRANSFORMERS:
        options["model_type"] = nncf.ModelType.TRANSFORMER
    batches = task.study.calibration_batches()
    dataset = nncf.Dataset([batch if len(batch) > 1 else batch[0] for batch in batches])
    with contextlib.redirect_stdout(io.StringIO()):
        quantized: nn.Module = nncf.quantize(task.study.model(), dataset, subset_size=len(batches), **options)
    return quantized.eval()


def trained(task: Task) -> nn.Module:
    """The result of post-training quantization, trained on: its scales are Parameters."""
    model = post_training(task)
    task.notes["steps"] = distill(model.train(), task)
    return model.eval()


METHODS = {
    "NNCF": Method(LIBRARY, post_training, distribution="nncf"),
    "NNCF mixed": Method(LIBRARY, partial(post_training, mixed=True), distribution="nncf"),
    "NNCF QAT": Method(LIBRARY, trained, trains=True, distribution="nncf"),
}
