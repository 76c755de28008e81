r"""Rounding a matrix so that its products, rather than its entries, change little.

For rows x of inputs with second moments :math:`H = E[x x^T]`, a row w of weights that becomes q on the grid changes the
output by :math:`E[((w - q)^T x)^2] = (w - q)^T H (w - q)` on average. Entries are rounded one after another, and each
makes up for the errors of those before, as far as their inputs go together:

.. math:: q_j = \mathrm{round}(w_j + \sum_{i < j} (w_i - q_i)\, U_{ij}), \qquad H = U D U^T

with U unit upper triangular and D diagonal. This is GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of Chee et
al. 2023 (arXiv:2307.13304, section 3), which takes no inverse. Inputs of the largest moment come first, as in GPTQ's
"act-order".
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128
_MOST_DAMPING = 1.0


class Moments:
    """Second moments of a layer's inputs, and what they are factored into.

    Args:
        matrix: (G, D, D), symmetric, one for each group of channels.
        damping: what is added to the diagonal, relative to its mean. It is more where the matrix is so near to singular
            that it cannot be factored.
    """

    def __init__(self, matrix: Tensor, damping: float) -> None:
        self.diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
        self.order = self.diagonal.argsort(dim=1, descending=True, stable=True)
        ordered = matrix.gather(1, self.order[:, :, None].expand_as(matrix))
        ordered = ordered.gather(2, self.order[:, None].expand_as(matrix))
        # The upper factor is the lower one of what runs backwards.
        backwards = ordered.flip(1, 2)
        diagonal, before = backwards.diagonal(dim1=1, dim2=2), self.diagonal.flip(1)
        before = diagonal.clone()
        while True:
            diagonal.copy_(before + damping * before.mean(1, keepdim=True) + (before == 0))
            lower, failed = torch.linalg.cholesky_ex(backwards)
            if not bool(failed.any()) or damping > _MOST_DAMPING:
                break
            damping *= 10
        self.lower = lower

    def solved(self, values: Tensor) -> Tensor:
        """``values`` of shape (G, R, D), multiplied by the inverse from the right."""
        backwards = self.ordered(values).flip(2)
        return self.unordered(torch.cholesky_solve(backwards.mT, self.lower).mT.flip(2))

    def ordered(self, values: Tensor) -> Tensor:
        return values.gather(2, self.order[:, None].expand_as(values))

    def unordered(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).scatter_(2, self.order[:, None].expand_as(values), values)


def round_with_feedback(matrix: Tensor, moments: Moments, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """The codes.

    Args:
        matrix: (G, R, D), weights: for each group, R rows of D entries.
        moments: of that group's inputs.
        scale: (G, R, 1).
        lowest, highest: the grid's ends; the zero point is 0.

    Returns:
        (G, R, D), integers in ``matrix``'s dtype.
    """
    target = moments.ordered(matrix / scale)
    factor = moments.lower.flip(1, 2)
    unit = factor / factor.diagonal(dim1=1, dim2=2)[:, None]
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    for begin in range(0, target.shape[2], _BLOCK):
        end = min(begin + _BLOCK, target.shape[2])
        wanted = target[:, :, begin:end] + errors[:, :, :begin] @ unit[:, :begin, begin:end]
        for index in range(begin, end):
            column = (errors[:, :, begin:index] * unit[:, None, begin:index, index]).sum(2)
            codes[:, :, index] = (wanted[:, :, index - begin] + column).round().clamp(lowest, highest)
            errors[:, :, index] = target[:, :, index] - codes[:, :, index]
    return moments.unordered(codes)
