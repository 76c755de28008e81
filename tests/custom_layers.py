"""Layers as model libraries write them: subclasses and modules of their own, known by what they compute."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """Pads so that the output has the input's size over the stride."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.size()[-2:], self.weight.shape[-2:], self.stride, strict=True):
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads = [pad // 2, pad - pad // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class StandardizedConv2d(nn.Conv2d):
    """Its weight has mean 0 and variance 1 in every output channel, times a gain."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel, padding=padding)
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias=self.bias)


class CastingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(dtype=x.dtype), self.bias.type_as(x))


class LowRankLinear(nn.Module):
    """A layer's weight with an adapter added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs) * 0.2)
        self.up = nn.Parameter(torch.randn(outputs, 2) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


class UpsamplingConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(outputs, inputs, 2, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernels.transpose(0, 1), stride=(2,))


class BatchNormActivation(nn.BatchNorm2d):
    """The normalization written out, then dropout's place, then the activation."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class GhostBatchNorm(nn.BatchNorm2d):
    """Normalizes the halves of a batch apart in training; a clip follows."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(2) if self.training else (x,)
        return F.relu6(torch.cat([super(GhostBatchNorm, self).forward(part) for part in parts]))


class FrozenBatchNorm(nn.Module):
    """Buffers only, and the arithmetic written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels) * 0.1)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        columns = [each.reshape(1, -1, 1, 1) for each in (self.weight, self.bias, self.running_mean, self.running_var)]
        weight, bias, mean, variance = columns
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class DropPath(nn.Module):
    """Leaves samples out at random, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Residual(nn.Module):
    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)
