"""Everything that fake-quantizes a tensor in ``fake_quantize.py``: this library and the others, on the same grid."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlframework.quantization import FakeQuantizeLayer, QuantizationParameters, QuantizationScheme, fake_quantize

os.environ["BREVITAS_JIT"] = "1"  # its README, "Settings": the fast way; read once, when Brevitas is imported

LOWEST, HIGHEST = -128, 127
# Values are drawn from a normal distribution: nearly all of them lie on the grid, and some saturate.
SCALE, ZERO_POINT = 7.0 / 255, 3


class Quantizer(NamedTuple):
    """A function of a tensor, and what it learns."""

    function: Callable[[Tensor], Tensor]
    learned: tuple[Tensor, ...] = ()


OURS, OURS_LAYER = "ours, `fake_quantize`", "ours, `FakeQuantizeLayer`"
ATEN, TORCH_AO, TORCH_AO_FUSED = "ATen", "torch.ao `FakeQuantize`", "torch.ao fused"
TORCH_AO_LEARNABLE, BREVITAS = "torch.ao learnable", "Brevitas"
DOUBLE, SCALED = "`x * 2`", "`x * 1.5`"


def references() -> dict[str, Quantizer]:
    """Operations that read and write memory, and hardly compute."""
    return {DOUBLE: Quantizer(lambda x: x * 2), SCALED: Quantizer(lambda x: x * 1.5)}


def fixed(x: Tensor, per_channel: bool) -> dict[str, Quantizer]:
    """A scale that stays as it is."""
    channels = x.shape[0] if per_channel else 1
    scale, zero_point = torch.full((channels,), SCALE), torch.full((channels,), ZERO_POINT, dtype=torch.int32)
    parameters = QuantizationParameters(scale, zero_point, _scheme(per_channel))
    ours = _ours(per_channel, channels)
    ours.set_parameters(parameters)
    ours.observer.enabled = False
    torch_ao = _torch_ao_fake_quantize(per_channel)
    torch_ao(x)
    torch_ao.disable_observer()  # type: ignore[operator]

    def aten(x: Tensor) -> Tensor:
        if per_channel:
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, LOWEST, HIGHEST)
        return torch.fake_quantize_per_tensor_affine(x, SCALE, ZERO_POINT, LOWEST, HIGHEST)

    return {
        OURS: Quantizer(lambda x: fake_quantize(x, parameters)),
        OURS_LAYER: Quantizer(ours),
        ATEN: Quantizer(aten),
        TORCH_AO: Quantizer(torch_ao),
    }


def moving_average(x: Tensor, per_channel: bool) -> dict[str, Quantizer]:
    """A scale that follows the moving average of the batches' extremes, one more with each call."""
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

    observer, options = _torch_ao_observer(per_channel)
    fused = FusedMovingAvgObsFakeQuantize(observer, LOWEST, HIGHEST, **options)
    return {
        OURS_LAYER: Quantizer(_ours(per_channel, x.shape[0] if per_channel else 1)),
        TORCH_AO: Quantizer(_torch_ao_fake_quantize(per_channel)),
        TORCH_AO_FUSED: Quantizer(fused),
    }


def learned(x: Tensor, per_channel: bool) -> dict[str, Quantizer]:
    """Scale and zero point with gradients. (Brevitas' grid is symmetric: it learns a scale alone.)"""
    from brevitas.nn import QuantIdentity
    from brevitas.quant import Int8ActPerTensorFloatMinMaxInit
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    channels = x.shape[0] if per_channel else 1
    ours = _ours(per_channel, channels, learnable=True)
    ours(x)  # the first batch sets the scale
    scale = torch.full((channels,), SCALE, requires_grad=True)
    zero_point = torch.full((channels,), float(ZERO_POINT), requires_grad=True)
    factor = (x.numel() / channels * HIGHEST) ** -0.5

    def aten(x: Tensor) -> Tensor:
        if per_channel:
            return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, LOWEST, HIGHEST, factor)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, LOWEST, HIGHEST, factor)

    observer, options = _torch_ao_observer(per_channel)
    torch_ao = _LearnableFakeQuantize(
        observer,
        LOWEST,
        HIGHEST,
        scale=SCALE,
        zero_point=float(ZERO_POINT),
        channel_len=channels if per_channel else -1,
        use_grad_scaling=True,
        **options,
    )
    torch_ao.enable_param_learning()
    per_channel_options = {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (channels, 1)}
    brevitas = QuantIdentity(
        act_quant=Int8ActPerTensorFloatMinMaxInit,
        min_val=LOWEST * SCALE,
        max_val=HIGHEST * SCALE,
        **(per_channel_options if per_channel else {}),
    )
    return {
        OURS_LAYER: Quantizer(ours, (ours.scale, ours.zero_point)),
        ATEN: Quantizer(aten, (scale, zero_point)),
        TORCH_AO_LEARNABLE: Quantizer(torch_ao, (torch_ao.scale, torch_ao.zero_point)),
        BREVITAS: Quantizer(brevitas, tuple(brevitas.parameters())),
    }


KINDS: dict[str, Callable[[Tensor, bool], dict[str, Quantizer]]] = {
    "fixed": fixed,
    "moving average": moving_average,
    "learned": learned,
}


def quantizers(kind: str, x: Tensor, per_channel: bool) -> dict[str, Quantizer]:
    """The contenders of a kind, with the references."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return references() | KINDS[kind](x, per_channel)


def _scheme(per_channel: bool) -> QuantizationScheme:
    return QuantizationScheme(symmetric=False, channel_axis=0 if per_channel else None)


def _ours(per_channel: bool, channels: int, learnable: bool = False) -> FakeQuantizeLayer:
    return FakeQuantizeLayer(_scheme(per_channel), learnable=learnable, num_channels=channels)


def _torch_ao_observer(per_channel: bool) -> tuple[type[nn.Module], dict[str, object]]:
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

    if per_channel:
        return MovingAveragePerChannelMinMaxObserver, {
            "dtype": torch.qint8,
            "qscheme": torch.per_channel_affine,
            "ch_axis": 0,
        }
    return MovingAverageMinMaxObserver, {"dtype": torch.qint8, "qscheme": torch.per_tensor_affine}


def _torch_ao_fake_quantize(per_channel: bool) -> nn.Module:
    from torch.ao.quantization import FakeQuantize

    observer, options = _torch_ao_observer(per_channel)
    return FakeQuantize(observer, LOWEST, HIGHEST, **options)
