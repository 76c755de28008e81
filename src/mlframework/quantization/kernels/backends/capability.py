"""What this machine's integer kernels compute exactly, found out by asking them.

Without VNNI, x86 multiplies uint8 by int8 in pairs that saturate at 16 bits: fast and wrong. Flags of the processor do
not tell what a library makes of it (oneDNN can be held to an older instruction set), so each kernel is given the
largest products there are, once per process, and believed only if they come out right.
"""

from __future__ import annotations

import functools

import torch

from ..geometry import ConvolutionGeometry
from .onednn_convolution import OnednnConvolution

_CHANNELS = 64


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's convolution of uint8 by int8 gives exact sums on this machine's CPU."""
    codes = torch.full((1, _CHANNELS, 4, 4), 255, dtype=torch.uint8)
    weight = torch.full((_CHANNELS, _CHANNELS, 3, 3), 127, dtype=torch.int8)
    try:
        sums = OnednnConvolution(weight, 0, ConvolutionGeometry((1, 1), (0, 0), (1, 1)))(codes)
    except (RuntimeError, AttributeError, NotImplementedError):  # built without oneDNN, or another architecture
        return False
    return bool((sums == 255 * 127 * _CHANNELS * 9).all())


@functools.cache
def int_mm_is_exact(device_type: str) -> bool:
    """Whether ``torch._int_mm`` gives exact int32 sums on that kind of device."""
    left = torch.full((32, _CHANNELS), 127, dtype=torch.int8, device=device_type)
    right = torch.full((_CHANNELS, 32), -127, dtype=torch.int8, device=device_type)
    try:
        sums = torch._int_mm(left, right)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((sums == -127 * 127 * _CHANNELS).all())


@functools.cache
def int_mm_is_best(device_type: str) -> bool:
    """Whether ``torch._int_mm`` is the way to exact sums on that kind of device: exact, and faster than float32.

    On a CPU, PyTorch hands it to oneDNN or else runs a plain loop, which takes 20 times as long as a float32 product.
    oneDNN's are exact and fast on the same processors, so its convolution answers for both. (A timed run would depend
    on who else is running.)
    """
    return int_mm_is_exact(device_type) and (device_type != "cpu" or onednn_is_exact())
