"""What quantization-aware training sends and holds on many ranks, computed from counts: the tables of docs/scale.md.

The test of it compares the formulae with what 2 and 4 processes really reduce.

    python benchmarks/scale.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zoo
from mlframework.quantization import FakeQuantizeLayer, QATConfig, prepare

RANKS = (8, 32, 128, 512, 1024)
QUANTIZED = (nn.Linear, nn.Embedding, nn.Conv2d)
FLOAT = 4  # bytes


class Size(NamedTuple):
    """What the bytes follow from.

    Attributes:
        parameters: numbers in the float model's parameters.
        activations: nodes of activations, one range each.
        affine: those of them whose zero point is trained where scales are.
        weights: nodes of weights.
        channels: scales in these.
    """

    parameters: int
    activations: int
    affine: int
    weights: int
    channels: int

    @property
    def gradients(self) -> int:
        """Bytes that DistributedDataParallel reduces in a step for the float model."""
        return FLOAT * self.parameters

    @property
    def statistics(self) -> int:
        """Bytes of the packed all-reduce of a step: two ends of a range for each activation."""
        return 2 * FLOAT * self.activations

    @property
    def learned(self) -> int:
        """Bytes of learned scales and zero points, and of their gradients."""
        return FLOAT * (self.activations + self.affine + self.channels)

    def buffers(self, learnable: bool) -> int:
        """Bytes of the nodes' buffers: running ends, a flag and a counter; where they are not learned, the grid too."""
        per_scale = (2 if learnable else 4) * FLOAT
        return per_scale * (self.activations + self.channels) + (FLOAT + 8) * (self.activations + self.weights)


def size_of(prepared: nn.Module) -> Size:
    """The counts of a prepared model."""
    nodes = [module for module in prepared.modules() if isinstance(module, FakeQuantizeLayer)]
    own = {id(parameter) for node in nodes for parameter in node.parameters()}
    activations = [node for node in nodes if node.reduces_over_ranks]
    weights = [node for node in nodes if not node.reduces_over_ranks]
    return Size(
        sum(parameter.numel() for parameter in prepared.parameters() if id(parameter) not in own),
        len(activations),
        sum(not node.scheme.symmetric for node in activations),
        len(weights),
        sum(node.scale.numel() for node in weights),
    )


def size_of_large(model: nn.Module, activations: int, affine: int) -> Size:
    """The counts of a float model that need not have values (``torch.device("meta")``), every layer of it quantized."""
    weights = [module.weight for module in model.modules() if isinstance(module, QUANTIZED)]
    return Size(
        sum(parameter.numel() for parameter in model.parameters()),
        activations,
        affine,
        len(weights),
        sum(weight.shape[0] for weight in weights),
    )


def sent(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of so many bytes."""
    return 2 * (ranks - 1) / ranks * size


def transformer() -> Size:
    """A GPT of 6.7 billion parameters; its nodes are counted on blocks of the same kind that are small."""
    tokens = torch.zeros(1, 4, dtype=torch.long)
    one, two = (
        size_of(prepare(zoo.GPT(8, 4, width=8, layers=layers, heads=2), QATConfig(), (tokens,))) for layers in (1, 2)
    )
    with torch.device("meta"):
        model = zoo.GPT(32_000, 4096, width=4096, layers=32, heads=32)
    activations = one.activations + 31 * (two.activations - one.activations)
    affine = one.affine + 31 * (two.affine - one.affine)
    return size_of_large(model, activations, affine)


def resnet50() -> Size:
    """ResNet-50 for a thousand classes; its nodes are counted on a narrow one."""
    narrow = size_of(prepare(zoo.resnet50(width=4), QATConfig(), (torch.randn(1, 3, 32, 32),)))
    with torch.device("meta"):
        return size_of_large(zoo.resnet50(), narrow.activations, narrow.affine)


def tables() -> Iterator[str]:
    """Both networks, as Markdown."""
    for title, size in (("A GPT of 6.7 billion parameters", transformer()), ("ResNet-50", resnet50())):
        yield from (
            f"### {title}",
            "",
            f"{size.parameters:,} parameters, {size.activations} nodes of activations, {size.weights} of weights with "
            f"{size.channels:,} channels.",
            "",
            "| ranks | gradients, sent by each | statistics | of the gradients | learned scales | of the gradients |",
            "|---|---|---|---|---|---|",
        )
        for ranks in RANKS:
            gradients, statistics, learned = (
                sent(each, ranks) for each in (size.gradients, size.statistics, size.learned)
            )
            yield (
                f"| {ranks:,} | {in_words(gradients)} | {in_words(statistics)} | {statistics / gradients:.1g} "
                f"| {in_words(learned)} | {learned / gradients:.1g} |"
            )
        yield from (
            "",
            "| on each rank | observed | learned |",
            "|---|---|---|",
            f"| buffers of nodes | {in_words(size.buffers(False))} | {in_words(size.buffers(True))} |",
            f"| learned scales, gradients, Adam | none | {in_words(4 * size.learned)} |",
            f"| the same of the model's parameters | {in_words(4 * size.gradients)} | {in_words(4 * size.gradients)} |",
            "",
        )


def in_words(size: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


if __name__ == "__main__":
    print("\n".join(tables()))
