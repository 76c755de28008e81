"""torchao's PT2E with the quantizer for x86, after training and with training.

"PyTorch 2 Export Quantization with X86 Backend through Inductor" and "PyTorch 2 Export Quantization-Aware Training" of
https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html. Below 8 bits the same configuration with a smaller
range of integers. Evaluated as converted, without compiling.
"""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..methods import Method, Task
from ..training import distill

LIBRARY = "torchao PT2E"
BATCH_NORM_STEPS = 0.8  # of the budget: then observers and batch norm statistics freeze, as the tutorial has it


def _configuration(task: Task, is_qat: bool) -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    configuration = x86.get_default_x86_inductor_quantization_config(is_qat=is_qat)
    weight_bits, activation_bits = task.width
    half = 2 ** (weight_bits - 1)
    weight = replace(configuration.weight, quant_min=-half, quant_max=half - 1)
    activation = replace(configuration.input_activation, quant_max=2**activation_bits - 1)
    return replace(configuration, weight=weight, input_activation=activation, output_activation=activation)


def _prepared(task: Task, is_qat: bool) -> nn.Module:
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's own deprecated call
    with contextlib.redirect_stderr(io.StringIO()):  # what CUDA libraries it does not find on a CPU
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    inputs = task.study.example_inputs
    shapes = tuple({0: torch.export.Dim("batch", min=2)} for _ in inputs)
    exported = torch.export.export(task.study.model(), inputs, dynamic_shapes=shapes, strict=True).module()
    quantizer = X86InductorQuantizer().set_global(_configuration(task, is_qat))
    prepared: nn.Module = (prepare_qat_pt2e if is_qat else prepare_pt2e)(exported, quantizer)
    with torch.no_grad():
        for batch in task.study.calibration_batches():
            prepared(*batch)
    return prepared


def _converted(prepared: nn.Module) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    converted: nn.Module = move_exported_model_to_eval(convert_pt2e(prepared))
    return converted


def post_training(task: Task) -> nn.Module:
    """Histogram observers, as the configuration has them."""
    return _converted(_prepared(task, is_qat=False))


def trained(task: Task) -> nn.Module:
    """Moving averages observe while it trains; observers and batch norm freeze for the last fifth of the budget."""
    from torchao.quantization.pt2e import disable_observer, move_exported_model_to_train

    prepared = move_exported_model_to_train(_prepared(task, is_qat=True))
    frozen = []

    def freeze(step: int, progress: float) -> None:
        if progress >= BATCH_NORM_STEPS and not frozen:
            frozen.append(step)
            prepared.apply(disable_observer)
            for node in prepared.graph.nodes:
                if node.target is torch.ops.aten.batch_norm.default:
                    node.args = (*node.args[:5], False, *node.args[6:])
            prepared.recompile()

    task.notes["steps"] = distill(prepared, task, after_step=freeze)
    return _converted(prepared)


METHODS = {
    "PT2E": Method(LIBRARY, post_training, distribution="torchao"),
    "PT2E QAT": Method(LIBRARY, trained, trains=True, distribution="torchao"),
}
