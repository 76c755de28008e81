"""Learned zero points of few bits, which jump from one integer to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..qat.fake_quantize_layer import FakeQuantizeLayer

# With more codes than those of 5 bits, one more or less hardly shows.
_MOST_CODES_THAT_SHOW = 32


class ZeroPointTrials:
    """Takes back the jumps of zero points that do not make the loss less.

    The gradient of a zero point comes from the values that saturate. Those that its next integer would saturate at the
    other end have no part in it, so that it may lead to where the loss is a multiple: a GELU of 4 bits has one code
    below zero, which a few large values want for themselves. A jump that is taken back leaves the zero point at the
    integer where it was, and it may come again.

    Args:
        nodes: of the model that is trained; those whose zero points are not learned, or have many codes, are left out.
    """

    def __init__(self, nodes: Iterable[FakeQuantizeLayer]) -> None:
        self._nodes = [
            node
            for node in nodes
            if node.zero_point.requires_grad and node.scheme.quant_max - node.scheme.quant_min < _MOST_CODES_THAT_SHOW
        ]

    def codes(self) -> list[Tensor]:
        """The integers that :meth:`take_back` compares with, from before a step."""
        return [node.code_of_zero.detach() for node in self._nodes]

    @torch.no_grad()
    def take_back(self, codes: list[Tensor], loss: Callable[[], float]) -> None:
        """Tries every zero point that has jumped at its former integer, one after the other.

        Args:
            codes: from before the step.
            loss: of the model as it is, on the batch of the step; called only after a jump.
        """
        now = self.codes()
        if not now or torch.equal(_together(now), _together(codes)):
            return
        least = math.inf
        for node, before, after in zip(self._nodes, codes, now, strict=True):
            if torch.equal(before, after):
                continue
            if least == math.inf:
                least = loss()
            jumped = node.zero_point.detach().clone()
            node.zero_point.copy_(before)
            without = loss()
            if without <= least or math.isnan(least):
                least = without
            else:
                node.zero_point.copy_(jumped)


def _together(codes: list[Tensor]) -> Tensor:
    """On one device, which is waited for once."""
    return torch.cat([code.to(codes[0].device) for code in codes])
