"""Files of format 1 go on loading: one that was written when the format was made gives the codes that it gave then."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mlframework.quantization import load

FILE = Path(__file__).parent / "format_1.safetensors"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Network(nn.Module):
    """A residual block, a pooling, a table and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act, self.head = Block(), nn.GELU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.block(x)).mean((2, 3)))


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)


# Of integer sums, and so to the last bit: float32 numbers as Python prints them.
EXPECTED = [[-0.26093173027038574, 0.21985691785812378], [-0.4571903347969055, 0.11328549683094025]]


def test_a_file_of_the_first_format_loads_and_computes_what_it_did() -> None:
    assert load(FILE, Network())(inputs()).tolist() == EXPECTED
