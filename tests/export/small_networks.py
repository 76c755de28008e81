"""Small networks, each built around one thing that an export has to get right."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from example_models import make_batch_norms_awkward

SHAPE = (3, 8, 8)


class TwoBranches(nn.Module):
    """Two convolutions of one image, what is made of them, and a convolution after it.

    Args:
        join: from the module, a branch that is never negative, and one that may be.
        channels: of what ``join`` returns.
        parts: modules that ``join`` uses.
    """

    def __init__(
        self, join: Callable[[TwoBranches, Tensor, Tensor], Tensor], channels: int = 8, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.right = nn.Conv2d(3, 8, 1)
        self.join = join
        for name, part in parts.items():
            self.add_module(name, part)
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.join(self, F.relu(self.norm(self.left(x))), self.right(x)))


def _after(part: nn.Module, channels: int = 8) -> Callable[[], nn.Module]:
    """A module on the branch of values of either sign."""
    return lambda: TwoBranches(lambda self, left, right: self.part(right), channels, part=part)


def _joined(join: Callable[[Tensor, Tensor], Tensor], channels: int = 8) -> Callable[[], nn.Module]:
    return lambda: TwoBranches(lambda self, left, right: join(left, right), channels)


# Networks that compute on integers throughout.
INTEGER_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sum": _joined(lambda left, right: left + right),
    "sum with relu": _joined(lambda left, right: F.relu(left + right)),
    "sum with relu6": _joined(lambda left, right: F.relu6(left + right)),
    "clipped sum": _joined(lambda left, right: F.hardtanh(left + right)),
    "sum of a broadcast": _joined(lambda left, right: left.mean((2, 3), keepdim=True) + right),
    "residual": _joined(lambda left, right: left + F.max_pool2d(left, 3, 1, 1) + right),
    "product": _joined(lambda left, right: left * right),
    "concat": _joined(lambda left, right: torch.cat([left, right], 1), 16),
    "concat along a line": _joined(lambda left, right: torch.cat([left, right], -1)),
    "leaky relu": _after(nn.LeakyReLU(0.1)),
    "sigmoid": _after(nn.Sigmoid()),
    "hardswish": _after(nn.Hardswish()),
    "silu": _after(nn.SiLU()),
    "gelu": _after(nn.GELU()),
    "tanh": _after(nn.Tanh()),
    "average pool": _after(nn.AvgPool2d(2)),
    "padded average pool": _after(nn.AvgPool2d(3, 2, 1)),
    "average pool with a divisor": _after(nn.AvgPool2d(2, divisor_override=3)),
    "even adaptive pool": _after(nn.AdaptiveAvgPool2d(4)),
    "global average": _after(nn.AdaptiveAvgPool2d(1)),
    "mean over channels": _joined(lambda left, right: right.mean(1, keepdim=True), 1),
    "mean over rows": _joined(lambda left, right: right.mean(-1)[..., None]),
    "max pool": _after(nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "adaptive max pool": _after(nn.AdaptiveMaxPool2d(4)),
    "upsample": _after(nn.Upsample(scale_factor=2)),
    "pixel shuffle": _after(nn.PixelShuffle(2), 2),
    "padding": _after(nn.ZeroPad2d((1, 2, 0, 1))),
    "reflection": _after(nn.ReflectionPad2d(1)),
    "moves": _joined(lambda left, right: right.permute(0, 1, 3, 2)[:, 1:7].flip(3).roll(2, 3), 6),
    "chunks": _joined(lambda left, right: torch.mul(*right.chunk(2, 1)), 4),
    "relu on a grid": _joined(lambda left, right: F.relu(right) + right),
    "padding modes": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular"),
    ),
    "depthwise, grouped, dilated, strided": lambda: nn.Sequential(
        nn.Conv2d(3, 9, 3, groups=3, padding=1),
        nn.ReLU6(),
        nn.Conv2d(9, 9, 3, groups=9, padding=2, dilation=2, stride=2),
        nn.ReLU(),
        nn.Conv2d(9, 6, 1),
    ),
    "linear layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5)),
    "linear layers of images": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5, bias=False)),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    ),
    "transposed, 2x2": lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "transposed, dilated, of two strides": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 6, 3, (2, 1), (2, 0), (1, 0), dilation=2),
        nn.Conv2d(6, 2, 1),
    ),
}

# Exact, through sums in floats and multipliers by position.
UNEVEN_POOLS: dict[str, Callable[[], nn.Module]] = {
    "average of what is no padding": _after(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "average pool with a ceiling": _after(nn.AvgPool2d(3, 2, ceil_mode=True)),
    "uneven adaptive pool": _after(nn.AdaptiveAvgPool2d(3)),
}


def make(constructor: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network with weights from a seed, and batch norms of every sign and size."""
    torch.manual_seed(seed)
    network = constructor()
    make_batch_norms_awkward(network)
    return network


class Everything(nn.Module):
    """Each layer and operation that XNNPACK has an integer form of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8))
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.mix = nn.Conv2d(16, 8, 1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.depthwise(x))
        y = self.up(self.down(F.max_pool2d(x, 2)))
        x = self.mix(torch.cat([x[:, :, :8, 2:10], y[:, :, :8, :8]], 1))
        x = F.avg_pool2d(x * torch.sigmoid(self.gate(x)), 2)
        return self.head(x.mean((2, 3)))


class CalledTwice(nn.Module):
    """A layer that the code of its module calls twice, with a count that a trace would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.head(torch.relu(self.body(torch.relu(self.body(x)))))


class NumbersToo(nn.Module):
    """Numbers among arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: Tensor, flag: bool = True) -> tuple[Tensor, int, None, Tensor]:
        return self.body(x), x.shape[1], None, x
