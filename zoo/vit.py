"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with its attention written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .transformer import Block, split_heads


class SelfAttention(nn.Module):
    """Every token attends to every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.projection((weights @ value).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Cuts an image into patches and classifies a token of its own; the defaults are ViT-Tiny, 5.7 M parameters.

    Args:
        image_size, patch_size: sides of the square image and its square patches.
        width: length of the vectors that stand for patches.
        layers, heads: blocks, and attention heads in each.
        classes: length of the result, (N, classes).
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 192,
        layers: int = 12,
        heads: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, SelfAttention(width, heads)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.positions))
        return self.head(x[:, 0])
