"""Post-training W8A8 of public architectures beside a quantizer that rounds layers' weights and inputs, and no more.

What an engine needs (the output of a convolution on a grid) and what runs faster on codes (sums, tables) may cost a
little; a tensor that nobody reads as integers should cost nothing. Weights are random, so this is no measure of any
trained network. Networks are built by transformers from a configuration.

python benchmarks/naive_quantizer.py
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import torch
import transformers
from columns import ColumnsByKind
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlframework.quantization import QATConfig, calibrate, preparation_report, prepare

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
CALIBRATION_BATCHES, TEST_BATCHES = 4, 2
VISION = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}

Make = Callable[[], nn.Module]


def made(model: str, config: str, **settings: object) -> Make:
    """A network of transformers with random weights."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def detr() -> nn.Module:
    """A convolutional backbone, then a transformer with an encoder and a decoder."""
    backbone = transformers.ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    backbone.out_features = ["stage4"]
    sizes = {
        f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 128))
    }
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        **sizes,
    )
    return transformers.DetrForObjectDetection(config)


NETWORKS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "ViT-Tiny": (made("ViTModel", "ViTConfig", **VISION), (2, 3, 224, 224)),
    "DeiT-Tiny": (made("DeiTModel", "DeiTConfig", **VISION), (2, 3, 224, 224)),
    "SigLIP": (made("SiglipVisionModel", "SiglipVisionConfig", **VISION), (2, 3, 224, 224)),
    "Whisper-Tiny encoder": (
        lambda: (
            made(
                "WhisperModel",
                "WhisperConfig",
                d_model=384,
                encoder_layers=4,
                encoder_attention_heads=6,
                encoder_ffn_dim=1536,
                decoder_layers=1,
                decoder_attention_heads=6,
            )().encoder
        ),
        (1, 80, 3000),
    ),
    "DETR": (detr, (2, 3, 96, 96)),
    "ConvNeXt": (
        made("ConvNextModel", "ConvNextConfig", hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2]),
        (2, 3, 224, 224),
    ),
    "ResNet-18": (
        made("ResNetModel", "ResNetConfig", layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]),
        (2, 3, 224, 224),
    ),
}


def naive(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy whose layers round their weight, per output channel, and their input, per tensor between its extremes."""
    model = copy.deepcopy(model).eval()
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    ends: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def measure(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = args[0].aminmax()
        known = ends.get(layer, (low, high))
        ends[layer] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    def rounded(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = ends[layer][0].clamp(max=0), ends[layer][1].clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-12)  # a tensor of zeros
        zero = (-low / scale).round()
        return ((args[0] / scale).round().add(zero).clamp(0, 255).sub(zero) * scale, *args[1:])

    handles = [layer.register_forward_pre_hook(measure) for layer in layers]
    outputs(model, batches)
    for handle in handles:
        handle.remove()
    for layer in (layer for layer in layers if layer in ends):
        weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
        axes = [axis for axis in range(weight.dim()) if axis != isinstance(layer, nn.ConvTranspose2d)]
        scale = weight.abs().amax(axes, keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)
        layer.register_forward_pre_hook(rounded)
    return model


def outputs(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """All floats that the model returns, as one vector."""
    with torch.no_grad():
        results = tree_leaves([model(batch) for batch in batches])
    return torch.cat(
        [leaf.double().flatten() for leaf in results if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    )


def ratio(expected: Tensor, actual: Tensor) -> float:
    """Signal-to-noise in decibels."""
    return 20 * math.log10(float(expected.norm() / (expected - actual).norm()))


def main() -> None:
    """Measures every network and writes the section."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    section = ColumnsByKind("naive-quantizer", ("network", "quantizer"))
    console = Console()
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        model = make().eval()
        batches = [torch.randn(shape) for _ in range(CALIBRATION_BATCHES)]
        test = [torch.randn(shape) for _ in range(TEST_BATCHES)]
        expected = outputs(model, test)
        prepared = prepare(model, QATConfig(), (batches[0],)).eval()
        calibrate(prepared, batches)
        share = preparation_report(prepared).multiply_adds
        section.set((name, "naive"), f"{ratio(expected, outputs(naive(model, batches), test)):.1f}")
        section.set((name, f"ours, {share} of the multiply-adds"), f"{ratio(expected, outputs(prepared, test)):.1f}")
        console.print(name, *(f"{row[1]}: {cells}" for row, cells in section.cells.items() if row[0] == name))
    section.write(
        "Post-training, beside a naive quantizer",
        (
            "`python benchmarks/naive_quantizer.py`: architectures with random weights at 8 bits, calibrated on four",
            "batches of noise. The naive quantizer rounds the weight of every Linear and convolution, per channel,",
            "and what enters it, between its extremes on the same batches, and computes everything else in float.",
            "Signal-to-noise of all outputs on two other batches, in dB.",
        ),
    )


if __name__ == "__main__":
    main()
