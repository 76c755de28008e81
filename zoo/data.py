"""Batches that can be learned from, made from a seed: pictures of classes, pictures to segment, text with a grammar."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch(NamedTuple):
    """Positional arguments of a network, and what its loss compares with the result."""

    inputs: tuple[Tensor, ...]
    targets: Tensor


def pictures(size: int, seed: int, image_size: int, classes: int) -> Batch:
    """Images (N, 3, S, S) of mean 0 and deviation near 1: a pattern of the class, shadows and noise; labels (N,)."""
    patterns = torch.randn(classes, 3, 4, 4, generator=_generator(0))  # of the classes, alike for every seed
    generator = _generator(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    shadows = torch.randn(size, 3, 4, 4, generator=generator)
    noise = torch.randn(size, 3, image_size, image_size, generator=generator)
    images = 0.8 * _smooth(patterns[labels], image_size) + 0.5 * _smooth(shadows, image_size) + 0.3 * noise
    return Batch((images,), labels)


def pictures_to_segment(size: int, seed: int, image_size: int, classes: int) -> Batch:
    """Images (N, 3, S, S) whose regions have a colour each, under shadows and noise; the regions (N, S, S)."""
    colours = torch.randn(classes, 3, generator=_generator(0))
    generator = _generator(seed)
    regions = _smooth(torch.randn(size, classes, 4, 4, generator=generator), image_size).argmax(dim=1)
    shadows = torch.randn(size, 3, 4, 4, generator=generator)
    noise = torch.randn(size, 3, image_size, image_size, generator=generator)
    images = 0.8 * colours[regions].permute(0, 3, 1, 2) + 0.5 * _smooth(shadows, image_size) + 0.3 * noise
    return Batch((images,), regions)


def text(size: int, seed: int, length: int, vocabulary: int) -> Batch:
    """Tokens (N, T), each drawn from four that may follow the one before; the targets are the next tokens (N, T)."""
    followers = torch.randint(vocabulary, (vocabulary, 4), generator=_generator(0))
    generator = _generator(seed)
    token = torch.randint(vocabulary, (size,), generator=generator)
    tokens = [token]
    for choices in torch.randint(4, (length, size), generator=generator):
        token = followers[token, choices]
        tokens.append(token)
    sequence = torch.stack(tokens, dim=1)
    return Batch((sequence[:, :-1],), sequence[:, 1:])


def sentences(size: int, seed: int, length: int, vocabulary: int, classes: int) -> Batch:
    """Tokens (N, T) whose first part comes from the class's share of the vocabulary, and their attention mask (N, T),
    which hides the padding behind sentences of different lengths; labels (N,)."""
    generator = _generator(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    share = vocabulary // classes
    tokens = torch.randint(share, (size, length), generator=generator) + share * labels[:, None]
    lengths = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return Batch((tokens * mask, mask), labels)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _smooth(coarse: Tensor, image_size: int) -> Tensor:
    """Fields without detail, as the large areas of photographs are; deviation 1 over each field."""
    fields = F.interpolate(coarse, size=image_size, mode="bilinear", align_corners=False)
    return fields / fields.std(dim=(2, 3), keepdim=True)
