"""Small models, one for each habit of PyTorch code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(channels, channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class SmallResNet(nn.Module):
    """Convolution, batch norm, a ReLU used three times, max-pool, residual, average, ``view``."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = conv(3, channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.block = ResidualBlock(channels)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.block(self.pool(self.relu(self.bn(self.stem(x))))))
        return self.head(x.view(x.size(0), -1))

    def features(self) -> list[str]:
        """A method that wrapping must leave in place."""
        return [name for name, _ in self.named_children()]


class PreActivation(nn.Module):
    """Batch norm and ReLU before the convolution; the sum feeds a ReLU and the next sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv(3, 5), conv(5, 5), conv(5, 5)
        self.bn1, self.bn2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(x))


class Functional(nn.Module):
    """Everything but the layers called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.mixed = conv(3, 4), conv(3, 4), conv(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu6(self.right(x))], dim=1)
        x = F.max_pool2d(F.relu(self.mixed(x)), 2)
        x = F.dropout(F.adaptive_avg_pool2d(x, 1), 0.25, self.training)
        return self.head(torch.flatten(x, 1))


class Branches(nn.Module):
    """Control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 1e6:
            x = F.relu(self.layer(x))
        return x


class BranchNeverTaken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.usual, self.rare = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.usual(x) if x.sum() < 1e6 else self.rare(x)


class BranchesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 6), Branches(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(F.relu(self.first(x))))


class BranchesAtRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = conv(3, 4), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 1e6:
            x = F.relu(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)))


class CalledTwice(nn.Module):
    """One convolution and one ReLU at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.last = conv(3, 3), nn.ReLU(), conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.conv(self.relu(self.conv(x)))))


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("indices", torch.arange(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(self.indices)
        return self.head(F.relu(self.hidden(x)).mean(1))


class TiedLanguageModel(nn.Module):
    """The embedding's weight is read by a function as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embedding(tokens)), self.embedding.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mixed, _ = self.attention(x, x, x)
        return self.last(mixed)


class TransformerBlock(nn.Module):
    """Layer norm, GELU, softmax and matrix products between quantized layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gelu, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.transpose(1, 2) * 0.35, dim=-1)
        x = x + self.projection(weights @ value)
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class ManyResults(nn.Module):
    """Takes keyword arguments with defaults, returns a dictionary that holds a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor, offset: Tensor | None = None, *, factor: float = 1.0) -> dict[str, Any]:
        hidden = torch.relu(self.body(x))
        if offset is not None:
            hidden = hidden + offset
        return {"left": self.left(hidden) * factor, "others": (self.right(hidden), hidden)}


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.used(x)))


class InPlace(nn.Module):
    """Operations in place whose results are read under the tensor's old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 4), conv(3, 4), conv(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y.add_(self.conv2(x))
        z = self.relu(y)
        return self.conv3(z) + y


class UNet(nn.Module):
    """Down, up with an output size, and a skip connection by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)
        self.last = conv(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.down(x)), output_size=x.shape[2:])
        return self.last(torch.cat([x, y], 1))


class KeywordCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=F.relu(input=self.first(input=x)))


def small_cnn() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 4), nn.BatchNorm2d(4), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.Hardtanh(-2, 2), nn.Linear(8, 2)
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.ReLU6(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 4, groups=2)
    )


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(conv(3, 4), nn.ReLU(), up, nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2))


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 5, 3, padding="same", padding_mode="reflect"), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(5, 4, 3, stride=2, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 2, 2)
    )
