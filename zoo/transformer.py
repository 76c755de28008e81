"""What the decoder of text and the vision transformer have in common."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Attention, then a perceptron, each normalized before and added to what came in."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, T, width) to (N, heads, T, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
