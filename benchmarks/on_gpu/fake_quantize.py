"""Fake quantization, forward and backward, against the speed of memory and against ATen's operators.

Each contender is timed as Python calls it, and as one CUDA graph, which tells what its kernels take.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from fake_quantizers import HIGHEST, LOWEST, SCALE, ZERO_POINT
from torch import Tensor

from mlframework.quantization import FakeQuantizeLayer, QuantizationParameters, QuantizationScheme, fake_quantize

from .record import Recorder, Target
from .timing import Call, captured, copy_bandwidth, time_in_turns

OURS, ATEN, TORCH_AO = "ours", "ATen", "torch.ao fused"
DTYPES = (torch.float32, torch.bfloat16)
SCHEME = QuantizationScheme(symmetric=False)

# Of the speed of a copy; and how many times as long ATen's operator takes, by kind.
BANDWIDTH = Target(0.85, at_most=False)
OF_ATEN = {"fixed": Target(3.0, at_most=False), "learned": Target(5.0, at_most=False)}


class Contender(NamedTuple):
    """A function of the input, what it learns, and whether a graph can hold it: not where it waits for the device."""

    function: Callable[[Tensor], Tensor]
    learned: tuple[Tensor, ...] = ()
    waits: bool = False


class Kind(NamedTuple):
    """Contenders, and what one must read and write.

    Attributes:
        passes: how many times forward and backward must read or write all values; a bit to a value comes on top where
            backward reads a mask.
    """

    contenders: Callable[[Tensor], dict[str, Contender]]
    passes: int
    reads_mask: bool


def fixed(x: Tensor) -> dict[str, Contender]:
    """A scale that stays as it is."""
    scale, zero_point = torch.full((1,), SCALE, device=x.device), torch.full((1,), ZERO_POINT, device=x.device)
    parameters = QuantizationParameters(scale, zero_point.to(torch.int32), SCHEME)
    return {
        OURS: Contender(lambda x: fake_quantize(x, parameters)),
        ATEN: Contender(lambda x: torch.fake_quantize_per_tensor_affine(x, SCALE, ZERO_POINT, LOWEST, HIGHEST)),
    }


def moving_average(x: Tensor) -> dict[str, Contender]:
    """A scale that follows the extremes of the batches."""
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

    options = {"dtype": torch.qint8, "qscheme": torch.per_tensor_affine}
    fused = FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver, LOWEST, HIGHEST, **options).to(x.device)
    return {OURS: Contender(FakeQuantizeLayer(SCHEME).to(x.device)), TORCH_AO: Contender(fused)}


def learned(x: Tensor) -> dict[str, Contender]:
    """Scale and zero point with gradients."""
    ours = FakeQuantizeLayer(SCHEME, learnable=True).to(x.device)
    ours(x)  # the first batch sets the scale
    scale = torch.full((1,), SCALE, device=x.device, requires_grad=True)
    zero_point = torch.full((1,), float(ZERO_POINT), device=x.device, requires_grad=True)
    factor = (x.numel() * HIGHEST) ** -0.5

    def aten(x: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, LOWEST, HIGHEST, factor)

    return {
        OURS: Contender(ours, (ours.scale, ours.zero_point)),
        ATEN: Contender(aten, (scale, zero_point), waits=True),
    }


# Forward reads the input and writes the output, backward reads one gradient and writes the other. An average reads the
# input for its extremes first, and gradients of scale and zero point take the input in backward.
KINDS = {
    "fixed": Kind(fixed, passes=4, reads_mask=True),
    "moving average": Kind(moving_average, passes=5, reads_mask=True),
    "learned": Kind(learned, passes=5, reads_mask=False),
}


def run(record: Recorder, device: torch.device, rehearses: bool) -> None:
    """Times every kind in both dtypes."""
    elements = 2**16 if rehearses else 2**26
    rounds, calls, seconds = (2, 1, 0.5) if rehearses else (9, 10, 2.0)
    bandwidth = copy_bandwidth(device, elements)
    record.figure("copy", bandwidth, "GB/s, read and written")
    for dtype in DTYPES:
        for name, kind in KINDS.items():
            case = f"{name}, {str(dtype).removeprefix('torch.')}"
            calls_of = _calls(record, case, kind, elements, dtype, device)
            times = time_in_turns(calls_of, device, rounds, calls, seconds)
            necessary = elements * (kind.passes * dtype.itemsize + (0.25 if kind.reads_mask else 0))
            _record(record, case, name, times, necessary / bandwidth / 1e6)


def _calls(
    record: Recorder, case: str, kind: Kind, elements: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Call]:
    """Forward and backward of each contender that runs, and each as a graph."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(elements, generator=generator, device=device).to(dtype)
    gradient = torch.randn(elements, generator=generator, device=device).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        contenders = kind.contenders(x)
    x.requires_grad_()
    calls: dict[str, Call] = {}
    for name, contender in contenders.items():
        call = _step(contender, x, gradient)
        try:
            call()
            calls[name] = call
            if not contender.waits:
                calls[f"{name}, captured"] = captured(call, device)
        except Exception as error:
            record.failure(f"{case}: {name}", error, is_peer=name != OURS)
    return calls


def _step(contender: Contender, x: Tensor, gradient: Tensor) -> Call:
    return lambda: torch.autograd.grad(contender.function(x), (x, *contender.learned), gradient)


def _record(record: Recorder, case: str, kind: str, times: dict[str, float], at_bandwidth: float) -> None:
    for name, time in times.items():
        target = BANDWIDTH if name.startswith(OURS) else None
        record.figure(f"{case}: {name}", time, "ms")
        record.figure(f"{case}: {name}, of the copy's bandwidth", at_bandwidth / time, "", target)
    for suffix in ("", ", captured"):
        ours, aten = times.get(OURS + suffix), times.get(ATEN + suffix)
        if ours and aten:
            record.figure(f"{case}: ATen / ours{suffix}", aten / ours, "", OF_ATEN.get(kind))
