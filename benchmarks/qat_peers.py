"""Everything that takes a training step in ``training_step.py``: this library, and the others as their own documents
set them up. Each is called with the float model in training mode and the batch, and returns the model to train."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import zoo
from mlframework.quantization import QATConfig, prepare

Inputs = tuple[Tensor, ...]
Setup = Callable[[nn.Module, Inputs], nn.Module]


def float32(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model itself."""
    return model


def ours(model: nn.Module, inputs: Inputs) -> nn.Module:
    """``prepare`` with the default configuration."""
    return prepare(model, QATConfig(), inputs)


def ours_recompute(model: nn.Module, inputs: Inputs) -> nn.Module:
    """``prepare`` with less kept for backward, and more computed in it."""
    return prepare(model, QATConfig(), inputs, recompute=True)


def ours_learned(model: nn.Module, inputs: Inputs) -> nn.Module:
    """``prepare`` with scales that the optimizer trains."""
    return prepare(model, QATConfig(learnable=True), inputs)


def torch_ao(model: nn.Module, inputs: Inputs) -> nn.Module:
    """torch.ao's eager mode with fused modules and fused fake quantization: see ``torch_ao_eager.prepared``."""
    import torch_ao_eager

    return torch_ao_eager.prepared(model)


def pt2e(model: nn.Module, inputs: Inputs) -> nn.Module:
    """torchao's PT2E with the quantizer for x86.

    "PyTorch 2 Export Quantization with X86 Backend through Inductor", section "Quantization Aware Training", of
    https://docs.pytorch.org/ao/stable/pt2e_quantization/index.html
    """
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's own deprecated call
    with contextlib.redirect_stderr(io.StringIO()):  # what CUDA libraries it does not find on a CPU
        from torchao.quantization.pt2e import move_exported_model_to_train
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(model, inputs, strict=True).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared: nn.Module = move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))
    return prepared


def brevitas(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Brevitas' int8 quantizers put in by its graph rewriting, compiled (``BREVITAS_JIT=1``), and calibrated.

    https://xilinx.github.io/brevitas/getting_started, "programmatically", with post-training quantization before
    training, so that scales are learned Parameters as they are in all but the first 300 steps; its README,
    "Settings". Batch normalization stays, for it is to be trained. A model that its tracer cannot take is quantized
    layer by layer (``layerwise_quantize``).
    """
    os.environ["BREVITAS_JIT"] = "1"  # read once, when Brevitas is imported
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize

    model = copy.deepcopy(model)  # it works in place
    if isinstance(model, zoo.GPT):
        quantized: nn.Module = layerwise_quantize(model)
    else:
        quantized = quantize(preprocess_for_quantize(model, relu6_to_relu=False, merge_bn=False))
    with torch.no_grad(), calibration_mode(quantized.eval()):
        quantized(*inputs)
    return quantized.train()


def nncf(model: nn.Module, inputs: Inputs) -> nn.Module:
    """NNCF's post-training quantization, whose result is then trained; with its compiled kernels.

    "Quantization-aware Training (QAT) with PyTorch", in OpenVINO's documentation:
    https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/compressing-models-during-training.html
    """
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # compiling its kernels, once a machine, takes minutes
    import nncf

    nncf.set_log_level(logging.ERROR)
    transformer = nncf.ModelType.TRANSFORMER if isinstance(model, zoo.GPT) else None
    with contextlib.redirect_stdout(io.StringIO()):
        model = copy.deepcopy(model).eval()
        quantized: nn.Module = nncf.quantize(model, nncf.Dataset([*inputs]), model_type=transformer, subset_size=1)
    return quantized.train()


def compiled(setup: Setup) -> Setup:
    """The same under ``torch.compile``, after a first batch: it gives the state of torch.ao's observers its shape."""

    def set_up_and_compile(model: nn.Module, inputs: Inputs) -> nn.Module:
        prepared = setup(model, inputs)
        with torch.no_grad():
            prepared(*inputs)
        prepared.compile()
        return prepared

    return set_up_and_compile


FLOAT, OURS, OURS_RECOMPUTE, OURS_LEARNED = "float32", "ours", "ours, recompute", "ours, learned scales"
TORCH_AO, PT2E, BREVITAS, NNCF = "torch.ao eager", "torchao PT2E", "Brevitas", "NNCF"

EAGER: dict[str, Setup] = {
    FLOAT: float32,
    OURS: ours,
    OURS_RECOMPUTE: ours_recompute,
    OURS_LEARNED: ours_learned,
    TORCH_AO: torch_ao,
    PT2E: pt2e,
    BREVITAS: brevitas,
    NNCF: nncf,
}
COMPILED: dict[str, Setup] = {f"{name}, compiled": compiled(EAGER[name]) for name in (FLOAT, OURS, TORCH_AO, PT2E)}
CONTENDERS = {**EAGER, **COMPILED}


def set_up(contender: str, model: nn.Module, inputs: Inputs) -> nn.Module:
    """The contender's model for that batch, ready to train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and so is what the others stand on
        return CONTENDERS[contender](model, inputs)
